"""python -m train decontaminate: finds documents of a corpus that share word spans with a test set.

A span is 13 consecutive words: runs of letters, digits and "_", in NFC and lower case, with
anything between them. The test set's spans are kept as 64-bit hashes; a document is hashed only
where all words of a span occur somewhere in the test set. The report has ids and counts, never any
text.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from ...common.parallel import run_all
from ...common.records import read_object
from ...common.settings import check_set
from ...tokens.store import is_store, open_store
from ..build.tokenize import read_shard
from ..readers.text import find_files, read_documents, read_file

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that every word of a span affects its hash
_CHUNKS = 20_000  # of a token folder, for one worker at a time
_NAMED = 5  # ids of the test set on one line of the report


@dataclasses.dataclass(frozen=True)
class Spans:
    """The spans of a test set.

    words: a number from 1 for each word in it. values: uint64 [words + 1]. hashes: uint64, sorted,
    one for each (span, document) pair; documents: int32, the document of each.
    """

    length: int
    words: dict[str, int]
    values: np.ndarray
    hashes: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, texts: Iterator[str], length: int) -> "Spans":
        """Computes the spans of documents. length: words in a span."""
        words: dict[str, int] = {}
        ids = [
            np.array([words.setdefault(w, len(words) + 1) for w in _words(text)], np.int64)
            for text in texts
        ]
        values = np.random.default_rng(0).integers(0, 2**64, len(words) + 1, np.uint64)
        hashes = [np.unique(_hashes(document, values, length)) for document in ids]
        owners = np.repeat(np.arange(len(ids), dtype=np.int32), [len(h) for h in hashes])
        joined = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(joined, kind="stable")
        return cls(length, words, values, joined[order], owners[order])

    def shared(self, text: str) -> tuple[int, list[int]]:
        """Counts the positions where one of the spans starts; lists the documents that have it."""
        ids = np.array([self.words.get(word, 0) for word in _words(text)], np.int64)
        hashes = _hashes(ids, self.values, self.length)
        if not len(hashes) or not len(self.hashes):
            return 0, []
        first = np.searchsorted(self.hashes, hashes)
        last = np.searchsorted(self.hashes, hashes, side="right")
        documents = {int(d) for a, b in zip(first, last, strict=True) for d in self.documents[a:b]}
        return int((last > first).sum()), sorted(documents)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def _hashes(ids: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """The hashes of the spans without an unknown word (0)."""
    if len(ids) < length:
        return np.zeros(0, np.uint64)
    unknown = np.concatenate([[0], np.cumsum(ids == 0)])
    positions = np.flatnonzero(unknown[length:] == unknown[:-length])
    hashes = np.zeros(len(positions), np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + values[ids[positions + offset]]
    return hashes


@dataclasses.dataclass(frozen=True)
class Part:
    """The input of one worker: a shard of text, a file, or some chunks of a token folder."""

    path: pathlib.Path
    report: pathlib.Path
    split: str = ""
    chunks: tuple[int, int] = (0, 0)
    name: str = ""  # of a file


def decontaminate(
    corpus: str,
    task: str,
    task_column: str | None = None,
    text_column: str | None = None,
    tokenizer: str | None = None,
    out: str | None = None,
    words: int = 13,
    workers: int = 0,
) -> str:
    """Finds documents of a corpus that share word spans with a test set. Returns a summary.

    Args:
        corpus: an output of `prepare`, or a folder or file of text; tokens alone need a tokenizer.
        task: the test set: a file or folder of .txt, .jsonl, .csv, .tsv or .parquet.
        task_column: its text column; None: text, notes, note, ...
        text_column: text column of the corpus, if it is a table or .jsonl.
        tokenizer: folder or hub id, for a token folder without its text.
        out: file for the report: a line of JSON for each document found, with ids and counts.
        words: number of words in a span.
        workers: number of processes; 0 starts one for each core.
    """
    check_set(task_column=task_column, text_column=text_column, tokenizer=tokenizer, out=out)
    if words < 1:
        raise ValueError(f"words: expected at least 1, got {words}")
    names = []

    def texts() -> Iterator[str]:
        for document in read_documents(task, text_column=task_column):
            names.append(document.id)
            yield document.text

    spans = Spans.of(texts(), words)
    short = len(names) - len(np.unique(spans.documents))
    with tempfile.TemporaryDirectory() as folder:
        parts = _parts(pathlib.Path(corpus), text_column, tokenizer, pathlib.Path(folder))
        decoder = ""
        if tokenizer is not None and any(part.split for part in parts):
            decoder = _decoder(tokenizer)
        find = functools.partial(_find, spans, text_column, decoder)
        run_all(find, parts, "decontaminate", workers or len(os.sched_getaffinity(0)))
        total, touched = collections.Counter(), set()
        with open(out or os.devnull, "w", encoding="utf-8") as report:
            for part in parts:
                with part.report.open(encoding="utf-8") as lines:
                    for found in map(json.loads, lines):
                        if "id" not in found:
                            total["documents"] += found["documents"]
                            continue
                        total["found"] += 1
                        total["spans"] += found["spans"]
                        touched |= set(found["task"])
                        found["task_documents"] = len(found["task"])
                        found["task"] = [names[number] for number in found["task"][:_NAMED]]
                        report.write(json.dumps(found, ensure_ascii=False) + "\n")
    return (
        f"{total['found']:,} of {total['documents']:,} documents of {corpus} share {words}-word "
        f"spans with {task} ({total['spans']:,} positions); {len(touched):,} of its {len(names):,} "
        f"documents are affected ({short:,} are too short to check)"
        + ("" if out is None else f"; report: {out}")
    )


def _parts(
    corpus: pathlib.Path, text_column: str | None, tokenizer: str | None, folder: pathlib.Path
) -> list[Part]:
    reports = (folder / f"{number:06d}.jsonl" for number in range(10**9))
    for text in (corpus, corpus / "text", corpus.parent / "text"):
        facts = read_object(text / "manifest.json")
        # Text next to a token folder is used if the tokens were made from it.
        if "shards" in facts and (
            text.parent != corpus.parent
            or text == corpus
            or facts["sha256"] == read_object(corpus / "manifest.json").get("text_sha256")
        ):
            return [Part(text / shard["name"], next(reports)) for shard in facts["shards"]]
    if is_store(corpus):
        if tokenizer is None:
            raise ValueError(f"{corpus}: tokens without their text; pass --tokenizer to read them")
        return [
            Part(corpus, next(reports), split, (first, min(first + _CHUNKS, len(store.lengths))))
            for split, store in open_store(corpus).items()
            for first in range(0, len(store.lengths), _CHUNKS)
        ]
    files = find_files(corpus, text_column)
    return [Part(file.path, next(reports), name=file.name) for file in files]


def _decoder(tokenizer: str) -> str:
    from modernbert_jax.tokenizer import AutoTokenizer, backend_json

    return backend_json(AutoTokenizer.from_pretrained(tokenizer))


def _find(spans: Spans, text_column: str | None, decoder: str, part: Part) -> None:
    documents = 0
    with part.report.open("w", encoding="utf-8") as report:
        for name, text in _texts(part, text_column, decoder):
            documents += 1
            positions, found = spans.shared(text)
            if positions:
                report.write(json.dumps({"id": name, "spans": positions, "task": found}) + "\n")
        report.write(json.dumps({"documents": documents}) + "\n")


def _texts(part: Part, text_column: str | None, decoder: str) -> Iterator[tuple[str, str]]:
    if part.split:
        backend = tokenizers.Tokenizer.from_str(decoder)
        store: Any = open_store(part.path)[part.split]
        for first in range(*part.chunks, 256):
            numbers = np.arange(first, min(first + 256, part.chunks[1]))
            texts = backend.decode_batch([ids.tolist() for ids in store.read(numbers)])
            yield from ((f"{part.split}:{n}", t) for n, t in zip(numbers, texts, strict=True))
    elif part.name:
        for file in find_files(part.path, text_column):
            for number, text in read_file(file):
                if text.strip():
                    yield f"{part.name}:{number}", text
    else:
        yield from read_shard(part.path)
