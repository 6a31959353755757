"""Text of a file never reaches stdout, stderr, a warning, an exception or a report.

A made-up name stands in every kind of file and place: header, key, label, cell, damaged lines.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
import traceback
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modernbert_jax.config import ModernBertConfig
from modernbert_jax.tokenizer import AutoTokenizer
from train import cli
from train.common.names import listed, shown_columns, shown_labels
from train.corpora.source import Report
from train.corpora.sources import find, sources
from train.finetune import run as finetuning
from train.finetune.config import FinetuneConfig
from train.finetune.retrieval.data import read_judged, read_records
from train.finetune.tasks import task_named
from train.finetune.tasks.task import with_shown_labels
from train.pretrain import setup
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.corpora import open_corpora
from train.tokens.store import open_store

MARK = "Zzyqname Qvornak"
NOTE = f"{MARK}, aged 72, was seen with a fever of 39 degrees."
TASKS = ("classification", "multilabel", "tokens", "qa", "chemprot", "phenotype", "cos",
         "social_history", "deid", "negex", "specialty")  # fmt: skip
# The official files of tasks.
FILES = ("train.tsv", "dev.tsv", "test.tsv", "ACTdb102003.csv", "NOTEEVENTS.csv", "id.text",
         "id.res", "rsAnnotations-1-120-random.txt", "mtsamples.csv", "1.ann", "1.txt")  # fmt: skip


def lines(*objects) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in objects).encode()


def table(*rows: str) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


CONTENTS = {
    "no header": table(f"{MARK},72,{NOTE}".replace(", ", " "), f"{MARK},73,other"),
    "no header, tabs": table(f"{MARK}\t72\t{NOTE}", f"{MARK}\t72\t{NOTE}"),
    "no header, short": table(f"{MARK},fever", "other,cough"),
    "header": table(f"text,{MARK},{MARK}", "a,b,c"),
    "header, long rows": table("text,label", f"a,{MARK},{MARK},{MARK}"),
    "header, short rows": table("text\tlabel\tother", MARK),
    "open quote": table("text,label", f'"{MARK}'),
    "wrong quote": table("text,label", f'"{NOTE}"{MARK},b'),
    "labels": table("text,label", *(f"t{i},{NOTE} {i}" for i in range(40))),
    "keys": lines({MARK: NOTE}, {MARK: 1}),
    "keys in data": lines({"data": [{MARK: [{"qas": MARK}]}]}),
    "lists": lines([MARK], MARK),
    "values": lines({"text": {MARK: NOTE}}, {"text": [MARK]}),
    "labels in lists": lines(*({"text": f"t{i}", "label": [NOTE]} for i in range(9))),
    "tags": lines({"words": [MARK], "labels": [MARK]}),
    "answers": lines({"question": MARK, "context": NOTE, "answer": MARK, "answer_start": MARK}),
    "damaged JSON": b'{"text": "' + NOTE.encode() + b'", ' + MARK.encode(),
    "damaged number": b'{"text": "' + NOTE.encode() + b'", "n": 1e' + MARK.encode() + b"}\n",
    "damaged XML": f"<PubmedArticleSet><PubmedArticle>{NOTE}<{MARK}></PubmedArticle>".encode(),
    "XML": f"<article><body><p>{NOTE}</p></body></article>".encode(),
    "entities": f"<!DOCTYPE a [<!ENTITY Qvornak '{MARK}'>]><a><b>&Qvornak;</b></a>".encode(),
    "brat": f"T1\t{MARK} 0 16\t{MARK}\nT2\tQvornak 0 900\t{NOTE}\n".encode(),
    "conll": f"{MARK}\n\n{MARK.replace(' ', '_')} {MARK}\n".encode(),
    "records": f"START_OF_RECORD={MARK}||||1||||{NOTE}||||END_OF_RECORD".encode(),
    "grid": f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n{NOTE}'.encode(),
    "text": NOTE.encode(),
    "NUL": NOTE.encode() + b"\0\0",
    "no encoding": b"text,label\n" + NOTE.encode() + b" \x81\n",
    "UTF-16": b"\xff\xfe" + NOTE.encode("utf-16-le") + b"\x00\xd8\x00",
    "gzip": gzip.compress(NOTE.encode() * 9)[:-9],
}  # fmt: skip


class Seen:
    """Collects what a block writes, warns and raises."""

    def __init__(self, capfd):
        self.capfd, self.text = capfd, ""

    @contextlib.contextmanager
    def __call__(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except (ValueError, OSError) as error:
                self.text += "".join(traceback.format_exception(error))
            self.text += "".join(f"{one.message}\n" for one in caught)
        self.text += "".join(self.capfd.readouterr())

    def check(self, *folders: pathlib.Path) -> None:
        """Nothing was seen, and nothing is in the reports in these folders."""
        found = {"what was printed or raised": self.text}
        for folder in folders:
            for path in folder.rglob("*"):
                found[str(path.relative_to(folder))] = ""
                if path.is_file() and ".array_record" not in path.name and path.suffix != ".npy":
                    found[str(path.relative_to(folder))] = path.read_text("latin-1")
        for name, text in found.items():
            text = (name + text).lower()
            assert "zzyq" not in text and "qvornak" not in text, f"{name}: {text[-3000:]}"
        self.text = ""


@pytest.fixture
def seen(capfd):
    return Seen(capfd)


@pytest.mark.parametrize("kind", CONTENTS)
def test_no_reader_of_a_corpus_shows_text(kind, tmp_path, seen):
    for source in [*sources(), find("text", "body")]:
        for pattern in (*source.files, *source.beside):
            path = tmp_path / source.name / pattern.replace("*", "1").lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = CONTENTS[kind]
            packed = path.suffix == ".gz" and kind != "gzip"
            path.write_bytes(gzip.compress(content) if packed else content)
        root = tmp_path / source.name
        parts = []
        with seen():
            parts = source.parts(root)
        for part in parts:
            report = Report()
            with seen():
                for example in source.read(part, root, report):
                    seen.text += example.id
            seen.text += f"{report.dropped} {report.places}"
        seen.check()


@pytest.mark.parametrize("kind", CONTENTS)
def test_no_task_shows_text(kind, tmp_path, seen):
    content = CONTENTS[kind]
    names = {"classification": [], "multilabel": [], "tokens": [], "qa": []}
    for task in TASKS:
        for suffix in names.get(task, ["folder"]) or [
            "csv",
            "tsv",
            "jsonl",
            "json",
            "txt",
            "conll",
        ]:
            path = tmp_path / f"{task}.{suffix}"
            if suffix == "folder":
                path.mkdir()
                for name in FILES:
                    (path / name).write_bytes(content)
            else:
                path.write_bytes(content)
            with seen():
                data = with_shown_labels(task_named(task).load(path), str(path))
                seen.text += f"{data.labels} {data.skipped} {data.kept}"
    folder = tmp_path / "retrieval"
    folder.mkdir()
    for name in ("train.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        (folder / name).write_bytes(content)
    for fields in (("query", "positive"), ("text",)):
        with seen():
            read_records(folder / "train.jsonl", *fields)
    with seen():
        read_judged(folder)
    (folder / "corpus.jsonl").write_bytes(lines({"_id": "1", "text": "a"}))
    (folder / "queries.jsonl").write_bytes(lines({"_id": "1", "text": "a"}))
    with seen():
        read_judged(folder)
    folder = tmp_path / "brat"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text(NOTE)
        (folder / f"{number}.ann").write_bytes(content)
    with seen():
        data = with_shown_labels(task_named("tokens").load(folder), str(folder))
        seen.text += f"{data.labels} {data.skipped} {data.kept}"
    seen.check()


@pytest.mark.parametrize("damage", [b"", b"\xff", b"cut"])
def test_no_table_of_arrow_shows_text(damage, tmp_path, seen):
    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({MARK: [NOTE] * 9, "text": [{MARK: 1}] * 9}), made)
    data = made.getvalue()
    data = (
        data[:-9] if damage == b"cut" else data.replace(b"Zzyq", b"\xff" * 4 if damage else b"Zzyq")
    )
    for name in ("x.parquet", "x.arrow", "y.json"):
        (tmp_path / name).write_bytes(CONTENTS["damaged JSON"] if name == "y.json" else data)
        source = find("huggingface")
        with seen():
            list(source.read(tmp_path / name, tmp_path, Report()))
    assert "Failed to load" not in seen.text  # what `datasets` logs contains pyarrow's message
    for task in TASKS[:3]:
        with seen():
            task_named(task).load(tmp_path / "x.parquet")
    seen.check()


def test_no_folder_of_tokens_shows_its_columns(tmp_path, seen):
    columns = {"column_names": [MARK, "id"], "column_encodings": [NOTE, "pkl"]}
    shard = {"version": 2, "format": "mds", "raw_data": {"basename": "x"}, **columns}
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    with seen():
        open_store(tmp_path)
    assert f"got column 1 (16 characters) label 1 ({len(NOTE)} characters), 'id' pkl" in seen.text
    seen.check()


def test_prepare_shows_no_text(tmp_path, small_tokenizer, seen):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    for kind, suffix in [
        ("no header", "csv"), ("no header, tabs", "tsv"), ("keys", "jsonl"), ("open quote", "csv"),
        ("damaged JSON", "jsonl"), ("NUL", "txt"), ("text", "txt"),
    ]:  # fmt: skip
        corpus, out = tmp_path / "corpora" / kind, tmp_path / "out" / kind
        corpus.mkdir(parents=True)
        (corpus / f"x.{suffix}").write_bytes(CONTENTS[kind])
        command = f"prepare --workers 1 --tokenizer {tmp_path / 'tokenizer'}".split()
        with seen():
            code = cli.main([*command, "--source", str(corpus), "--out", str(out)])
            assert code == (0 if kind == "text" else 2)
        report = tmp_path / "out" / f"{kind}.jsonl"
        command = f"decontaminate --workers 1 --words 3 --task {corpus} --corpus".split()
        with seen():
            cli.main([*command, str(corpus), "--out", str(report)])
        seen.check(tmp_path / "out")
    with seen():
        assert cli.main(["mixture", "--prepared", str(tmp_path / "out" / "text")]) == 0
    seen.check()


def test_pretraining_shows_no_text_of_a_note(tmp_path, seen):
    """Also not in the tokenizer that it trains."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(301):
        (corpus / f"{number}.txt").write_text(f"Note {number}: no fever, no cough. Plan: rest.")
    (corpus / "7.txt").write_text(f"{NOTE} {NOTE} {MARK} {MARK}")
    config = TrainConfig(
        model=ModernBertConfig.tiny(vocab_size=4096), corpus=(str(corpus),), sequence_length=64,
        phases=(Phase("one", tokens=100),), eval_fraction=0.1, workdir=str(tmp_path / "run"),
    )  # fmt: skip
    with seen():
        workdir = setup.open_workdir(config)
        assert len(setup.prepare(config, workdir)) < 500
        open_corpora(config, workdir)
    seen.check(tmp_path / "run")
    (corpus / "x.csv").write_bytes(CONTENTS["no header"])
    with seen():
        setup.prepare(config, workdir)
        open_corpora(config, workdir)
    seen.check(tmp_path / "run")


class Backend:
    """Answers at random, in place of a model."""

    labels: tuple = ()

    def __init__(self, config, kind, labels):
        self.tokenizer, self.max_length = AutoTokenizer.from_pretrained(config.model), 64
        Backend.labels = tuple(labels)

    def start(self, config, seed):
        return self

    def step(self, batches, learning_rate):
        return 1.0

    def predict(self, batch):
        return [np.arange(len(self.labels)) * 1.0 for _ in batch]

    def weights(self):
        return {}

    def load(self, weights):
        pass


def test_labels_that_look_like_text_are_not_written(tmp_path, small_tokenizer, seen, monkeypatch):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(finetuning, "JaxBackend", Backend)
    # One label is a name, but once only; others occur again.
    names = ["Follow-up visit", f"by {MARK}, aged 72", "0", f"{MARK}|", "Pain (chronic)"]
    rows = [f't {i},"{names[i % 5]}"' for i in range(60)]
    (tmp_path / "x.csv").write_bytes(table("text,label", *rows, f"t,{MARK}"))
    config = FinetuneConfig(
        "classification", str(tmp_path / "x.csv"), str(tmp_path / "tokenizer"),
        str(tmp_path / "out"), seeds=(1,), epochs=1, save_model=False,
    )  # fmt: skip
    with seen():
        finetuning.finetune(config)
        hidden = [f"label {n} ({size} characters)" for n, size in ((4, 16), (5, 17), (6, 28))]
        assert Backend.labels == ("0", "Follow-up visit", "Pain (chronic)", *hidden)
    assert "| label 5 (17 characters) |" in (tmp_path / "out" / "table.md").read_text()
    seen.check(tmp_path / "out")
    allowed = dataclasses.replace(config, allow_long_labels=True, out=str(tmp_path / "open"))
    summary = finetuning.finetune(allowed)
    assert summary["labels"] == sorted([*names, MARK]) == list(Backend.labels)
    assert f"| {MARK}\\| |" in (tmp_path / "open" / "table.md").read_text()


@pytest.mark.parametrize(
    "task, content, expected",
    [
        ("classification", table("text,label", *(f"t{i},{'x' * 65 * (i % 2)}y" for i in range(9))),
         "at most 64 characters, label 1 of 2 has 66"),
        ("classification", table("text,label", *(f"t{i},Qvornak{i % 31}" for i in range(60))),
         "again and again, got 31 in 60 examples"),
        ("multilabel", table("text,labels", *(f"t{i},a|{'y' * (64 + i % 2)}" for i in range(30))),
         "at most 64 characters, label 3 of 3 has 65"),
        ("tokens", table(*(f"w{i} B-Qvornak{i}\n" for i in range(42))),
         "again and again, got 42 in 42 words"),
    ],
)  # fmt: skip
def test_labels_that_are_text_are_refused(task, content, expected, tmp_path):
    path = tmp_path / ("x.conll" if task == "tokens" else "x.csv")
    path.write_bytes(content)
    data = task_named(task).load(path)
    with pytest.raises(ValueError, match=expected) as caught:
        with_shown_labels(data, "x.csv")
    assert "--allow-long-labels" in str(caught.value) and "Qvornak" not in str(caught.value)
    assert with_shown_labels(data, "x.csv", allow_long_labels=True) is data


def test_names_that_are_shown():
    good = ["id", "note_text", "ROW_ID", "sentence1", "ADVANCED.CANCER", "Größe", "x-y", "_id"]
    assert shown_columns(good) == [repr(name) for name in good]
    for name in ("Jane Doe", "a,b", "MRN00123456", "a_b_c_d_e", "x" * 33, "診断", "", "a:b"):
        assert shown_columns(["id", name]) == ["'id'", f"column 2 ({len(name)} characters)"]
    for cell in ("72", "he has a cough", "2024-01-02", "a\nb", "?", "x" * 65):
        assert "no header" not in listed(["Doe", cell])
        assert "'Doe'" not in listed(["Doe", cell]) and "column 1 (3" in listed(["Doe", cell])
    phrases = ("CPR:3", "SOAP / Chart / Progress Notes", "IME-QME-Work Comp etc.", "12", "糖尿病")
    assert shown_labels(phrases) == phrases
    assert shown_labels(("Jane Doe", "Jane"), rare=("Jane Doe", "Jane")) == (
        "label 1 (8 characters)", "Jane",
    )  # fmt: skip
    long_type = "x" * 49
    tags = ("B-" + long_type, "B-Drug", "I-" + long_type, "O")
    hidden = "label 1 (49 characters)"
    assert shown_labels(tags, tags=True) == ("B-" + hidden, "B-Drug", "I-" + hidden, "O")
