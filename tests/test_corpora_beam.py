"""The Beam pipeline against the reading on one machine: the same documents in the same splits."""

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
from train.corpora.source import Report
from train.corpora.sources import pmc, pubmed

# 2026-11-22: TFDS 4.9.10 asks protobuf 6 for what protobuf 7 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning")
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
EVAL = 0.3


def run(corpus: str, root: pathlib.Path, out: pathlib.Path, *options: str):
    command = [sys.executable, "-m", "train.corpora.build.beam", "--corpus", corpus]
    command += ["--source", str(root), "--out", str(out), "--eval-fraction", str(EVAL)]
    command += ["--", "--runner=DirectRunner", *options]
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


def compare(source, root: pathlib.Path, tmp_path: pathlib.Path, *options: str) -> None:
    done = run(source.name, root, tmp_path / "beam", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    folder, counts = builder.build(source, root, tmp_path / "one", tmp_path / "work", EVAL)
    expected = contents(folder)
    assert contents(tmp_path / "beam" / source.name / builder.VERSION) == expected
    assert len(expected["train"]) > len(expected["eval"]) > 3
    found = {
        name: int(count.replace(",", ""))
        for count, name in (
            words.strip().split(" ", 1)
            for words in done.stdout.strip().split("\n")[-1].split(": ", 1)[1].split(", ")
        )
    }
    dropped = {name.removeprefix("dropped: "): n for name, n in found.items() if ":" in name}
    assert dropped == counts["dropped"]
    assert found["documents"] == counts["documents"]
    assert found["read"] - sum(dropped.values()) - found["documents"] == counts["duplicates"]


def test_pubmed_in_two_processes(tmp_path):
    root = pubmed_files(tmp_path / "pubmed")
    compare(pubmed.SOURCE, root, tmp_path, *WORKERS)


@pytest.mark.slow
def test_pmc_in_two_processes(tmp_path):
    compare(pmc.SOURCE, pmc_files(tmp_path / "pmc"), tmp_path, *WORKERS)


def test_pmc(tmp_path):
    compare(pmc.SOURCE, pmc_files(tmp_path / "pmc"), tmp_path)


def test_a_broken_file_stops_the_pipeline_with_its_line(tmp_path):
    root = pubmed_files(tmp_path / "pubmed")
    path = root / "a" / "pubmed26n0003.xml.gz"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("pubmed", root, tmp_path / "beam")
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
