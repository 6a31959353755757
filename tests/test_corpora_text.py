"""Reading folders of text: every format, encodings, ids, and what is refused."""

import codecs
import csv
import gzip
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from train.corpora.readers import text as module
from train.corpora.readers.text import Document, read_documents
from train.corpora.source import Report
from train.corpora.sources import generic


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def refusal(path: Path, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        list(read_documents(path, **options))
    message = str(error.value)
    assert "\n" not in message
    # Neither in the message nor in anything that a traceback prints above it.
    assert "secret" not in "".join(traceback.format_exception(error.value))
    # A chained JSON error carries the whole line with it.
    assert error.value.__cause__ is None
    return message


# Formats


def parquet(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_beside_other_files(tmp_path):
    write(tmp_path / "a.csv.gz", "text\none\n")
    parquet(tmp_path / "b.parquet", id=[1, 2, 3], Note=["two", None, "three"])
    write(tmp_path / "c.docx", b"PK")
    write(tmp_path / "d.docx", b"PK")
    write(tmp_path / "LICENSE", "free")
    found = [(d.id, d.text) for d in read_documents(tmp_path)]
    assert found == [("a.csv.gz:1", "one"), ("b.parquet:1", "two"), ("b.parquet:3", "three")]
    source = generic("text")
    assert source.remark(tmp_path) == (
        "text: 2 files are read; left out: 2 .docx, 1 without a suffix"
    )
    examples = [e.text for p in source.parts(tmp_path) for e in source.read(p, tmp_path, Report())]
    assert examples == ["one", "two", "three"]


def test_parquet_that_cannot_be_read(tmp_path):
    assert "has no column text" in refusal(parquet(tmp_path / "a.parquet", x=["secret"]))
    path = parquet(tmp_path / "b.parquet", text=[["secret"]])
    assert refusal(path) == f"{path}, row 1: 'text' must be a string, got list"
    path = write(tmp_path / "c.parquet", b"PAR1 secret PAR1")
    assert refusal(path) == f"{path}: expected a complete Parquet file; get it again"


def test_a_folder_gives_its_documents_in_sorted_order_with_ids(tmp_path):
    write(tmp_path / "b.txt", "one\ntwo\n")
    write(tmp_path / "a" / "z.jsonl", '{"text": "first", "x": 1}\n\n{"text": "third"}\n')
    write(tmp_path / "a" / "y.csv.gz", 'id,note\n1,"a, ""b""\nc"\n\n2,d\n')
    write(tmp_path / "a.tsv", "id\tnotes\n1\tx, y\n")
    write(tmp_path / "C.TXT.GZ", b"")
    write(tmp_path / "C.TXT.GZ", gzip.compress(b"upper case"))
    for ignored in ("README.md", "LICENSE", ".hidden.txt", ".git/x.txt", "a/._y.csv", "x.json"):
        write(tmp_path / ignored, b"\x00not to be read")
    expected = [
        Document("C.TXT.GZ:1", "upper case"),
        Document("a.tsv:1", "x, y"),
        Document("a/y.csv.gz:1", 'a, "b"\nc'),
        Document("a/y.csv.gz:2", "d"),
        Document("a/z.jsonl:1", "first"),
        Document("a/z.jsonl:3", "third"),
        Document("b.txt:1", "one\ntwo\n"),
    ]
    assert list(read_documents(tmp_path)) == expected
    assert list(read_documents(str(tmp_path))) == expected


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "the text"),
        ("x.jsonl", '{"id": 3, "text": "the text"}'),
        ("x.csv", "id,text\n3,the text"),
        ("x.tsv", "id\ttext\n3\tthe text"),
    ],
)
def test_a_single_file_of_each_kind(tmp_path, name, content, compressed):
    path = write(tmp_path / (name + compressed), content)
    assert list(read_documents(path)) == [Document(f"{name}{compressed}:1", "the text")]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "cp1252"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_encodings_and_line_ends_make_no_difference(tmp_path, encoding, newline, kind):
    note = "Fièvre — 39 °C\fnext page\nsecond line"
    content = {
        "txt": note,
        "csv": f'id,text\n1,"{note}"\n',
        "jsonl": json.dumps({"text": note}, ensure_ascii=False) + "\n",
    }[kind]
    content = content.replace("\n", newline)
    if encoding.endswith("-bom"):
        bom = codecs.BOM_UTF16_LE if "le" in encoding else codecs.BOM_UTF16_BE
        data = bom + content.encode(encoding.removesuffix("-bom"))
    else:
        data = content.encode(encoding)
    assert texts(write(tmp_path / f"x.{kind}", data)) == [note]


def test_one_bad_byte_spoils_one_line(tmp_path):
    data = "naïve\n".encode() + b"39 \xb0C\n" + "café\n".encode()
    assert texts(write(tmp_path / "x.txt", data)) == ["naïve\n39 °C\ncafé\n"]


def test_empty_texts_are_left_out_and_counted(tmp_path):
    write(tmp_path / "a.csv", "id,text\n1,\n2,  \n3,x\n4\n")
    write(tmp_path / "b.jsonl", '{"text": null}\n{"text": ""}\n{"other": 1}\n{"text": "y"}\n')
    write(tmp_path / "c.txt", "\n \n")
    write(tmp_path / "d.csv", "")
    documents = list(read_documents(tmp_path))
    assert [document.id for document in documents] == ["a.csv:3", "b.jsonl:4"]
    source, report = generic("text"), Report()
    examples = [e for part in source.parts(tmp_path) for e in source.read(part, tmp_path, report)]
    assert [(e.id, e.text) for e in examples] == [(d.id, d.text) for d in documents]
    assert report.dropped == {"empty text": 7}


def test_a_note_may_hold_a_control_character(tmp_path):
    for note in ("BP \x1b[1m90/60\x1b[0m", "BP 90/60\x02"):
        assert texts(write(tmp_path / "x.txt", note)) == [note]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # A line is a row: IANA's text/tab-separated-values knows no quotes.
        (['"No" fever', "b", 'c"', '5" scar'], ['"No" fever', "b", 'c"', '5" scar']),
        (['"open', "b", 'ends"'], ['"open', "b", 'ends"']),
        # As spreadsheets and pandas write it.
        (['"say ""no"""', "b"], ['say "no"', "b"]),
        (['"two\nlines"', "b"], ["two\nlines", "b"]),
    ],
)
def test_quotes_between_tabs(tmp_path, fields, expected):
    lines = "".join(f"{number}\t{field}\n" for number, field in enumerate(fields))
    assert texts(write(tmp_path / "x.tsv", "id\ttext\n" + lines)) == expected


def test_the_first_records_of_json_may_lack_the_column(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"id": 1}\n{"id": 2, "Body": "a"}\n{"Body": 0}\n')
    assert "x.jsonl has no column text or notes" in refusal(path)
    assert "line 3: 'Body' must be a string" in refusal(path, text_column="body")
    path = write(path, '{"id": 1}\n{"id": 2, "note": "a"}\n{"note": "b"}\n')
    assert [d.id for d in read_documents(path)] == ["x.jsonl:2", "x.jsonl:3"]
    assert texts(tmp_path, text_column="note") == ["a", "b"]


def test_lone_surrogates_of_json_become_the_replacement_character(tmp_path):
    path = write(tmp_path / "x.jsonl", r'{"text": "a\ud800b \ud83d\ude42"}')
    assert texts(path) == ["a\ufffdb 🙂"]


# Columns


def test_the_text_column_is_the_first_known_one_or_the_one_named(tmp_path):
    path = write(tmp_path / "x.csv", "Note,TEXT ,other\nn,t,o\n")
    assert texts(path) == ["t"]
    assert texts(path, text_column="note") == ["n"]
    assert texts(path, text_column="OTHER") == ["o"]
    both = write(tmp_path / "y.csv", "Text,text\nupper,lower\n")
    assert texts(both) == ["lower"]
    assert texts(both, text_column="Text") == ["upper"]


def test_a_table_without_a_text_column_lists_what_it_has(tmp_path):
    write(tmp_path / "x.csv", "id,body_of_it,Body Of It\n1,secret,secret\n")
    message = refusal(tmp_path)
    assert "x.csv has no column text or notes" in message
    assert "it has 'id', 'body_of_it', column 3 (10 characters); name the text col" in message
    assert "it has 'id', 'body_of_it', column 3" in refusal(tmp_path, text_column="bod")
    path = write(tmp_path / "y" / "x.jsonl", json.dumps({"id": 1, "body": "secret"}))
    assert "it has 'id', 'body'" in refusal(path)
    wide = write(tmp_path / "z" / "x.csv", ",".join(f"column_{i}" for i in range(45)) + "\n")
    assert "'column_39' and 5 more; name" in refusal(wide)


@pytest.mark.parametrize(
    "row",
    [
        "secret pain,44",
        "secret " * 20 + ",b",
        '"secret\npain",b',
        "secret,he has a cough",
        "secret,-",
    ],
)
def test_a_table_without_a_header_does_not_show_its_data(tmp_path, row):
    path = write(tmp_path / "x.csv", row + "\n" + row + "\n")
    assert "its first record does not look like a header" in refusal(path)


def test_with_a_column_named_the_tables_without_it_are_left_out(tmp_path):
    write(tmp_path / "notes.csv", "id,body\n1,x\n")
    write(tmp_path / "metadata.csv", "id,age\n1,50\n")
    write(tmp_path / "plain.txt", "y")
    assert texts(tmp_path, text_column="body") == ["x", "y"]
    assert "metadata.csv has no column text" in refusal(tmp_path)
    assert "has no column bodi; it has 'id', 'age'" in refusal(tmp_path, text_column="bodi")


# Refusals


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", r"NUL bytes"),
        ("x.txt", "secret".encode("utf-16-le"), r"NUL bytes"),
        ("x.txt", b"secret" * 20_000 + b"\x00", r"line 1: not text \(NUL bytes\)"),
        ("x.csv", b"id,text\n1,a\n" * 9_000 + b"2,secret\x00\n", r"line 18001: .*NUL bytes"),
        ("x.txt", bytes(range(1, 32)) + b"secret", r"control characters"),
        ("x.txt", b"secret \x81\x8d\x8f", r"line 1: not text \(neither UTF-8 nor cp1252\)"),
        ("x.txt", codecs.BOM_UTF16_LE + b"secret"[:5], r"broken UTF-16"),
        ("x.txt", codecs.BOM_UTF32_LE + "secret".encode("utf-32-le"), r"NUL bytes"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_the_remedy(tmp_path, name, data, reason):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=reason) as error:
        list(read_documents(path))
    message = str(error.value)
    assert str(path) in message and "save it as UTF-8 text" in message
    assert "\n" not in message and "secret" not in message


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text": "secret\n', "line 3: not valid JSON"),
        ("x.jsonl", '{"text": "a"}\n["secret"]\n', "line 2: expected a JSON object, got list"),
        ("x.jsonl", '[{"text": "secret"}]', "line 1: expected a JSON object, got list"),
        ("x.jsonl", '{"text": ["secret"]}', "line 1: 'text' must be a string, got list"),
        ("x.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: not valid JSON (bad number)"),
        ("x.jsonl", '{"text": ' + "[" * 200_000, "line 1: JSON is nested too deeply"),
        ("x.csv", 'id,text\n1,a\n2,"secret\n3,b\n', "record 2: a quote is opened and never"),
        ("x.csv", "id,text\n1,a\n2,secret,more\n", "record 2: 3 fields under 2 columns"),
        ("x.csv", 'id,text\n1,"secret" is\n', "record 1: ',' expected after '\"'"),
        # A name of a test must not hold the second in which it was collected.
        ("x.txt.gz", gzip.compress(b"secret " * 99, mtime=0)[:-9], "damaged or incomplete .gz"),
        ("y.txt.gz", b"secret", "damaged or incomplete .gz"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    message = refusal(path)
    assert str(path) in message and reason in message


def test_trailing_separators_are_no_extra_fields(tmp_path):
    assert texts(write(tmp_path / "x.csv", "id,text\n1,a,,\n2,b,\n")) == ["a", "b"]


def test_an_empty_corpus_lists_the_suffixes_read(tmp_path):
    for folder in (tmp_path, write(tmp_path / "x" / "notes.pdf", b"%PDF").parent):
        message = refusal(folder)
        assert all(suffix in message for suffix in (".txt", ".jsonl", ".csv", ".tsv", ".gz"))
    assert ".txt" in refusal(tmp_path / "x" / "notes.pdf")
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    write(tmp_path / "empty.txt", "  ")
    assert "every file or record there is empty" in refusal(tmp_path)


def test_what_is_wrong_with_the_folder_is_said_before_reading(tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "z.csv", "id,body\n1,x\n")
    with pytest.raises(ValueError, match="z.csv has no column"):
        read_documents(tmp_path)  # never iterated


# Long fields, streaming


def test_long_fields_are_read_and_the_limit_of_the_process_is_left_alone(tmp_path, monkeypatch):
    long = "word " * 60_000
    assert len(long) > csv.field_size_limit()
    path = write(tmp_path / "x.csv", f"id,text\n1,{long}\n2,b\n")
    before = csv.field_size_limit()
    documents = read_documents(path)
    assert next(documents).text == long
    assert csv.field_size_limit() == before
    assert next(documents).text == "b"
    monkeypatch.setattr(module, "LONGEST_FIELD", 1000)
    assert "record 1: field larger than field limit" in refusal(path)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl.gz"])
def test_a_big_file_is_not_read_whole(tmp_path, name):
    line = "1,one two three\n" if name == "x.csv" else '{"text": "one two three"}\n'
    path = write(tmp_path / name, ("id,text\n" if name == "x.csv" else "") + line * 100_000)
    code = (
        "import sys, tracemalloc; from train.corpora.readers.text import read_documents; "
        "tracemalloc.start(); n = sum(1 for _ in read_documents(sys.argv[1])); "
        "print(n, tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    count, peak = map(int, done.stdout.split())
    assert count == 100_000
    assert peak < 800_000  # bytes; the lines are 1,600,000 and more


# Real folders


@pytest.mark.parametrize(
    ("folder", "column", "count", "first"),
    [
        ("aci_bench", "note", 87, "data/challenge_data/train.csv:1"),
        ("simulated_resp_interviews", None, 90, "Data/Clean Transcripts/CAR0001.txt:1"),
        ("mtsamples", None, 293, "mtsamples.csv:1"),
        ("medqa", "question", 600, "data_clean/questions/US/test.jsonl:1"),
    ],
)
def test_real_folders(shared, folder, column, count, first):
    documents = list(read_documents(shared / "data" / folder, text_column=column))
    assert len(documents) == count == len({document.id for document in documents})
    assert documents[0].id == first
    assert not any("\r" in document.text or "\ufffd" in document.text for document in documents)


def test_negex_is_a_table_in_spite_of_its_suffix(shared, tmp_path):
    source = shared / "data" / "negex" / "rsAnnotations-1-120-random.txt"
    shutil.copyfile(source, tmp_path / "negex.tsv")
    documents = list(read_documents(tmp_path, text_column="Sentence"))
    lines = source.read_text(encoding="utf-8").splitlines()[1:]
    assert len(documents) == len(lines) == 2376
    # Plain splitting is right for every line without quotes.
    plain = [i for i, line in enumerate(lines) if '"' not in line]
    assert len(plain) > 2000
    assert all(documents[i].text == lines[i].split("\t")[2] for i in plain)
