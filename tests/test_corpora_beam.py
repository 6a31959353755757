"""The Beam pipeline against the reading on one machine: the same documents in the same splits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.xml_files import article, deletion, jats, package, write

pytest.importorskip("apache_beam", reason="needs the extra beam")
pytest.importorskip("tensorflow_datasets", reason="needs the extra train")

import tensorflow_datasets as tfds

from train.corpora.build import beam, dataset as builder
from train.corpora.build.bpe import train_bpe
from train.corpora.source import Report
from train.corpora.sources import pmc, pubmed
from train.tokens.store import open_store

# 2026-11-22: TFDS 4.9.10 asks protobuf 6 for what protobuf 7 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning")
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
WORKERS = ("direct_num_workers=2", "direct_running_mode=multi_processing")
EVAL = 0.3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["Number 1. Text 2."], 300).save_pretrained(folder)
    return folder


def run(corpus: str, root: pathlib.Path, out: pathlib.Path, tokenizer, *options: str):
    command = [sys.executable, "-m", "train", "prepare", "--corpus", corpus]
    command += ["--source", str(root), "--out", str(out), "--tokenizer", str(tokenizer)]
    command += ["--eval-fraction", str(EVAL), "--beam", "runner=DirectRunner", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def contents(folder: str | pathlib.Path) -> dict[str, list[tuple]]:
    """(id, text, source, meta) of all documents of each split, by id."""
    found = tfds.builder_from_directory(folder)
    return {
        split: sorted(
            tuple(document[name].decode() for name in ("id", "text", "source", "meta"))
            for document in found.as_data_source(split=split)
        )
        for split in found.info.splits
    }


def pubmed_files(root: pathlib.Path) -> pathlib.Path:
    """Revisions, deletions, versions, and equal texts within a file and across files."""
    records = [article(n, f"Number {n % 40}.") for n in range(1, 61)]
    write(root / "z" / "pubmed26n0001.xml.gz", *records, article(61, ""))
    write(
        root / "z" / "pubmed26n0002.xml.gz",
        *(article(n, f"Number {n}.") for n in range(30, 45)),
        article(90, "One.", 1),
        article(90, "Two.", 2),
        article(91, "One.", 2),
    )
    write(root / "a" / "pubmed26n0003.xml.gz", deletion((3, 1), (90, 2)), article(91, "Late.", 1))
    return root


def pmc_files(root: pathlib.Path) -> pathlib.Path:
    root.mkdir()
    for name, first, last, text in (
        ("oa_comm_xml.PMC000xxxxxx.baseline.2026-01-01.tar.gz", 1, 40, "Text {}."),
        ("oa_comm_xml.incr.2026-01-02.tar.gz", 30, 45, "New {}."),
    ):
        articles = [
            (f"x/PMC{n}.xml", jats(str(n), f"<p>{text.format(n)}</p>")) for n in range(first, last)
        ]
        package(root / name, *articles, ("x/PMC99.xml", b"<broken>"))
    (root / "alone.nxml").write_bytes(jats("77"))
    return root


def compare(source, root: pathlib.Path, tmp_path: pathlib.Path, *arguments) -> None:
    out = tmp_path / "beam"
    done = run(source.name, root, out, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    folder, counts = builder.build(source, root, tmp_path / "one", tmp_path / "work", EVAL)
    expected = contents(folder)
    assert contents(out / "text" / source.name / builder.VERSION) == expected
    assert len(expected["train"]) > len(expected["eval"]) > 3
    found = json.loads((out / "text" / "manifest.json").read_text())
    for name in ("read", "dropped", "documents", "duplicates", "train", "eval"):
        assert found[name] == counts[name]
    assert len(open_store(out)["eval"].lengths) == counts["eval"]  # one chunk for each document


def test_pubmed_in_two_processes(tokenizer, tmp_path):
    root = pubmed_files(tmp_path / "pubmed")
    compare(pubmed.SOURCE, root, tmp_path, tokenizer, *WORKERS)


@pytest.mark.slow
def test_pmc_in_two_processes(tokenizer, tmp_path):
    compare(pmc.SOURCE, pmc_files(tmp_path / "pmc"), tmp_path, tokenizer, *WORKERS)


def test_pmc(tokenizer, tmp_path):
    compare(pmc.SOURCE, pmc_files(tmp_path / "pmc"), tmp_path, tokenizer)


def test_a_broken_file_stops_the_pipeline_with_its_line(tokenizer, tmp_path):
    root = pubmed_files(tmp_path / "pubmed")
    path = root / "a" / "pubmed26n0003.xml.gz"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("pubmed", root, tmp_path / "beam", tokenizer)
    assert done.returncode != 0 and f"{path}: expected md5" in done.stderr
    assert not list((tmp_path / "beam").rglob("dataset_info.json"))


def test_parts_of_a_bucket_are_copied_while_they_are_read(tmp_path):
    root = pubmed_files(tmp_path / "pubmed")
    part = beam.parts_of(pubmed.SOURCE, os.fspath(root))[0]
    assert part == (0, 2, "a/pubmed26n0003.xml.gz")  # first by name, newest
    seen = []

    def read(path: pathlib.Path, folder: pathlib.Path, report: Report):
        seen.append(folder)
        assert path.with_name(path.name + ".md5").exists() and not path.is_relative_to(root)
        return pubmed.read(path, folder, report)

    copying = pubmed.SOURCE.__class__(**{**vars(pubmed.SOURCE), "read": read})
    copied = list(beam.read_part(copying, os.fspath(root), True, part))
    direct = list(beam.read_part(pubmed.SOURCE, os.fspath(root), False, part))
    assert copied[0] == direct[0] and len(copied) == len(direct) == 2
    assert seen and not seen[0].exists()
