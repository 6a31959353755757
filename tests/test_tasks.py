"""The tasks: their splits against `datasets` and scikit-learn, their files in the official layouts.

All texts are invented.
"""

import csv
import gzip
import io
import itertools
import json
import random
import re
from collections import Counter

import datasets
import pandas
import pytest
import sklearn.model_selection
from hypothesis import given, strategies as st

from train import cli
from train.finetune.tasks import TASKS, cos, deid, social_history, task_named
from train.finetune.tasks.brat import BLANK_WORDS, WORDS, Span, documents, read_spans, tag
from train.finetune.tasks.task import Data, hf_split, sklearn_split, three_ways

SIZES = [7, 10, 20, 33, 100, 141, 1008]


def names(data: Data, split: str) -> list:
    """(text or words, label by name) of each example of a split."""
    found = []
    for example in getattr(data, split):
        if example.words:
            found.append((example.words, tuple(data.labels[i] for i in example.label)))
        elif isinstance(example.label, tuple):
            on = [name for name, one in zip(data.labels, example.label, strict=True) if one]
            found.append((example.text, on))
        else:
            found.append((example.text, data.labels[example.label]))
    return found


def everything(data: Data) -> list:
    return [one for split in ("train", "validation", "test") for one in names(data, split)]


# Splits


@pytest.mark.parametrize("n", SIZES)
def test_70_15_15_is_that_of_datasets(n):
    whole = datasets.Dataset.from_dict({"row": list(range(n))})
    one = whole.train_test_split(test_size=0.3, seed=42)
    two = one["test"].train_test_split(test_size=0.5, seed=42)
    expected = [list(part["row"]) for part in (one["train"], two["train"], two["test"])]
    assert [rows.tolist() for rows in three_ways(n)] == expected
    assert expected[0] != sorted(expected[0])


@pytest.mark.parametrize("n", SIZES)
def test_70_15_15_is_that_of_sklearn(n):
    split = sklearn.model_selection.train_test_split
    train, aside = split(list(range(n)), test_size=0.30, random_state=42)
    validation, test = split(aside, test_size=0.50, random_state=42)
    found = [rows.tolist() for rows in three_ways(n, sklearn_split)]
    assert found == [train, validation, test]


@pytest.mark.parametrize("share", [0.1, 0.125, 0.15, 0.2, 0.3, 0.5])
def test_single_splits(share):
    for n in (7, 29, 100, 1610):
        ours = [rows.tolist() for rows in hf_split(n, share)]
        whole = datasets.Dataset.from_dict({"row": list(range(n))})
        theirs = whole.train_test_split(test_size=share, seed=42)
        assert ours == [list(theirs["train"]["row"]), list(theirs["test"]["row"])]
        ours = [rows.tolist() for rows in sklearn_split(n, share)]
        split = sklearn.model_selection.train_test_split
        assert ours == list(split(list(range(n)), test_size=share, random_state=42))


# Tasks by name


def test_tasks_by_name():
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert all(task_named(task.name) is task for task in TASKS)
    with pytest.raises(
        ValueError, match="task: expected one of chemprot, phenotype.* qa, retrieval; got 'chem'"
    ):
        task_named("chem")


def test_help_lists_every_task(capsys):
    assert cli.main(["finetune", "--help"]) == 0
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert {"retrieval", *(task.name for task in TASKS)} <= set(words)


def test_published_scores_cover_the_card():
    models = list(TASKS[0].published)
    assert len(models) == 10
    assert [list(task.published) for task in TASKS[:5]] == [models] * 5
    best = {task.name: max(task.published.values()) for task in TASKS[:5]}
    assert best == {
        "chemprot": 90.8,
        "phenotype": 60.8,
        "cos": 95.2,
        "social_history": 58.5,
        "deid": 83.8,
    }
    assert task_named("deid").published["Clinical ModernBERT"] == 44.4
    assert not any(task.published for task in TASKS[5:])


@pytest.mark.parametrize("task", TASKS[:7], ids=lambda task: task.name)
def test_missing_files_say_where_they_are(task, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected .* found none.*https://") as error:
        task.load(tmp_path)
    assert "\n" not in str(error.value)


# ChemProt

RELATIONS = ("CPR:3", "CPR:4", "CPR:5", "CPR:6", "CPR:9", "false")
SENTENCES = (
    "@CHEMICAL$ inhibits @GENE$.",
    '"Rho" kinase @GENE$ needs @CHEMICAL$, it is said.',
    'The 5"-form of @CHEMICAL$ binds @GENE$.',
    "NA @CHEM-GENE$",
    '"',
)


def write_chemprot(folder, newline="\r\n"):
    """The three files; their rows."""
    splits = {}
    for split, length in (("train", 30), ("dev", 6), ("test", 7)):
        rows = [
            (f"{i}.T1.T2", SENTENCES[i % 5], RELATIONS[(i * 5 + len(split)) % 6])
            for i in range(length)
        ]
        if split == "dev":  # ids made from this split alone would be off by one
            rows = [row for row in rows if row[2] != "CPR:3"]
        with open(folder / f"{split}.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator=newline)
            writer.writerow(("index", "sentence", "label"))
            writer.writerows(rows)
        splits[split] = [row[1:] for row in rows]
    return splits


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_chemprot(tmp_path, newline):
    (tmp_path / "raw").mkdir()
    expected = write_chemprot(tmp_path / "raw", newline)
    data = task_named("chemprot").load(tmp_path)
    assert data.labels == RELATIONS
    for split, ours in (("train", "train"), ("dev", "validation"), ("test", "test")):
        assert names(data, ours) == expected[split]
        theirs = pandas.read_csv(tmp_path / "raw" / f"{split}.tsv", sep="\t")
        assert [e.text for e in getattr(data, ours)] == theirs["sentence"].tolist()


def test_chemprot_refuses_other_files(tmp_path):
    write_chemprot(tmp_path)
    dev = tmp_path / "dev.tsv"
    dev.write_text(dev.read_text() + "9.T1.T2\tThe secret text.\tCPR:10\n")
    with pytest.raises(ValueError, match="dev.tsv, record 6: .*CPR:3, CPR:4") as error:
        task_named("chemprot").load(tmp_path)
    assert "secret" not in str(error.value)
    dev.write_text("index\tsentence\n1\tThe secret text.\n")
    with pytest.raises(ValueError, match="expected a column 'label'; it has 'index', 'sentence'"):
        task_named("chemprot").load(tmp_path)
    dev.write_text("index\tsentence\tlabel\n")
    with pytest.raises(ValueError, match="the validation split is empty; .* 30, 0 and 7"):
        task_named("chemprot").load(tmp_path)
    dev.write_text('index\tsentence\tlabel\n1\t"The secret text.\tfalse\n')
    with pytest.raises(ValueError, match="dev.tsv, record 1: a quote is opened and never closed"):
        task_named("chemprot").load(tmp_path)


# Phenotype

PHENOTYPES = (
    "ADVANCED.CANCER ADVANCED.HEART.DISEASE ADVANCED.LUNG.DISEASE ALCOHOL.ABUSE "
    "CHRONIC.NEUROLOGICAL.DYSTROPHIES CHRONIC.PAIN.FIBROMYALGIA DEMENTIA DEPRESSION "
    "DEVELOPMENTAL.DELAY.RETARDATION NON.ADHERENCE OBESITY OTHER.SUBSTANCE.ABUSE "
    "SCHIZOPHRENIA.AND.OTHER.PSYCHIATRIC.DISORDERS UNSURE"
).split()


def phenotype_files(rows: list[tuple[int, int, list[str]]], missing: set[int]) -> tuple[str, str]:
    """The two tables, of (ROW_ID, NONE, phenotypes)."""
    annotations = io.StringIO()
    writer = csv.writer(annotations, lineterminator="\r\n")
    # The columns of the official file are in another order than the labels.
    writer.writerow(["HADM_ID", "SUBJECT_ID", "ROW_ID", *PHENOTYPES[:13][::-1], "NONE", "UNSURE"])
    for row_id, none, on in rows:
        flags = [int(name in on) for name in PHENOTYPES[:13][::-1]]
        writer.writerow([1, 2, row_id, *flags, none, int("UNSURE" in on)])
    notes = io.StringIO()
    writer = csv.writer(notes, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(["ROW_ID", "SUBJECT_ID", "TEXT"])
    for row_id in sorted({row[0] for row in rows} | {5, 999_999}):
        if row_id not in missing:
            writer.writerow([row_id, 2, f'Note {row_id}:\nthe "patient", [**Name**] said\n\nno.'])
    return annotations.getvalue(), notes.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_phenotype(tmp_path, packed):
    rng = random.Random(0)
    rows = []
    for row_id in rng.sample(range(10, 9000), 60):
        on = rng.sample(PHENOTYPES, rng.choice([0, 1, 1, 2, 4]))
        rows.append((row_id, int(not on and rng.random() < 0.7), on))
    rows[3] = (rows[3][0], 1, ["OBESITY"])
    rows[8] = (rows[8][0], 1, ["UNSURE"])
    missing = {rows[11][0], rows[12][0], rows[40][0]}
    annotations, notes = phenotype_files(rows, missing)
    (tmp_path / "ACTdb102003.csv").write_text(annotations)
    (tmp_path / "mimic").mkdir()
    name = tmp_path / "mimic" / ("NOTEEVENTS.csv.gz" if packed else "NOTEEVENTS.csv")
    name.write_bytes(gzip.compress(notes.encode()) if packed else notes.encode())
    data = task_named("phenotype").load(tmp_path)
    assert list(data.labels) == PHENOTYPES
    assert data.skipped["annotations with both NONE and a label"] == 2
    assert data.skipped["annotations without a note"] == 3

    # The reference's steps, in pandas and datasets.
    table = pandas.read_csv(io.StringIO(annotations))
    table = table[~((table["NONE"] == 1) & (table[PHENOTYPES].sum(axis=1) > 0))]
    table = table.merge(pandas.read_csv(io.StringIO(notes)), on="ROW_ID", how="inner")
    whole = datasets.Dataset.from_pandas(table)
    one = whole.train_test_split(test_size=0.2, seed=42)
    two = one["train"].train_test_split(test_size=0.125, seed=42)
    for split, part in (("train", two["train"]), ("validation", two["test"])):
        assert names(data, split) == [(r["TEXT"], [p for p in PHENOTYPES if r[p]]) for r in part]
    assert [e.text for e in data.test] == list(one["test"]["TEXT"])
    assert [len(data.train), len(data.validation), len(data.test)] == [38, 6, 11]


@pytest.mark.parametrize(
    "old, new, message",
    [
        (",1,", ",2,", r"record 1: \S+: expected 0 or 1, got something else"),
        ("OBESITY", "OBESE", "expected a column 'OBESITY'"),
    ],
)
def test_phenotype_refuses_other_values(tmp_path, old, new, message):
    annotations, notes = phenotype_files([(7, 0, ["OBESITY"])], set())
    header, _, row = annotations.partition("1,2,7,")
    text = header.replace(old, new) + "1,2,7," + row.replace(old, new)
    (tmp_path / "ACTdb102003.csv").write_text(text)
    (tmp_path / "NOTEEVENTS.csv").write_text(notes)
    with pytest.raises(ValueError, match=message):
        task_named("phenotype").load(tmp_path)


# brat


def ann(text: str, *spans: tuple[str, str], start: int = 0) -> str:
    """T lines of (type, piece of the text); of the same piece the next occurrence."""
    lines, seen = [], Counter()
    for i, (kind, piece) in enumerate(spans, start=1):
        at = -1
        for _ in range(seen[piece] + 1):
            at = text.index(piece, at + 1)
        seen[piece] += 1
        lines.append(f"T{i}\t{kind} {start + at} {start + at + len(piece)}\t{piece}\n")
    return "".join(lines)


def test_spans_of_an_ann_file(tmp_path):
    path = tmp_path / "a.ann"
    path.write_text(
        "T1\tName 0 4\tAnna\r\n"
        "T2\tDrug 5 8;12 15\tthe end\n"  # discontinuous
        "T3\tDrug 5 x\tthe\n"
        "T4\tDrug 9 9\t\n"
        "T5\n"
        "E1\tName:T1 Status:T2\n"
        "R1\tHas Arg1:T1 Arg2:T2\n"
        "#1\tAnnotatorNotes T1\tThis one\n"
        "A1\tNegated E1\n"
        "T6\tDrug 20 24\t gin"
    )
    skipped = Counter()
    spans = read_spans(path, skipped)
    assert spans == [Span("Name", 0, 4, "Anna"), Span("Drug", 20, 24, " gin")]
    assert skipped == {"discontinuous spans": 1, "malformed annotations": 3}


@pytest.mark.parametrize("counted", [True, False], ids=["both", "one"])
def test_offsets_over_crlf(tmp_path, counted):
    text = "Smoker.\r\nDrinks gin.\r\nLives alone.\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    annotated = text if counted else text.replace("\r\n", "\n")
    (tmp_path / "a.ann").write_text(ann(annotated, ("Drug", "gin"), ("Status", "alone")))
    ((_, found, spans),) = documents(tmp_path, Counter())
    assert [found[s.start : s.end] for s in spans] == ["gin", "alone"]


def test_spans_beyond_the_text_and_texts_without_annotations(tmp_path):
    (tmp_path / "a.txt").write_text("Smokes.\n")
    (tmp_path / "a.ann").write_text("T1\tTobacco 0 6\tSmokes\nT2\tDrug 5 90\tgin\n")
    (tmp_path / "b.txt").write_text("Drinks.\n")
    skipped = Counter()
    ((file, _, spans),) = documents(tmp_path, skipped)
    assert file.name == "a.txt" and [s.type for s in spans] == ["Tobacco"]
    assert skipped == {"spans beyond the text": 1, "texts without annotations": 1}


def test_tags_of_words():
    skipped = Counter()
    text = "drinks two beers a day, no gin."
    spans = [Span("Amount", 7, 16), Span("Frequency", 17, 22), Span("Type", 27, 30)]
    words, tags = tag(text, spans, WORDS, skipped)
    assert words == ("drinks", "two", "beers", "a", "day", ",", "no", "gin", ".")
    assert tags == (
        "O",
        "B-Amount",
        "I-Amount",
        *("B-Frequency", "I-Frequency"),
        *"OO",
        "B-Type",
        "O",
    )
    assert not skipped
    words, tags = tag(text, spans, BLANK_WORDS, skipped)
    assert words[-1] == "gin."
    # "day," and "gin." are not wholly in their spans.
    assert tags == ("O", "B-Amount", "I-Amount", "B-Frequency", "O", "O", "O")
    assert skipped == {"spans that hold no whole word": 1}
    _, tags = tag(text, spans, BLANK_WORDS, skipped, whole=False)
    assert tags[4:] == ("I-Frequency", "O", "B-Type")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_overlapping_spans_whole_ones_are_left(order):
    text = "a b c d e"
    spans = [Span("Out", 0, 7), Span("In", 2, 5), Span("Next", 6, 9)]
    skipped = Counter()
    _, tags = tag(text, [spans[i] for i in order], BLANK_WORDS, skipped)
    # The outer one is left out whole: no I-Out stays behind the inner one.
    assert tags == ("O", "B-In", "I-In", "B-Next", "I-Next")
    assert skipped == {"spans that share a word with a later one": 1}


def test_of_spans_that_start_alike_the_later_in_the_file_is_kept():
    spans = [Span("Long", 0, 5), Span("Short", 0, 1)]
    assert tag("a b c", spans, BLANK_WORDS, Counter())[1] == ("B-Short", "O", "O")
    assert tag("a b c", spans[::-1], BLANK_WORDS, Counter())[1] == ("B-Long", "I-Long", "I-Long")


# Change of State


def test_cos(tmp_path):
    assert cos.LABELS == tuple(
        "B-Attr B-Cos B-Loc B-Ref B-Val I-Attr I-Cos I-Loc I-Ref I-Val O".split()
    )
    expected = {}
    # "snippet101" sorts before "snippet1_": the order of names, as the reference has it.
    for first, name in ((0, "snippet1_100"), (20, "snippet101_200")):
        lines, start = [], 0
        for i in range(first, first + 20):
            snippet = f" Slight increase in the left lobe's opacity since exam-{i}."
            spans = [("Cos", "Slight increase"), ("Loc", "left lobe's"), ("Ref", f"exam-{i}")]
            if i % 2:  # the entities of a snippet need not stand after it, nor in its order
                spans = spans[::-1]
            body = ann(snippet, ("Snippet", snippet), *spans, start=start)
            lines += body.splitlines(keepends=True)
            start += len(snippet) + 1
            expected[i] = (
                ("Slight", "increase", "in", "the", "left", "lobe", "'", "s", "opacity", "since")
                + ("exam", "-", str(i), "."),
                ("B-Cos", "I-Cos", "O", "O", "B-Loc", *["I-Loc"] * 3, "O", "O")
                + ("B-Ref", "I-Ref", "I-Ref", "O"),
            )
        if first == 0:
            lines += [f"T99\tVal {start} {start + 4}\tlow.\n", "T98\tVal 70 74;80 82\tx\n"]
            lines += ["R1\tLocation Arg1:T3 Arg2:T2\n"]
        (tmp_path / f"{name}.ann").write_text("".join(lines))
    data = task_named("cos").load(tmp_path)
    assert data.labels == cos.LABELS
    assert data.skipped["entities in no snippet"] == 1
    assert data.skipped["discontinuous spans"] == 1
    order = [*range(20, 40), *range(20)]
    rows = three_ways(40)
    for split, part in zip(("train", "validation", "test"), rows, strict=True):
        assert names(data, split) == [expected[order[i]] for i in part]


# Social History


def test_social_history_labels_are_those_of_the_reference():
    published = (
        "B-Alcohol B-Amount B-Drug B-EnvironmentalExposure B-ExposureHistory B-Extent B-Family "
        "B-Frequency B-History B-InfectiousDiseases B-LivingStatus B-Location B-MaritalStatus "
        "B-MedicalCondition B-Method B-Occupation B-Other B-PhysicalActivity B-QuitHistory "
        "B-Residence B-SexualHistory B-Status B-Temporal B-Tobacco B-Type I-Alcohol I-Amount "
        "I-Drug I-EnvironmentalExposure I-ExposureHistory I-Extent I-Family I-Frequency I-History "
        "I-InfectiousDiseases I-LivingSituation I-LivingStatus I-Location I-MaritalStatus "
        "I-MedicalCondition I-Method I-Occupation I-Other I-QuitHistory I-Residence "
        "I-SexualHistory I-Status I-Temporal I-Tobacco I-Type O"
    )
    assert list(social_history.LABELS) == published.split()
    assert len(social_history.LABELS) == 51


def test_social_history(tmp_path):
    for i in range(20):
        text = f"SOCIAL HISTORY:  He lives with wife{i} and never smoked cigars .\n"
        spans = [("LivingSituation", "lives with"), ("Family", f"wife{i}")]
        spans += [("Tobacco", "smoked cigars"), ("Status", "never")]
        (tmp_path / f"note{i:02}.txt").write_text(text)
        (tmp_path / f"note{i:02}.ann").write_text(ann(text, *spans))
    (tmp_path / "note20.txt").write_text(" \n")
    (tmp_path / "note20.ann").write_text("")
    data = task_named("social_history").load(tmp_path)
    # B-LivingSituation is no label of the reference, so it comes behind them.
    assert data.labels == (*social_history.LABELS, "B-LivingSituation")
    assert data.skipped == {"texts without a word": 1}
    rows = three_ways(21)
    for split, part in zip(("train", "validation", "test"), rows, strict=True):
        expected = [f"wife{i}" for i in part if i != 20]
        assert [words[5] for words, _ in names(data, split)] == expected
    assert names(data, "test")[0][1] == (
        *("O", "O", "O", "B-LivingSituation", "I-LivingSituation", "B-Family", "O"),
        *("B-Status", "B-Tobacco", "I-Tobacco", "O"),
    )


# DEID


@pytest.mark.parametrize(
    "mask, kind",
    [
        ("Known lastname 123", "name"),
        ("Initial (NamePattern1) ", "name"),
        ("E-mail address", "other"),
        ("Telephone/Fax (1) 55", "phone_nb"),
        ("Pager number", "phone_nb"),
        ("Age over 90 ", "age"),
        ("Location (un) ", "location"),
        ("Hospital1 ", "location"),
        ("Street Address(2)", "location"),
        ("Hospital Ward Name", "name"),  # "name" comes first, as in the reference
        ("5-3", "date"),
        ("1959", "date"),
        ("1901-12-16", "date"),
        ("Date range (1) ", "date"),
        ("Month/Year (2) ", "date"),
        (" ", "other"),
        ("Company 7", "other"),
        ("Holiday", None),
        ("Medical Record Number", None),
    ],
)
def test_kinds_of_masks(mask, kind):
    assert deid.kind_of(mask) == kind


def test_align_by_hand():
    skipped = Counter()
    words, tags = deid.align(
        "Seen by Dr.Anna  Lee,\nat St. Mary on 5-3\n",
        "Seen by Dr.[**Doctor Last Name 1**],\nat [**Hospital1 **] on [**5-3**]\n",
        skipped,
    )
    assert words == tuple("Seen by Dr. Anna Lee , at St. Mary on 5-3".split())
    assert tags == (
        *("O", "O", "O", "B-name", "I-name", "O", "O", "B-location", "I-location", "O", "B-date"),
    )
    assert not skipped


MASKS = {
    "name": ["Known firstname", "Name (NI) 3"],
    "location": ["Hospital1 ", "Location"],
    "date": ["1-2", "2010"],
    "phone_nb": ["Telephone/Fax (1) 8"],
    "age": ["Age over 90"],
    "other": ["", "Holiday", "Company 3"],
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, None, *MASKS]), st.integers(1, 3), st.sampled_from([" ", "\n"])
        ),
        min_size=1,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_align_random_records(pieces, rng):
    """Pieces of plain and of secret words; no plain word occurs in what is hidden."""
    text = masked = ""
    words, tags = [], []
    before = "start"
    for i, (kind, n, blank) in enumerate(pieces):
        if kind and before is not None and before != "start":
            kind = None  # masks with plain text between them
        some = [f"{'S' if kind else 'p'}{i}{'abc'[k]}" for k in range(n)]
        text += blank.join(some) + blank
        masked += (f"[**{rng.choice(MASKS[kind])}**]" if kind else blank.join(some)) + blank
        words += some
        tags += [f"{'I' if k else 'B'}-{kind}" if kind else "O" for k in range(n)]
        before = kind
    assert deid.align(text, masked, Counter()) == (tuple(words), tuple(tags))


def test_masks_side_by_side():
    skipped = Counter()
    # The reference takes all up to the record's end for the first mask, and again for the next.
    one = deid.align("by AnnaLee now", "by [**First Name**][**Last Name**] now", skipped)
    assert one == (("by", "AnnaLee", "now"), ("O", "B-name", "O"))
    two = deid.align("by Anna 5-3.", "by [**First Name**][**5-3**].", skipped)
    assert two == (("by", "Anna", "5-3", "."), ("O", "B-name", "B-date", "O"))
    assert not skipped
    three = deid.align("by Anna Lee 5-3.", "by [**First Name**][**5-3**].", skipped)
    assert three[1] == ("O", "B-other", "I-other", "I-other", "O")
    assert skipped == {deid.ADJACENT: 2}
    four = deid.align("by Anna Lee now", "by [**First Name**] [**Last Name**] now", skipped)
    assert four[1] == ("O", "B-name", "B-name", "O")


def test_what_is_hidden_may_begin_like_what_follows():
    words, tags = deid.align("Dr.-Lee-Ann", "Dr.[**Name**]-[**Name**]", Counter())
    assert words == ("Dr.", "-Lee", "-", "Ann")
    assert tags == ("O", "B-name", "O", "B-name")


@pytest.mark.parametrize(
    "text, masked",
    [
        ("by Anna now", "by [**Name**] then"),
        ("by Anna now", "for [**Name**] now"),
        ("by now", "by[**Name**] now"),  # nothing is hidden
        ("by Anna now", "by Anna then"),
        ("a Anna b", "a [**Name**] b [**Name**] c"),
    ],
)
def test_records_that_do_not_align(text, masked):
    skipped = Counter()
    assert deid.align(text, masked, skipped) is None
    assert skipped == {deid.UNALIGNED: 1}


def write_deid(folder, records, newline="\n"):
    for name, column in (("id.text", 1), ("id.res", 2)):
        (folder / name).write_bytes(
            "".join(
                f"START_OF_RECORD={r[0]}||||\n{r[column]}\n||||END_OF_RECORD\n\n" for r in records
            )
            .replace("\n", newline)
            .encode()
        )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_deid(tmp_path, newline):
    text, masked = "pt{} seen by Anna Lee\non 5-3", "pt{} seen by [**Name**]\non [**5-3**]"
    records = [(f"{i // 2}||||{i % 2}", text.format(i), masked.format(i)) for i in range(40)]
    records[7] = ("3||||1", "pt7 home", "pt7 [**Holiday**]")
    records[9] = ("4||||1", "pt9 seen by Anna", "px9 seen by [**Name**]")
    records[11] = ("5||||1", "", "")
    write_deid(tmp_path, records, newline)
    data = task_named("deid").load(tmp_path)
    published = "age date location name other phone_nb".split()
    assert list(data.labels) == ["O", *(f"{p}-{k}" for p in "BI" for k in published)]
    assert data.skipped[deid.UNALIGNED] == 1
    assert data.skipped[deid.UNKNOWN] == 1
    assert data.skipped["texts without a word"] == 1
    # The split counts the records that are left out.
    split = sklearn.model_selection.train_test_split
    train, aside = split(records, test_size=0.30, random_state=42)
    parts = (train, *split(aside, test_size=0.50, random_state=42))
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        kept = [r[1].split()[0] for r in part if r[0] not in ("4||||1", "5||||1")]
        assert [words[0] for words, _ in names(data, name)] == kept
    labelled = dict((words[0], tags) for words, tags in everything(data))
    assert labelled["pt3"] == ("O", "O", "O", "B-name", "I-name", "O", "B-date")
    assert labelled["pt7"] == ("O", "B-other")


def test_deid_refuses_files_that_do_not_fit(tmp_path):
    records = [(f"{i}||||1", "the secret", "the [**Name**]") for i in range(10)]
    write_deid(tmp_path, records)
    masked = (tmp_path / "id.res").read_text()
    (tmp_path / "id.res").write_text(masked.replace("=3||||1", "=33||||1"))
    with pytest.raises(ValueError, match="the same records in id.text and id.res") as error:
        task_named("deid").load(tmp_path)
    assert "secret" not in str(error.value)
    (tmp_path / "id.res").write_text(masked[:-20])
    with pytest.raises(ValueError, match="id.res: expected records .* got 9 complete ones of 10"):
        task_named("deid").load(tmp_path)


# Real data


def test_negex(shared):
    data = task_named("negex").load(shared / "data" / "negex")
    assert data.labels == ("affirmed", "negated", "possible")
    splits = [data.train, data.validation, data.test]
    sentences = [{" ".join(e.text.lower().split()) for e in split} for split in splits]
    assert not sentences[0] & sentences[1] | sentences[0] & sentences[2]
    assert not sentences[1] & sentences[2]
    assert [len(s) for s in sentences] == [957, 205, 206]
    pairs = [e for split in splits for e in split]
    assert len(pairs) == 1981 and data.skipped == {"pairs that came before": 395}
    assert len(pairs) + 395 == 2376  # the rows of the file
    # Against the file, read another way.
    path = shared / "data" / "negex" / "rsAnnotations-1-120-random.txt"
    table = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    rows = set(table.iloc[:, [1, 2, 3]].map(str.strip).itertuples(index=False, name=None))
    assert {(e.text_pair, e.text, data.labels[e.label].capitalize()) for e in pairs} <= rows


def write_negex(folder, rows):
    header = "line number\tCondition\tsentence\tnegation_status\ttemporality\texperiencer\n"
    lines = "".join(f"{i}\t{c}\t{s}\t{n}\tRecent\tPatient\n" for i, (c, s, n) in enumerate(rows, 1))
    (folder / "rsAnnotations-1-120-random.txt").write_text(header + lines)


def test_negex_in_small(tmp_path):
    rows = [("rash", f'No RASH, "{i}".', "Negated") for i in range(12)]
    rows += [("fever", f'no rash,  "{i}".', "Possible") for i in range(12)]
    rows += [("RASH", 'No rash, "0".', "Negated")]
    write_negex(tmp_path, rows)
    data = task_named("negex").load(tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [16, 4, 4]
    assert data.skipped == {"pairs that came before": 1}
    assert Counter(label for _, label in everything(data)) == {"negated": 12, "possible": 12}
    write_negex(tmp_path, [*rows, ("rash", 'No rash, "0".', "Affirmed")])
    with pytest.raises(ValueError, match="line 27: the same pair .* with another label"):
        task_named("negex").load(tmp_path)
    write_negex(tmp_path, [*rows, ("rash", "a\ttab", "Affirmed")])
    with pytest.raises(ValueError, match="line 27: expected 6 fields"):
        task_named("negex").load(tmp_path)


def test_specialty(shared):
    data = task_named("specialty").load(shared / "data" / "mtsamples")
    assert data.labels == ("Bariatrics", "Surgery", "Urology")
    texts = [text for text, _ in everything(data)]
    table = pandas.read_csv(shared / "data" / "mtsamples" / "mtsamples.csv").dropna(
        subset=["transcription"]
    )
    table = table.map(lambda cell: cell.strip() if isinstance(cell, str) else cell)
    kinds = table.groupby("transcription")["medical_specialty"].agg(set)
    sizes = kinds.explode().value_counts()
    expected = {}
    for text, found in kinds.items():
        fit = [kind for kind in found if sizes[kind] >= 10]
        if fit:
            expected[text] = min(fit, key=lambda kind: sizes[kind])
    assert dict(everything(data)) == expected
    assert len(texts) == len(expected)
    assert data.skipped["texts of specialties with fewer than 10"] == len(kinds) - len(expected)
    assert data.skipped["rows without a text or a specialty"] == 4


# Your own files


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_classification_from_files_of_three_kinds(tmp_path):
    (tmp_path / "train.csv").write_text(
        'Text,Label,id\n"one,\n""two""",yes,1\nthree,no,2\nfour,,3\n,no,4\nfive,nan,5\n'
    )
    (tmp_path / "dev.tsv").write_text("label\tTEXT\r\nyes\tsix, seven\r\nperhaps\tten\r\n")
    write_jsonl(tmp_path / "test.jsonl", [{"text": "eight", "label": "no"}])
    (tmp_path / "readme.md").write_text("nothing")
    data = task_named("classification").load(tmp_path)
    assert data.labels == ("no", "perhaps", "yes")
    assert names(data, "train") == [('one,\n"two"', "yes"), ("three", "no")]
    assert names(data, "validation") == [("six, seven", "yes"), ("ten", "perhaps")]
    assert names(data, "test") == [("eight", "no")]
    assert data.skipped == {
        "examples without a label": 2,
        "empty texts": 1,
        "labels that training lacks: perhaps": 1,
    }


@pytest.mark.parametrize("single", [True, False])
def test_one_file_is_split(tmp_path, single):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"sentence": f"text {i}", "label": i % 11} for i in range(60)])
    data = task_named("classification").load(path if single else tmp_path)
    assert data.labels == tuple(str(i) for i in range(11))  # as numbers, not 0 1 10 2
    rows = three_ways(60)
    for split, part in zip(("train", "validation", "test"), rows, strict=True):
        assert names(data, split) == [(f"text {i}", str(i % 11)) for i in part]


def test_pairs_and_a_missing_validation_file(tmp_path):
    records = [
        {"sentence1": f"a {i}", "sentence2": f"b {i}", "gold_label": "-" if i == 4 else str(i % 2)}
        for i in range(21)
    ]
    write_jsonl(tmp_path / "mli_train_v1.jsonl", records)
    write_jsonl(tmp_path / "train.jsonl", records)
    write_jsonl(tmp_path / "test.jsonl", records[:3])
    data = task_named("classification").load(tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [17, 3, 3]
    assert all(e.text_pair == e.text.replace("a", "b") for e in data.train + data.test)
    again = sum(e.text in {x.text for x in data.train} for e in data.test)
    assert again > 0
    assert data.skipped == {
        "examples without a label": 1,
        "test examples that training holds too (kept)": again,
    }


MULTILABEL = {
    "list.jsonl": [{"text": f"t{i}", "labels": [["a", "b"], ["b"], []][i % 3]} for i in range(30)],
    "text.jsonl": [{"text": f"t{i}", "labels": ["a|b", " b; ", ""][i % 3]} for i in range(30)],
    "flags.jsonl": [
        {"text": f"t{i}", "age": i, "a": int(i % 3 == 0), "b": str(int(i % 3 < 2))}
        for i in range(30)
    ],
}


@pytest.mark.parametrize("form", MULTILABEL)
def test_multilabel(tmp_path, form):
    write_jsonl(tmp_path / form, MULTILABEL[form])
    data = task_named("multilabel").load(tmp_path)
    assert data.labels == ("a", "b")
    assert len(everything(data)) == 30
    for text, on in everything(data):
        assert on == [["a", "b"], ["b"], []][int(text[1:]) % 3]
    assert isinstance(data.train[0].label, tuple)


def test_multilabel_from_a_table_of_flags(tmp_path):
    rows = "".join(f"t{i},{i % 2},{i % 3 // 2},{i}\n" for i in range(30))
    (tmp_path / "all.csv").write_text("text,obese,diabetic,age\n" + rows)
    data = task_named("multilabel").load(tmp_path)
    assert data.labels == ("diabetic", "obese")
    assert dict(everything(data))["t5"] == ["diabetic", "obese"]


CONLL = (
    "-DOCSTART- -X- O O\n\nAnna NNP I-NP B-PER\nLee NNP I-NP I-PER\n, , O O\n\n\nhome NN B-NP O\n"
)


def test_tokens_from_conll(tmp_path):
    (tmp_path / "train.conll").write_text(CONLL)
    (tmp_path / "valid.tsv").write_text("New York\tB-LOC\r\n\t\r\nno\tO\r\n")
    write_jsonl(tmp_path / "test.jsonl", [{"words": ["in", "Bonn"], "labels": ["O", "B-LOC"]}])
    data = task_named("tokens").load(tmp_path)
    assert data.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert names(data, "train") == [
        (("Anna", "Lee", ","), ("B-PER", "I-PER", "O")),
        (("home",), ("O",)),
    ]
    assert names(data, "validation") == [(("New York",), ("B-LOC",)), (("no",), ("O",))]
    assert names(data, "test") == [(("in", "Bonn"), ("O", "B-LOC"))]
    assert data.skipped == {"labels that training lacks: B-LOC": 1}


@pytest.mark.parametrize("folders", [True, False])
def test_tokens_from_brat(tmp_path, folders):
    for i in range(20):
        folder = tmp_path / ["train", "dev", "test"][i % 3] if folders else tmp_path
        folder.mkdir(exist_ok=True)
        text = f"Takes {i} mg of aspirin-x."
        (folder / f"{i:02}.txt").write_text(text)
        (folder / f"{i:02}.ann").write_text(ann(text, ("Drug", "spirin"), ("Dose", f"{i} mg")))
    data = task_named("tokens").load(tmp_path)
    assert data.labels == ("B-Dose", "B-Drug", "I-Dose", "O")
    rows = [range(0, 20, 3), range(1, 20, 3), range(2, 20, 3)] if folders else three_ways(20)
    tags = ("O", "B-Dose", "I-Dose", "O", "B-Drug", "O", "O", "O")
    for split, part in zip(("train", "validation", "test"), rows, strict=True):
        assert names(data, split) == [
            (("Takes", str(i), "mg", "of", "aspirin", "-", "x", "."), tags) for i in part
        ]


BAD = [
    ("classification", {}, "expected train, validation and test, or one file to split.* found 0"),
    ("classification", {"a.csv": "", "b.csv": ""}, "found 2 such files and no train"),
    ("classification", {"train.csv": ""}, "expected train and test, .* found train"),
    ("classification", {"train.csv": "", "train.tsv": ""}, "expected one train, found train.csv"),
    ("classification", {"a.csv": "text,x\nthe secret,2\n"}, "record 1: expected a column label or"),
    ("classification", {"a.csv": "x,label\nthe secret,2\n"}, "record 1: expected a column text or"),
    ("classification", {"a.csv": "text,label\nthe secret,2,3\n"}, "record 1: expected 2 fields"),
    ("classification", {"a.csv": "text,label\nthe secret,1\n"}, "the train split is empty"),
    ("classification", {"a.csv": "text,label\n" + "the secret,1\n" * 9}, "two labels .* only '1'"),
    ("classification", {"a.jsonl": '{"text": "the secret", "label": NaN}'}, "one label, got float"),
    ("classification", {"a.jsonl": '{"text": 3, "label": "a"}'}, "expected text, got int"),
    ("classification", {"a.jsonl": '{"text": "the secret'}, "line 1: not valid JSON"),
    ("multilabel", {"a.csv": "text,x\n" + "the secret,2\n" * 9}, "or columns of 0 and 1; found"),
    ("multilabel", {"a.csv": "text,x\n" + "the secret,0\n" * 9}, "expected a label in .* got none"),
    ("multilabel", {"a.jsonl": '{"text": "the secret", "labels": 3}'}, "expected labels between"),
    ("tokens", {"a.conll": "secret\n"}, "line 1: expected a word and its tag"),
    ("tokens", {"a.conll": "the O\nsecret PER\n"}, "up to line 2: expected the tags"),
    ("tokens", {"a.conll": "secret O\n\n" * 9}, "two labels or more in training, got only 'O'"),
    ("tokens", {"a.jsonl": '{"words": ["secret"], "labels": ["O", "O"]}'}, "got 1 words and 2"),
    ("tokens", {"a.jsonl": '{"words": ["secret"], "labels": [0]}'}, "labels: expected a list of s"),
    ("tokens", {"a.ann": "T1\tA 0 6\tsecret\n"}, "expected pairs of .txt and .ann"),
]


@pytest.mark.parametrize("task, contents, message", BAD)
def test_bad_files(tmp_path, task, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        task_named(task).load(tmp_path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_fields_of_tables_are_text(tmp_path):
    """What pandas would read as missing, as numbers or as booleans."""
    texts = ["NA", "null", "007", "True", "1e5", "None"]
    rows = "".join(f"{text},{label}\n" for text in texts for label in ("NA", "01"))
    (tmp_path / "all.csv").write_text("text,label\n" + rows)
    data = task_named("classification").load(tmp_path)
    assert sorted(everything(data)) == sorted((t, label) for t in texts for label in ("NA", "01"))


def test_parquet(tmp_path):
    records = [{"text": f"NA {i}", "label": i % 3} for i in range(30)]
    for name, part in (("train-00000-of-00001", records[:20]), ("test", records[20:])):
        pandas.DataFrame(part).to_parquet(tmp_path / f"{name}.parquet")
    data = task_named("classification").load(tmp_path)
    assert data.labels == ("0", "1", "2") and len(data.train) == 17
    assert sorted(everything(data)) == sorted((r["text"], str(r["label"])) for r in records)
    (tmp_path / "tokens").mkdir()
    words = [{"tokens": ["in", "Bonn", str(i)], "ner_tags": ["O", "B-LOC", "O"]} for i in range(9)]
    pandas.DataFrame(words).to_parquet(tmp_path / "tokens" / "all.parquet")
    data = task_named("tokens").load(tmp_path / "tokens")
    assert (("in", "Bonn", "3"), ("O", "B-LOC", "O")) in everything(data)
    path = tmp_path / "tokens" / "all.parquet"
    for broken in (path.read_bytes()[:-30], b"the secret"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="expected a complete Parquet file") as error:
            task_named("tokens").load(path)
        assert "secret" not in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        task_named("classification").load(tmp_path / "missing")
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(ValueError, match="expected a file of .csv, .tsv, .jsonl, .parquet"):
        task_named("classification").load(tmp_path / "a.xml")
