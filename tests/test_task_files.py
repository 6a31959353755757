"""Tasks from files of your own: tables, JSON, CoNLL, brat and SQuAD, in every form that occurs.

All texts are invented.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import pathlib
from collections import Counter

import pandas
import pytest

from tests.task_files import ann, everything, names
from train.corpora.readers.text import read_rows
from train.finetune.config import FinetuneConfig
from train.finetune.run import load_data
from train.finetune.tasks import TASKS, described, task_named
from train.finetune.tasks.brat import BLANK_WORDS, WORDS, Span, documents, read_spans, tag
from train.finetune.tasks.task import three_ways

# brat


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
    (tmp_path / "c.ann").write_text("")
    skipped = Counter()
    ((file, _, spans),) = documents(tmp_path, skipped)
    assert file.name == "a.txt" and [s.type for s in spans] == ["Tobacco"]
    assert skipped == {
        "spans beyond the text": 1,
        "texts without annotations": 1,
        "annotations without a text": 1,
    }


EMOJI = "Ärztin 😀: Anna\u00a0Lee\r\ntakes aspirin.\r\n"


def utf16_units(text: str) -> str:
    """A text with as many characters as this one has UTF-16 units."""
    return "".join("ab" if ord(c) > 0xFFFF else c for c in text)


@pytest.mark.parametrize(
    "encoding, bom",
    [("utf-8", ""), *itertools.product(["utf-8-sig", "utf-16", "utf-16-be"], ["", "\ufeff"])],
)
@pytest.mark.parametrize("newline", ["\r\n", "\n"], ids=["crlf", "lf"])
@pytest.mark.parametrize("count", [str, utf16_units], ids=["characters", "units"])
def test_offsets_are_read_as_their_file_counts_them(tmp_path, encoding, bom, newline, count):
    """Against `ann`, which counts what it is given, and Python's codecs."""
    counted = count(bom + EMOJI.replace("\r\n", newline))
    lines = ann(counted, ("Name", "Anna\u00a0Lee"), ("Drug", "aspirin"), ("Other", "."))
    text = "\ufeff" + EMOJI if encoding == "utf-16-be" else EMOJI
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "a.ann").write_bytes(lines.encode("utf-16" if "16" in encoding else "utf-8-sig"))
    skipped = Counter()
    ((_, found, spans),) = documents(tmp_path, skipped)
    assert found == EMOJI and not skipped
    assert [(s.type, found[s.start : s.end]) for s in spans] == [
        ("Name", "Anna\u00a0Lee"),
        ("Drug", "aspirin"),
        ("Other", "."),
    ]


def test_spans_with_another_text_at_their_offsets(tmp_path):
    for name, shift in (("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 3)):
        (tmp_path / f"{name}.txt").write_text("Takes secret pills.")
        (tmp_path / f"{name}.ann").write_text(
            f"T1\tDrug {6 + shift} {12 + shift}\tsecret\nT2\tForm 13 18\tpills\nT3\tX 0 5\n"
        )
    skipped = Counter()
    spans = [spans for _, _, spans in documents(tmp_path, skipped)]
    assert [len(found) for found in spans] == [3, 2, 2, 2, 2]
    assert skipped == {
        "spans with another text at their offsets, in b.txt, c.txt, d.txt and 1 more files": 4
    }


def test_a_discontinuous_span_over_a_line_end_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("heart \n failure of left heart")
    (tmp_path / "a.ann").write_text(
        "T1\tX 0 5;8 15\theart failure\n"
        "T2\tX 0 5;19 23\theart left\n"
        "T3\tX 8 15;0 5\tfailure heart\n"
    )
    skipped = Counter()
    ((_, text, spans),) = documents(tmp_path, skipped, join=True)
    assert [text[s.start : s.end] for s in spans] == ["heart \n failure"]
    assert skipped == {"discontinuous spans": 2}
    assert [spans for _, _, spans in documents(tmp_path, Counter())] == [[]]


@pytest.mark.skipif(os.name == "nt", reason="no such links and names there")
def test_links_are_followed_and_names_are_escaped(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "brat").mkdir()
    (tmp_path / "brat" / "linked").symlink_to(tmp_path / "real")
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "real" / f"{name}.txt").write_text("Takes pills.")
    (tmp_path / "real" / f"{name}.ann").write_text("T1\tForm 6 11\tpills\nT2\tForm 0 5\tpills\n")
    skipped = Counter()
    ((_, _, spans),) = documents(tmp_path / "brat", skipped)
    assert spans == [Span("Form", 6, 11, "pills")]
    assert skipped == {r"spans with another text at their offsets, in linked/caf\xe9.txt": 1}
    (tmp_path / "real" / "up").symlink_to(tmp_path / "brat")
    with pytest.raises(ValueError, match="expected no link to a folder that it is in"):
        task_named("tokens").load(tmp_path / "brat")


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"a\n\x81\n", "a.txt, line 2: not text .neither UTF-8 nor cp1252"),
        ("ab".encode("utf-16-le"), "a.txt, line 1: not text .NUL bytes"),
        (b"\xff\xfea", "a.txt: not text .broken UTF-16"),
    ],
)
def test_a_document_that_is_not_text(tmp_path, raw, message):
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.ann").write_text("")
    with pytest.raises(ValueError, match=message):
        documents(tmp_path, Counter())


def test_a_line_in_cp1252_changes_no_other(tmp_path):
    (tmp_path / "a.txt").write_bytes("é Bönn\n".encode() + "ü Köln".encode("cp1252"))
    (tmp_path / "a.ann").write_text(ann("é Bönn\nü Köln", ("Loc", "Bönn"), ("Loc", "Köln")))
    skipped = Counter()
    ((_, text, spans),) = documents(tmp_path, skipped)
    assert [text[s.start : s.end] for s in spans] == ["Bönn", "Köln"] and not skipped


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
    }
    assert data.kept == {"labels that training lacks: perhaps": 1}


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
    }
    assert data.kept == {"test examples that training holds too": again}


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
    assert data.skipped == {} and data.kept == {"labels that training lacks: B-LOC": 1}


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


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_words_of_conll_end_at_spaces_and_tabs_only(tmp_path, separator):
    words = ["10\u00a0mg", "a\u2028b", "c\x85d", "g\x0ch", "\ufeffi", "j\u3000k"]
    lines = "".join(f"{word}{separator}B-X\n,{separator}O\n\n" for word in words)
    (tmp_path / "all.conll").write_text("\ufeff" + lines, encoding="utf-8")
    data = task_named("tokens").load(tmp_path)
    assert {one for ones, _ in everything(data) for one in ones} == {*words, ","}


def test_quotes_in_tsv_are_text(tmp_path):
    """The specification (text/tab-separated-values) knows no quotes; one line is one record."""
    texts = ['"No" rash', '"open', 'a "mid" b', 'close"', '"', '""', "plain"]
    path = tmp_path / "all.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(texts * 3)))
    data = task_named("classification").load(tmp_path)
    assert Counter(everything(data)) == Counter((t, str(i % 2)) for i, t in enumerate(texts * 3))


def test_quotes_that_pair_up_over_lines_do_not_join_complete_rows(tmp_path):
    rows = [('"a', "0"), ("b", '1"'), ("c", "0"), ("d", "1")]
    (tmp_path / "all.tsv").write_text("text\tlabel\n" + "".join("\t".join(r) + "\n" for r in rows))
    found = list(read_rows(tmp_path / "all.tsv", "\t"))
    assert [tuple(row) for _, row in found[1:]] == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tsv_as_pandas_and_excel_write_it(tmp_path, quoting):
    texts = ['"No" rash', "two\nlines", "a\ttab", '"open', "plain", '"']
    table = pandas.DataFrame({"label": ["x", "y"] * 9, "text": texts * 3})
    table.to_csv(tmp_path / "all.tsv", sep="\t", index=False, quoting=quoting)
    data = task_named("classification").load(tmp_path)
    read = pandas.read_csv(tmp_path / "all.tsv", sep="\t")
    assert read["text"].tolist() == texts * 3
    assert Counter(everything(data)) == Counter(zip(texts * 3, ["x", "y"] * 9, strict=True))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", 'text,label\n"No" secret,1\n', "record 1: ',' expected after '\"'; is a quote"),
        ("a.csv", 'text,label\n"secret,1\nb,2\nc "d",3\n', "record 1: .* is a quote left open"),
        ("a.tsv", 'text\tlabel\n"a ""b"""\t1\n"No" secret\t1\n', "record 2: .* is a quote left"),
        ("a.tsv", 'text\tlabel\n"secret\nx\t1\n', "record 1: a quote is opened and never closed"),
    ],
)
def test_quotes_that_mean_nothing(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        task_named("classification").load(tmp_path)
    assert "secret" not in str(error.value)
    assert not open_files(tmp_path)


def open_files(folder) -> list[str]:
    """The files in a folder that this process has open, as Linux lists them."""
    names = []
    for link in pathlib.Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            names.append(os.readlink(link))
    return [name for name in names if name.startswith(str(folder))]


@pytest.mark.parametrize(
    "task, name, text",
    [
        ("classification", "a.csv", "text,label\na,1,2\nb,1\n"),
        ("classification", "a.csv", "words,label\na,1\nb,1\n"),
        ("classification", "a.jsonl", '{"text": "a"}\n{"text": 3}\n{"text": "b"}\n'),
        ("tokens", "a.conll", "a O\nb\nc O\n"),
        ("tokens", "a.conll", "a X-\n\nb O\n"),
    ],
)
def test_no_error_leaves_a_file_open(tmp_path, task, name, text):
    """Not even while the error, whose frames hold the readers, is kept."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        task_named(task).load(tmp_path)
    assert not open_files(tmp_path), error


def test_the_columns_of_jsonl_are_those_of_all_records(tmp_path):
    records = [{"label": "a", "note": "no text"}, {"text": "one", "label": "a"}]
    records += [{"text": f"t{i}", "note": "a remark", "label": "ab"[i % 2]} for i in range(20)]
    records += [{"text": "without"}]
    write_jsonl(tmp_path / "all.jsonl", records)
    data = task_named("classification").load(tmp_path)
    assert {text for text, _ in everything(data)} == {"one", *(f"t{i}" for i in range(20))}
    assert data.skipped == {"empty texts": 1, "examples without a label": 1}
    write_jsonl(
        tmp_path / "all.jsonl", [{"text": f"t{i}", "labels": ["a"], "x": 1} for i in range(9)]
    )
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"text": "none", "x": 1}\n')
    data = task_named("multilabel").load(tmp_path)
    assert data.labels == ("a",) and ("none", []) in everything(data)


def test_columns_that_are_no_labels_are_listed(tmp_path):
    rows = "".join(f"t{i},{i % 2},{i},{'' if i == 3 else 'false'}\n" for i in range(30))
    (tmp_path / "all.csv").write_text("text,obese,age,gap\n" + rows)
    data = task_named("multilabel").load(tmp_path)
    assert data.labels == ("obese",)
    assert data.skipped == {"columns with other values than 0 and 1, so no labels: 'age', 'gap'": 2}


SQUAD = "Ärztin 😀😀: Anna\u00a0Lee takes aspirin."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_offsets_of_answers(tmp_path, encoding, units, suffix):
    counted = utf16_units(SQUAD) if units else SQUAD
    answers = ["Anna\u00a0Lee", "aspirin", "."]
    found = [{"text": a, "answer_start": counted.index(a)} for a in answers]
    records = [
        {"question": f"{i}?", "context": SQUAD, "answer": a["text"], **a}
        for i in range(10)
        for a in found
    ]
    records.append({"question": "x", "context": SQUAD, "answer": "Lee", "answer_start": 3})
    qas = [{"question": r["question"], "answers": [{**r, "text": r["answer"]}]} for r in records]
    text = json.dumps({"data": [{"paragraphs": [{"context": SQUAD, "qas": qas}]}]})
    if suffix == "jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (tmp_path / f"all.{suffix}").write_bytes(text.encode(encoding))
    data = task_named("qa").load(tmp_path)
    examples = [*data.train, *data.validation, *data.test]
    assert len(examples) == 30
    assert Counter(e.text_pair[slice(*e.label)] for e in examples) == dict.fromkeys(answers, 10)
    assert data.skipped == {f"answers that are not at answer_start, in all.{suffix}": 1}


def test_lone_surrogates(tmp_path):
    """JSON may hold half of a character; each becomes U+FFFD, which moves no offset."""
    line = '{"question": "\\ud83d?", "context": "\\ud83d b c", "answer": "b", "answer_start": 2}\n'
    (tmp_path / "qa.jsonl").write_text(line * 9)
    (example, *_) = task_named("qa").load(tmp_path / "qa.jsonl").train
    assert (example.text, example.text_pair, example.label) == ("\ufffd?", "\ufffd b c", (2, 3))
    for task, line in (
        ("classification", {"text": "a\ud83d", "label": "L\udc00"}),
        ("multilabel", {"text": "a\ud83d", "labels": ["L\udc00"]}),
        ("tokens", {"words": ["a\ud83d"], "labels": ["B-L\udc00"]}),
    ):
        text = "".join((json.dumps(line) + "\n").replace("L\\", f"L{i % 2}\\") for i in range(40))
        (tmp_path / f"{task}.jsonl").write_text(text)
        data = task_named(task).load(tmp_path / f"{task}.jsonl")
        assert {"".join(text) for text, _ in everything(data)} == {"a\ufffd"}
        assert {label[-3:] for label in data.labels} == {"L0\ufffd", "L1\ufffd"}


def test_further_answers_are_kept(tmp_path):
    answers = [{"text": "b c", "answer_start": 2}, {"text": "b", "answer_start": 2}]
    qas = [{"question": f"{i}?", "answers": answers} for i in range(9)]
    squad = {"data": [{"paragraphs": [{"context": "a b c", "qas": qas}]}]}
    (tmp_path / "all.json").write_text(json.dumps(squad))
    (example, *_) = task_named("qa").load(tmp_path).test
    assert (example.label, example.other_answers) == ((2, 5), ("b",))


BAD_ANSWERS = [
    ('"answer": "b"', "line 1: expected answer_start, a number from 0 on"),
    ('"answer": "b", "answer_start": -1', "line 1: expected answer_start, a number from 0 on"),
    ('"answers": {"text": ["b"], "answer_start": [0]}', "line 1: expected answer and answer_start"),
    ('"answer": null', "no question with an answer"),
]


@pytest.mark.parametrize("answer, message", BAD_ANSWERS)
def test_bad_answers(tmp_path, answer, message):
    line = f'{{"question": "q", "context": "secret b", {answer}}}'
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message) as error:
        task_named("qa").load(tmp_path / "a.jsonl")
    assert "secret" not in str(error.value)


BAD = [
    ("classification", {}, "expected train, validation and test, or one file to split.* found 0"),
    ("classification", {"a.csv": "", "b.csv": ""}, "found 2 such files and no train"),
    ("classification", {"train.csv": ""}, "expected train and test, .* found train"),
    ("classification", {"train.csv": "", "train.tsv": ""}, "expected one train, found train.csv"),
    ("classification", {"a.csv": "text,label,text\na,1,secret"}, "each column once.* 'text' twice"),
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
    ("multilabel", {"a.jsonl": '{"text": "the secret", "labels": 0}'}, "expected labels between"),
    ("multilabel", {"a.jsonl": '{"text": "the secret", "labels": [true]}'}, "labels between"),
    ("multilabel", {"a.jsonl": '{"text": "the secret", "labels": [0, 1, 0]}'}, "a 0 or 1 for each"),
    (
        "multilabel",
        {"train.csv": "text,labels\nsecret,a\n", "test.csv": "text,x\nsecret,1\n"},
        "expected a column label or .* in each file, or in none",
    ),
    ("tokens", {"a.conll": "secret\n"}, "line 1: expected a word and its tag"),
    ("tokens", {"a.conll": "the O\nsecret PER\n"}, "up to line 2: expected the tags"),
    ("tokens", {"a.conll": "secret O\n\n" * 9}, "two labels or more in training, got only 'O'"),
    ("tokens", {"a.jsonl": '{"words": ["secret"], "labels": ["O", "O"]}'}, "got 1 words and 2"),
    ("tokens", {"a.jsonl": '{"words": ["secret"], "labels": [0]}'}, "labels: expected a list of s"),
    ("tokens", {"a.jsonl": '{"words": [""], "labels": ["O"]}'}, "expected a character or more"),
    ("qa", {"a.json": "", "b.json": ""}, "found 2 such files and no train"),
    ("qa", {"a.json": "{}"}, "expected JSON in SQuAD's form"),
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


def test_columns_named_by_flags(tmp_path):
    write = (tmp_path / "all.csv").write_text
    write("NOTE,Finding,Verdict,text\n" + "one,a,yes,0\ntwo,b,no,1\n" * 10)
    config = FinetuneConfig("classification", str(tmp_path), "m")
    task = task_named("classification")
    with pytest.raises(ValueError, match="expected a column label .* name it with --label-column"):
        load_data(task, config)
    config = dataclasses.replace(
        config, text_column="note", text_pair_column="Finding", label_column="verdict"
    )
    data = load_data(task, config)
    assert data.labels == ("no", "yes")
    assert {(e.text, e.text_pair) for e in data.train} == {("one", "a"), ("two", "b")}
    several = load_data(task_named("multilabel"), dataclasses.replace(config, task="multilabel"))
    assert several.labels == ("no", "yes")
    with pytest.raises(ValueError, match="expected the column of --label-column, label; it has"):
        load_data(task, dataclasses.replace(config, label_column="label"))
    with pytest.raises(ValueError, match="the files of task tokens have names of their own"):
        load_data(task_named("tokens"), config)


def test_help_describes_every_task():
    text = described()
    for task in TASKS:
        assert f"  {task.name} " in text and task.title in text
        assert bool(task.files) == bool(task.example) and task.example in text
    assert "retrieval" in text


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
