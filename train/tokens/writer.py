"""Writes a token folder: shards of token ids, their lengths and, last, the manifest."""

from __future__ import annotations

import array
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)
)

from ..common.records import write_object
from .store import LAYOUT

SHARD_BYTES = 1 << 30  # of ids, after which the next shard begins


def cut(
    ids: Sequence[int] | np.ndarray, ends: tuple[int, int], sequence_length: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Cuts a document into chunks of at most sequence_length tokens.

    ids: the document without special tokens. ends: the ids of [CLS] and [SEP], which begin and end
    each chunk.
    """
    document = np.asarray(ids, dtype)
    for first in range(0, len(document), sequence_length - 2):
        part = document[first : first + sequence_length - 2]
        chunk = np.empty(len(part) + 2, dtype)
        chunk[0], chunk[1:-1], chunk[-1] = ends[0], part, ends[1]
        yield chunk


def write_manifest(
    folder: pathlib.Path,
    documents: int,
    tokenizer: str,
    dtype: np.dtype,
    splits: dict[str, dict[str, Any]],
    more: dict[str, Any] | None = None,
) -> None:
    """Completes a token folder.

    tokenizer: its fingerprint. splits: what each SplitWriter.close returned. more: further entries.
    """
    manifest = {"layout": LAYOUT, "documents": documents, "tokenizer": tokenizer}
    manifest |= {"dtype": dtype.name, **splits, **(more or {})}
    write_object(folder / "manifest.json", manifest, indent=2)


class SplitWriter:
    """Writes the chunks of one split into shards; `close` returns its part of the manifest."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.lengths = array.array("i")
        self.digest = hashlib.sha256()
        self.shards: list[tuple[pathlib.Path, int]] = []  # with the number of records
        self.writer: Any = None
        self.records = self.bytes = 0

    def add(self, ids: np.ndarray) -> None:
        """Writes one chunk."""
        if self.bytes >= SHARD_BYTES:
            self._end_shard()
        if self.writer is None:
            path = self.folder / f"{self.split}-{len(self.shards):05d}.part"
            # With groups of one, each record can be read without its neighbors.
            options = "group_size:1,uncompressed"
            self.writer = array_record_module.ArrayRecordWriter(os.fspath(path), options)
        record = ids.astype(self.dtype).tobytes()
        self.writer.write(record)
        self.digest.update(record)
        self.lengths.append(len(ids))
        self.records += 1
        self.bytes += len(record)

    def _end_shard(self) -> None:
        self.writer.close()
        path = self.folder / f"{self.split}-{len(self.shards):05d}.part"
        self.shards.append((path, self.records))
        self.writer, self.records, self.bytes = None, 0, 0

    def close(self) -> dict[str, Any]:
        """Gives the shards their names, writes the lengths; returns counts, sha256 and shards."""
        if self.records:
            self._end_shard()
        lengths = np.asarray(self.lengths, np.int32)
        np.save(self.folder / f"{self.split}.lengths.npy", lengths)
        self.digest.update(lengths.tobytes())
        shards = []
        for number, (path, records) in enumerate(self.shards):
            name = f"{self.split}-{number:05d}-of-{len(self.shards):05d}.array_record"
            path.rename(self.folder / name)
            size = (self.folder / name).stat().st_size
            shards.append({"name": name, "records": records, "bytes": size})
        return {
            "chunks": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "sha256": self.digest.hexdigest(),
            "shards": shards,
        }
