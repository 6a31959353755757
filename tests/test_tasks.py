"""The tasks: their splits against `datasets` and scikit-learn, their files in the official layouts.

All texts are invented.
"""

import csv
import gzip
import io
import random
import re
from collections import Counter

import datasets
import pandas
import pytest
import sklearn.model_selection
from hypothesis import given, strategies as st

from tests.task_files import ann, everything, names
from train import cli
from train.finetune.tasks import TASKS, cos, deid, social_history, task_named
from train.finetune.tasks.task import hf_split, sklearn_split, three_ways

SIZES = [7, 10, 20, 33, 100, 141, 1008]


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
    dev.write_text('index\tsentence\tlabel\n1\t"The secret text.\n')
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


def test_cos_in_other_units(tmp_path):
    """Offsets that count UTF-16 units, and an entity with another text at its offsets."""
    lines = []
    for i in range(10):
        snippet = f"Low \U0001f600 opacity in lobe {i}."
        counted = snippet.replace("\U0001f600", "ab")
        at = 100 * i
        lines += [f"T1\tSnippet {at} {at + len(counted)}\t{snippet}\n"]
        lines += [ann(counted, ("Attr", "opacity"), ("Loc", "lobe"), start=at)]
        lines += [f"T9\tVal {at} {at + 3}\t{'High' if i == 3 else 'Low'}\n"]
    (tmp_path / "a.ann").write_text("".join(lines), encoding="utf-8-sig")
    data = task_named("cos").load(tmp_path)
    assert data.skipped == {"spans with another text at their offsets, in a.ann": 1}
    for words, tags in everything(data):
        assert dict(zip(words, tags, strict=True)) == {
            "Low": "O" if "3" in words else "B-Val",
            **{"\U0001f600": "O", "opacity": "B-Attr", "in": "O", "lobe": "B-Loc"},
            **{words[5]: "O", ".": "O"},
        }


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
    skipped, kept = Counter(), Counter()
    words, tags = deid.align(
        "Seen by Dr.Anna  Lee,\nat St. Mary on 5-3\n",
        "Seen by Dr.[**Doctor Last Name 1**],\nat [**Hospital1 **] on [**5-3**]\n",
        skipped,
        kept,
    )
    assert words == tuple("Seen by Dr. Anna Lee , at St. Mary on 5-3".split())
    assert tags == (
        *("O", "O", "O", "B-name", "I-name", "O", "O", "B-location", "I-location", "O", "B-date"),
    )
    assert not skipped and not kept


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
    assert deid.align(text, masked, Counter(), Counter()) == (tuple(words), tuple(tags))


def test_masks_side_by_side():
    skipped, kept = Counter(), Counter()
    # The reference takes all up to the record's end for the first mask, and again for the next.
    one = deid.align("by AnnaLee now", "by [**First Name**][**Last Name**] now", skipped, kept)
    assert one == (("by", "AnnaLee", "now"), ("O", "B-name", "O"))
    two = deid.align("by Anna 5-3.", "by [**First Name**][**5-3**].", skipped, kept)
    assert two == (("by", "Anna", "5-3", "."), ("O", "B-name", "B-date", "O"))
    assert not skipped and not kept
    three = deid.align("by Anna Lee 5-3.", "by [**First Name**][**5-3**].", skipped, kept)
    assert three[1] == ("O", "B-other", "I-other", "I-other", "O")
    assert not skipped and kept == {deid.ADJACENT: 2}
    four = deid.align("by Anna Lee now", "by [**First Name**] [**Last Name**] now", skipped, kept)
    assert four[1] == ("O", "B-name", "B-name", "O")


def test_what_is_hidden_may_begin_like_what_follows():
    words, tags = deid.align("Dr.-Lee-Ann", "Dr.[**Name**]-[**Name**]", Counter(), Counter())
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
    assert deid.align(text, masked, skipped, Counter()) is None
    assert skipped == {deid.UNALIGNED: 1}


def write_deid(folder, records, newline="\n", encoding="utf-8"):
    for name, column in (("id.text", 1), ("id.res", 2)):
        (folder / name).write_bytes(
            "".join(
                f"START_OF_RECORD={r[0]}||||\n{r[column]}\n||||END_OF_RECORD\n\n" for r in records
            )
            .replace("\n", newline)
            .encode(encoding)
        )


@pytest.mark.parametrize(
    "newline, encoding", [("\n", "utf-8"), ("\r\n", "utf-8-sig"), ("\n", "utf-16")]
)
def test_deid(tmp_path, newline, encoding):
    text, masked = "pt{} seen by Anna Lee\non 5-3", "pt{} seen by [**Name**]\non [**5-3**]"
    records = [(f"{i // 2}||||{i % 2}", text.format(i), masked.format(i)) for i in range(40)]
    records[7] = ("3||||1", "pt7 home", "pt7 [**Holiday**]")
    records[9] = ("4||||1", "pt9 seen by Anna", "px9 seen by [**Name**]")
    records[11] = ("5||||1", "", "")
    # The masks are found by the text around them, so no offset depends on how characters count.
    emoji = "pt13 \U0001f600 by Anna\u00a0Lee on 5-3", "pt13 \U0001f600 by [**Name**] on [**5-3**]"
    records[13] = ("6||||1", *emoji)
    write_deid(tmp_path, records, newline, encoding)
    data = task_named("deid").load(tmp_path)
    published = "age date location name other phone_nb".split()
    assert list(data.labels) == ["O", *(f"{p}-{k}" for p in "BI" for k in published)]
    assert data.skipped[deid.UNALIGNED] == 1
    assert data.kept == {deid.UNKNOWN: 1}
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
    assert labelled["pt13"] == labelled["pt3"]


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


def test_negex_without_a_header(shared, tmp_path):
    """The form in the repository's genConText: a remark comes second."""
    name = "rsAnnotations-1-120-random.txt"
    _, *rows = (shared / "data" / "negex" / name).read_text().splitlines()
    (tmp_path / name).write_text("".join(row.replace("\t", "\t \t", 1) + "\n" for row in rows))
    both = [task_named("negex").load(f) for f in (shared / "data" / "negex", tmp_path)]
    assert both[0] == both[1]


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
