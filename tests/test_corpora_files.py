"""The files of a corpus: links, names and changes, and the layouts of Hugging Face data sets."""

import contextlib
import gzip
import os
import pathlib
from typing import Any

import pytest

from train.corpora.build import prepare as stages, tokenize
from train.corpora.build.bpe import train_bpe
from train.corpora.readers.text import read_documents
from train.corpora.source import Report, Source
from train.corpora.sources import find, generic, primock57, reflacx

LATIN = os.fsdecode(b"caf\xe9.txt")  # a name in Latin-1


def texts_of(source: Source, root: pathlib.Path) -> dict[str, str]:
    parts = source.parts(root)
    return {e.id: e.text for part in parts for e in source.read(part, root, Report())}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    root.mkdir()
    (tmp_path / "elsewhere" / "deep" / "a.txt").write_text("Linked.")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")  # twice is no cycle
    (root / ".hidden").symlink_to(root)
    (root / "b.txt").write_text("Fever.")
    (root / LATIN).write_text("Cough.")
    return root


def test_linked_folders_and_names_in_another_encoding(folder):
    expected = {
        "again/deep/a.txt:1": "Linked.",
        "b.txt:1": "Fever.",
        "caf\\xe9.txt:1": "Cough.",
        "linked/deep/a.txt:1": "Linked.",
    }
    assert texts_of(generic("text"), folder) == expected
    assert {d.id: d.text for d in read_documents(folder)} == expected


def test_what_links_cannot_be(folder):
    broken = folder / "gone.txt"
    broken.symlink_to(folder / "nowhere.txt")
    with pytest.raises(OSError, match="gone.txt"):
        texts_of(generic("text"), folder)
    broken.unlink()
    (folder / "linked" / "deep" / "up").symlink_to(folder)
    for source in (generic("text"), find("mtsamples")):
        with pytest.raises(ValueError, match="up: expected no link to a folder that it is in"):
            source.parts(folder)


def test_a_corpus_that_changed(folder, tmp_path):
    """An edit of equal length is noticed; a copy with other times is the same corpus."""
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"
    train_bpe(["Fever. Cough."], 270).save_pretrained(tokenizer)
    command = {"tokenizer": str(tokenizer), "out": str(out), "eval_fraction": 0.0, "workers": 1}
    line = stages.prepare(str(folder), **command)
    assert "3 documents of 4 records (1 duplicates)" in line
    (shard,) = (out / "text").rglob("*-train.array_record-*")
    assert "caf\\xe9.txt:1" in dict(tokenize.read_shard(shard))
    (folder / "b.txt").write_text("Fewer.")
    with pytest.raises(ValueError, match="text was made with files .*; delete the folder"):
        stages.prepare(str(folder), **command)
    (folder / "b.txt").write_text("Fever.")
    os.utime(folder / "b.txt", (1, 1))
    assert stages.prepare(str(folder), **command) == line


def test_files_beside_the_parts_belong_to_the_corpus(tmp_path):
    (tmp_path / "main_data" / "x").mkdir(parents=True)
    (tmp_path / "main_data" / "metadata_phase_1.csv").write_text("id\nx\n")
    (tmp_path / "main_data" / "x" / "transcription.txt").write_text("Clear.")
    names = [path.name for path in reflacx.SOURCE.files_read(tmp_path)]
    assert names == ["metadata_phase_1.csv", "transcription.txt"]
    (tmp_path / "transcripts").mkdir()
    for who in ("doctor", "patient"):
        (tmp_path / "transcripts" / f"day1_consultation01_{who}.TextGrid").write_text("")
    names = [path.name for path in primock57.DIALOGUE.files_read(tmp_path)]
    assert names == [f"day1_consultation01_{who}.TextGrid" for who in ("doctor", "patient")]


# Hugging Face


def data_set(*texts: str):
    import datasets

    return datasets.Dataset.from_list([{"n": i, "text": text} for i, text in enumerate(texts)])


def test_save_to_disk(tmp_path):
    import datasets

    data_set("a", "b").save_to_disk(tmp_path / "one")
    # A filter leaves a cache beside the data.
    datasets.load_from_disk(str(tmp_path / "one")).filter(lambda row: row["n"] == 1)
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    source = find("huggingface")
    assert list(texts_of(source, tmp_path / "one").values()) == ["a", "b"]
    assert not source.remark(tmp_path / "one")
    splits: Any = {"train": data_set("c"), "test": data_set("d"), "validation": data_set("e")}
    both = datasets.DatasetDict(splits)
    both.save_to_disk(tmp_path / "both")
    assert list(texts_of(source, tmp_path / "both").values()) == ["c"]
    assert source.remark(tmp_path / "both") == (
        "huggingface: 1 files of the split train are read; left out: 1 of test, 1 of validation"
    )


@pytest.mark.parametrize(
    "names",
    [
        "data/train-00000-of-00001 data/test-00000-of-00001 data/unsupervised-00000-of-00001",
        "train/0 dev/0 other/c",
        "test/train train/test",
        "my_train_set my-eval notes",
        "a/b b/c",
        "test/a training/b",
        "valid val_1",
    ],
)
def test_only_the_split_train_is_read(tmp_path, names):
    """Against the splits that `datasets` finds in the same folder."""
    from datasets import data_files

    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data_set(name).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    source = find("huggingface")
    patterns = data_files.get_data_patterns(str(tmp_path))
    if "train" not in patterns:
        with pytest.raises(ValueError, match="expected a split train, found val"):
            source.parts(tmp_path)
        return
    files = set()
    for pattern in patterns["train"]:
        with contextlib.suppress(FileNotFoundError):
            files |= set(data_files.resolve_pattern(pattern, str(tmp_path)))
    assert set(map(str, source.parts(tmp_path))) == files


def test_tables_of_hugging_face_data_sets(tmp_path):
    """Compressed, with a BOM, with what pyarrow refuses and what pandas takes for nothing."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "x\\ud800"}\n'))
    (tmp_path / "b.csv").write_bytes("text\nNA\n".encode("utf-8-sig"))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'[{"n": 1}, {"text": "c"}]'))
    assert texts_of(find("huggingface"), tmp_path) == {
        "a.jsonl.gz:1": "a", "a.jsonl.gz:2": "x\ufffd", "b.csv:1": "NA", "c.json.gz:2": "c",
    }  # fmt: skip
    (tmp_path / "d.xml").write_text("")
    with pytest.raises(ValueError, match="d.xml: expected a folder, or a file of .parquet"):
        find("huggingface").parts(tmp_path / "d.xml")
