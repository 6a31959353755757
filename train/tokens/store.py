"""Opens folders of tokens, ours or MosaicML's MDS, and reads chunks by their number.

A token folder holds, for each of train and eval, shards `train-00000-of-00004.array_record` (a
record is the ids of one chunk, with [CLS] and [SEP]: little-endian uint16, or uint32 above 65,536
ids), `train.lengths.npy`, and `manifest.json`, which is written last and completes the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from typing import Any, Protocol

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)
)

from ..common.progress import Progress
from ..common.records import read_object
from .mds import MdsShards

SPLITS = ("train", "eval")
_AGAIN = "copy it again, or delete the folder and prepare the corpus again"
LAYOUT = "array_record 2"  # the version of a token folder; folders of another version are refused
_COUNTED = 5_000_000  # tokens that `counts` reads, about


class Chunks(Protocol):
    """Where chunks are read from. Can be pickled, for worker processes."""

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        """Returns the ids of these chunks, unsigned integers."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The chunks of one split, by number. A chunk is a document or a part of a long one.

    lengths: int32 [chunks], in tokens. fingerprint: sha256 of everything that determines the chunks
    and their order. tokenizer: fingerprint of the tokenizer that made the ids, "" if unknown.
    """

    lengths: np.ndarray
    fingerprint: str
    chunks: Chunks
    tokenizer: str = ""

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        """Returns the ids of these chunks. Raises ValueError that names a damaged file."""
        return self.chunks.read(chunks)

    def counts(self, vocab_size: int) -> np.ndarray:
        """Counts how often each token occurs: int64 [V].

        In a corpus of more than 5M tokens it counts every k-th chunk only.
        """
        every = max(1, int(self.lengths.sum(dtype=np.int64)) // _COUNTED)
        counts = np.zeros(vocab_size, np.int64)
        chosen = np.arange(0, len(self.lengths), every)
        for some in np.array_split(chosen, -(-len(chosen) // 1024)):
            ids = np.concatenate(self.read(some))
            counts += np.bincount(ids, minlength=vocab_size)[:vocab_size]
        return counts


@dataclasses.dataclass(frozen=True)
class _Subset:
    source: Chunks
    numbers: np.ndarray

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        return self.source.read(self.numbers[chunks])


@dataclasses.dataclass(frozen=True)
class _Joined:
    stores: tuple[TokenStore, ...]
    ends: np.ndarray

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        chunks = np.asarray(chunks)
        result: list[Any] = [None] * len(chunks)
        which = np.searchsorted(self.ends, chunks, side="right")
        for number in np.unique(which).tolist():
            positions = np.flatnonzero(which == number)
            store = self.stores[number]
            within = chunks[positions] - self.ends[number] + len(store.lengths)
            for position, ids in zip(positions.tolist(), store.read(within), strict=True):
                result[position] = ids
        return result


def joined(stores: list[TokenStore] | tuple[TokenStore, ...]) -> TokenStore:
    """Joins corpora, in this order. Raises ValueError if their tokenizers differ."""
    stores = tuple(stores)
    if len(stores) == 1:
        return stores[0]
    tokenizers = {store.tokenizer for store in stores} - {""}
    if len(tokenizers) > 1:
        raise ValueError(
            f"{len(stores)} corpora: expected one tokenizer, they were prepared with "
            f"{len(tokenizers)}; prepare them again with one"
        )
    return TokenStore(
        np.concatenate([store.lengths for store in stores]),
        hashlib.sha256(" ".join(store.fingerprint for store in stores).encode()).hexdigest(),
        _Joined(stores, np.cumsum([len(store.lengths) for store in stores])),
        next(iter(tokenizers), ""),
    )


# Opening


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether the path holds tokens, which `open_store` reads, rather than text."""
    folder = pathlib.Path(path)
    names = ("manifest.json", "tokens/manifest.json", "index.json", "train/index.json")
    return any((folder / name).is_file() for name in names)


def manifest_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the manifest of a token folder or of an output of `prepare`; {} for anything else."""
    for name in ("manifest.json", "tokens/manifest.json"):
        if (file := pathlib.Path(path) / name).is_file():
            return read_object(file, remedy=_AGAIN)
    return {}


def open_store(
    path: str | os.PathLike[str],
    eval_fraction: float = 0.05,
    cache: pathlib.Path | None = None,
) -> dict[str, TokenStore]:
    """Opens the splits train and eval of a token folder, an output of `prepare`, or an MDS folder.

    An MDS folder has its shards in train/ and eval/; if it has one set of shards, a hash of each
    chunk's ids decides its split. That reads the whole corpus, and the folder `cache` keeps the
    result. Raises ValueError with one line for a folder that is neither, or damaged.
    """
    folder = pathlib.Path(path)
    if (folder / "manifest.json").is_file():
        return _open_tokens(folder)
    if (folder / "tokens" / "manifest.json").is_file():
        return _open_tokens(folder / "tokens")
    if (folder / "index.json").is_file():
        return _split_by_hash(MdsShards(folder), eval_fraction, cache)
    if (folder / "train" / "index.json").is_file():
        train = MdsShards(folder / "train")
        if (folder / "eval" / "index.json").is_file():
            return {"train": _of_mds(train), "eval": _of_mds(MdsShards(folder / "eval"))}
        return _split_by_hash(train, eval_fraction, cache)
    raise ValueError(
        f"{folder}: expected a token folder (manifest.json) or an MDS folder (index.json, or "
        "train/index.json), found neither"
    )


def _of_mds(shards: MdsShards) -> TokenStore:
    return TokenStore(shards.lengths, shards.fingerprint, shards)


def _split_by_hash(
    shards: MdsShards, fraction: float, cache: pathlib.Path | None
) -> dict[str, TokenStore]:
    # The fingerprint covers lengths only, the split depends on the ids.
    stats = [shard.path.stat() for shard in shards.shards]
    times = f"{shards.fingerprint} {[(stat.st_size, stat.st_mtime_ns) for stat in stats]}"
    name = f"{hashlib.sha256(times.encode()).hexdigest()[:16]}-{fraction}.eval.npy"
    kept = cache / name if cache else None
    if kept and kept.is_file():
        is_eval = np.load(kept)
    else:
        bar = Progress(
            shards.in_order(), desc=f"split {shards.folder.name}", unit=" chunks",
            total=len(shards.lengths),
        )  # fmt: skip
        is_eval = np.fromiter((_unit_hash(ids) < fraction for ids in bar), bool)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, is_eval)
            temporary.rename(kept)
    stores = {}
    for split in SPLITS:
        chunks = np.flatnonzero(is_eval == (split == "eval"))
        if not len(chunks):
            raise ValueError(
                f"{shards.folder}: none of its {len(is_eval)} chunks fell into the {split} split "
                f"(eval_fraction {fraction}); pass another --eval-fraction, or folders train and "
                "eval"
            )
        name = f"{shards.fingerprint} {split} {fraction}"
        fingerprint = hashlib.sha256(name.encode()).hexdigest()
        stores[split] = TokenStore(shards.lengths[chunks], fingerprint, _Subset(shards, chunks))
    return stores


def _unit_hash(ids: np.ndarray) -> float:
    """A number in [0, 1) that depends on the ids alone."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big") / 2**64


class _ArrayRecords:
    """Chunks in ArrayRecord shards. A process opens a shard when it first reads from it."""

    def __init__(self, paths: list[pathlib.Path], records: list[int], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self.ends = np.cumsum(records)
        self.starts = self.ends - records
        self.readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"readers": {}}

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        shards = np.searchsorted(self.ends, chunks, side="right")
        records = chunks - self.starts[shards]
        return [self._read(*at) for at in zip(shards.tolist(), records.tolist(), strict=True)]

    def _read(self, shard: int, record: int) -> np.ndarray:
        try:
            if shard not in self.readers:
                self.readers[shard] = array_record_module.ArrayRecordReader(
                    os.fspath(self.paths[shard]),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=8192,
                )
            # A range of one record: reading a list of records takes time for every record of the
            # shard (0.5 ms among 400,000 records, against 2 us).
            return np.frombuffer(self.readers[shard].read(record, record + 1)[0], self.dtype)
        except (RuntimeError, ValueError, IndexError, OSError):
            raise _damaged(self.paths[shard], f"to read record {record}") from None


def _open_tokens(folder: pathlib.Path) -> dict[str, TokenStore]:
    manifest = manifest_of(folder)
    if manifest.get("layout") != LAYOUT:
        raise ValueError(
            f"{folder / 'manifest.json'}: expected layout {LAYOUT}, got "
            f"{manifest.get('layout', 'none')}; prepare the corpus again"
        )
    try:
        return {split: _open_split(folder, manifest, split) for split in SPLITS}
    except (KeyError, TypeError):
        raise _damaged(folder / "manifest.json", "the entries that `prepare` writes") from None


def _open_split(folder: pathlib.Path, manifest: dict[str, Any], split: str) -> TokenStore:
    facts = manifest[split]
    paths = [folder / shard["name"] for shard in facts["shards"]]
    for path, shard in zip(paths, facts["shards"], strict=True):
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise _damaged(path, f"{shard['bytes']:,} bytes, found {size:,}")
    try:
        lengths = np.load(folder / f"{split}.lengths.npy")
    except (OSError, ValueError, EOFError):
        lengths = np.zeros(0, np.int32)
    if len(lengths) != facts["chunks"] or lengths.sum(dtype=np.int64) != facts["tokens"]:
        raise _damaged(folder / f"{split}.lengths.npy", f"{facts['chunks']:,} lengths")
    records = [shard["records"] for shard in facts["shards"]]
    chunks = _ArrayRecords(paths, records, np.dtype(manifest["dtype"]).newbyteorder("<"))
    return TokenStore(lengths, facts["sha256"], chunks, manifest["tokenizer"])


def _damaged(path: pathlib.Path, expected: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected}; the file is missing, cut off or damaged: {_AGAIN}"
    )
