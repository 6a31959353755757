"""Text to token files once; token files, ours or MosaicML's MDS, to pieces by their number.

A token folder holds, for each of train and eval, shards `train-00000-of-00004.array_record` (a
record is the ids of one piece, with [CLS] and [SEP]: little-endian uint16, or uint32 above 65,536
ids), `train.lengths.npy`, and `manifest.json`, which is written last and makes the folder whole.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)
)
from tqdm import tqdm

from ..corpora.readers.text import read_documents, split_of
from .mds import MdsShards

if TYPE_CHECKING:  # JAX is not for the processes that tokenise
    import tokenizers

    from modernbert_jax.tokenizer import Tokenizer

    from ..pretrain.config import TrainConfig

SPLITS = ("train", "eval")
SHARD_BYTES = 1 << 30  # of ids, after which the next shard begins
_TOKENIZE_AT_ONCE = 256  # documents
_COUNTED = 5_000_000  # tokens that `counts` looks at, about
_LAYOUT = "array_record"  # of a token folder; another word makes old folders invisible


class Pieces(Protocol):
    """Where pieces come from. Can be pickled, for worker processes."""

    def read(self, pieces: np.ndarray) -> list[np.ndarray]:
        """The ids of these pieces, unsigned integers."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The pieces of one split, by number. A piece is a document or a part of a long one.

    lengths: int32 [pieces], tokens. fingerprint: sha256, of all that decides the pieces and their
    order. tokenizer: the fingerprint of the one that made the ids, empty where unknown.
    """

    lengths: np.ndarray
    fingerprint: str
    pieces: Pieces
    tokenizer: str = ""

    def read(self, pieces: np.ndarray) -> list[np.ndarray]:
        """The ids of these pieces. Raises ValueError naming the file that is damaged."""
        return self.pieces.read(pieces)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs: int64 [V]; of a corpus beyond 5M tokens, in a part of it."""
        every = max(1, int(self.lengths.sum(dtype=np.int64)) // _COUNTED)
        counts = np.zeros(vocab_size, np.int64)
        chosen = np.arange(0, len(self.lengths), every)
        for some in np.array_split(chosen, -(-len(chosen) // 1024)):
            ids = np.concatenate(self.read(some))
            counts += np.bincount(ids, minlength=vocab_size)[:vocab_size]
        return counts

    def only(self, pieces: np.ndarray, name: str) -> TokenStore:
        """These pieces alone, numbered anew. name: tells this choice from others."""
        fingerprint = hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()
        chosen = _Chosen(self.pieces, pieces)
        return TokenStore(self.lengths[pieces], fingerprint, chosen, self.tokenizer)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    source: Pieces
    numbers: np.ndarray

    def read(self, pieces: np.ndarray) -> list[np.ndarray]:
        return self.source.read(self.numbers[pieces])


@dataclasses.dataclass(frozen=True)
class _Joined:
    stores: tuple[TokenStore, ...]
    ends: np.ndarray

    def read(self, pieces: np.ndarray) -> list[np.ndarray]:
        pieces = np.asarray(pieces)
        result: list[Any] = [None] * len(pieces)
        which = np.searchsorted(self.ends, pieces, side="right")
        for number in np.unique(which).tolist():
            places = np.flatnonzero(which == number)
            store = self.stores[number]
            within = pieces[places] - self.ends[number] + len(store.lengths)
            for place, ids in zip(places.tolist(), store.read(within), strict=True):
                result[place] = ids
        return result


def joined(stores: list[TokenStore] | tuple[TokenStore, ...]) -> TokenStore:
    """Several corpora as one, in this order. Raises ValueError if their tokenizers differ."""
    stores = tuple(stores)
    if len(stores) == 1:
        return stores[0]
    tokenizers = {store.tokenizer for store in stores} - {""}
    if len(tokenizers) > 1:
        raise ValueError(
            f"{len(stores)} corpora: expected one tokenizer, they were made with "
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
    """Whether tokens lie there already, so that `open_store` reads it and nothing is tokenised."""
    folder = pathlib.Path(path)
    names = ("manifest.json", "tokens/manifest.json", "index.json", "train/index.json")
    return any((folder / name).is_file() for name in names)


def manifest_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a token folder or of what `prepare` made; {} of anything else."""
    for name in ("manifest.json", "tokens/manifest.json"):
        if (file := pathlib.Path(path) / name).is_file():
            return json.loads(file.read_text())
    return {}


def open_store(
    path: str | os.PathLike[str],
    eval_fraction: float = 0.05,
    cache: pathlib.Path | None = None,
) -> dict[str, TokenStore]:
    """The splits, train and eval, of a token folder, what `prepare` made, or an MDS folder.

    An MDS folder has its shards in train/ and eval/, or else its pieces are held out by a hash of
    their ids. That reads the whole corpus; in the folder `cache` the outcome is kept. Raises
    ValueError with one line for a folder that is neither, or damaged.
    """
    folder = pathlib.Path(path)
    if (folder / "manifest.json").is_file():
        return _open_tokens(folder)
    if (folder / "tokens" / "manifest.json").is_file():
        return _open_tokens(folder / "tokens")
    if (folder / "index.json").is_file():
        return _hold_out(MdsShards(folder), eval_fraction, cache)
    if (folder / "train" / "index.json").is_file():
        train = MdsShards(folder / "train")
        if (folder / "eval" / "index.json").is_file():
            return {"train": _of_mds(train), "eval": _of_mds(MdsShards(folder / "eval"))}
        return _hold_out(train, eval_fraction, cache)
    raise ValueError(
        f"{folder}: expected a token folder (manifest.json) or an MDS folder (index.json, or "
        "train/index.json), found neither"
    )


def _of_mds(shards: MdsShards) -> TokenStore:
    return TokenStore(shards.lengths, shards.fingerprint, shards)


def _hold_out(
    shards: MdsShards, fraction: float, cache: pathlib.Path | None
) -> dict[str, TokenStore]:
    kept = cache / f"{shards.fingerprint[:16]}-{fraction}.held_out.npy" if cache else None
    if kept and kept.is_file():
        held_out = np.load(kept)
    else:
        bar = tqdm(
            shards.in_order(), desc=f"split {shards.folder.name}", unit=" pieces",
            total=len(shards.lengths), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        held_out = np.fromiter((_share(ids) < fraction for ids in bar), bool)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, held_out)
            temporary.rename(kept)
    splits = {"train": np.flatnonzero(~held_out), "eval": np.flatnonzero(held_out)}
    for split, pieces in splits.items():
        if not len(pieces):
            raise ValueError(
                f"{shards.folder}: none of its {len(held_out)} pieces fell into the {split} split "
                f"(eval_fraction {fraction}); give another --eval-fraction, or folders train and "
                "eval"
            )
    store = _of_mds(shards)
    return {split: store.only(pieces, f"{split} {fraction}") for split, pieces in splits.items()}


def _share(ids: np.ndarray) -> float:
    """A number in [0, 1) that depends on the ids alone."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big") / 2**64


class _ArrayRecords:
    """Pieces in ArrayRecord shards, which are opened where and when they are first read."""

    def __init__(self, paths: list[pathlib.Path], records: list[int], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self.ends = np.cumsum(records)
        self.starts = self.ends - records
        self.readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"readers": {}}

    def read(self, pieces: np.ndarray) -> list[np.ndarray]:
        shards = np.searchsorted(self.ends, pieces, side="right")
        places = pieces - self.starts[shards]
        return [self._read(*at) for at in zip(shards.tolist(), places.tolist(), strict=True)]

    def _read(self, shard: int, place: int) -> np.ndarray:
        try:
            if shard not in self.readers:
                self.readers[shard] = array_record_module.ArrayRecordReader(
                    os.fspath(self.paths[shard]),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=8192,
                )
            # A range, though of one: what reads a list of records takes time for each record of
            # the shard (0.5 ms among 400,000 records, against 2 us).
            return np.frombuffer(self.readers[shard].read(place, place + 1)[0], self.dtype)
        except (RuntimeError, ValueError, IndexError, OSError):
            raise _damaged(self.paths[shard], f"piece {place} in it") from None


def _open_tokens(folder: pathlib.Path) -> dict[str, TokenStore]:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("layout") != _LAYOUT:
        raise ValueError(
            f"{folder / 'manifest.json'}: expected layout {_LAYOUT}, got "
            f"{manifest.get('layout', 'none')}; prepare the corpus again"
        )
    stores = {}
    for split in SPLITS:
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
        if len(lengths) != facts["pieces"] or lengths.sum(dtype=np.int64) != facts["tokens"]:
            raise _damaged(folder / f"{split}.lengths.npy", f"{facts['pieces']:,} lengths")
        records = [shard["records"] for shard in facts["shards"]]
        pieces = _ArrayRecords(paths, records, np.dtype(manifest["dtype"]).newbyteorder("<"))
        stores[split] = TokenStore(lengths, facts["sha256"], pieces, manifest["tokenizer"])
    return stores


def _damaged(path: pathlib.Path, expected: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected}; the file is missing, cut or damaged: copy it again, or "
        "delete the folder and prepare the corpus again"
    )


# Preparing


def tokens_folder(
    root: pathlib.Path, corpus: str, tokenizer: Tokenizer, config: TrainConfig
) -> pathlib.Path:
    """Where the tokens of a corpus lie: its name and a hash of all that they depend on."""
    path = pathlib.Path(corpus)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
    parts = [_LAYOUT, stats, tokenizer.fingerprint]
    parts += [config.sequence_length, config.eval_fraction, config.text_column]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return root / f"{path.name or 'corpus'}-{digest[:12]}"


def prepare_tokens(
    corpus: str, tokenizer: Tokenizer, config: TrainConfig, folder: pathlib.Path
) -> dict[str, TokenStore]:
    """Reads, splits and tokenises a corpus into `folder`, or opens it where that is done already.

    Documents are cut at sequence_length - 2 tokens; each piece gets [CLS] and [SEP]. The same text gives
    the same bytes. Raises ValueError for a corpus without a document for training and one for
    evaluation.
    """
    if not (folder / "manifest.json").exists():
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _tokenise(corpus, tokenizer, config, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return open_store(folder)


def _tokenise(corpus: str, tokenizer: Tokenizer, config: TrainConfig, folder: pathlib.Path) -> None:
    dtype = np.dtype("<u2" if len(tokenizer) <= 65_536 else "<u4")
    writers = {split: SplitWriter(folder, split, dtype) for split in SPLITS}
    documents = 0
    assert tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id

    def flush(texts: list[str]) -> None:
        for text, ids in zip(texts, encode(tokenizer.backend_tokenizer, texts), strict=True):
            writer = writers[split_of(text, config.eval_fraction)]
            for piece in cut(ids, ends, config.sequence_length, dtype):
                writer.add(piece)

    texts: list[str] = []
    column = config.text_column or None
    bar = tqdm(
        read_documents(corpus, text_column=column),
        desc=f"tokenise {pathlib.Path(corpus).name}",
        unit=" documents",
        disable=not sys.stderr.isatty(),
    )
    for document in bar:
        documents += 1
        texts.append(document.text)
        if len(texts) == _TOKENIZE_AT_ONCE:
            flush(texts)
            texts = []
    flush(texts)
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, facts in splits.items():
        if not facts["pieces"]:
            raise ValueError(
                f"{corpus}: no document fell into the {split} split "
                f"(eval_fraction {config.eval_fraction}, {documents} documents); "
                "give more text or another --eval-fraction"
            )
    write_manifest(folder, documents, tokenizer.fingerprint, dtype, splits)


def encode(backend: tokenizers.Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text, without special tokens, however long. backend: without truncation."""
    # What leaves out the offsets takes three quarters of the time.
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def cut(
    ids: Sequence[int], ends: tuple[int, int], sequence_length: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """A document's pieces: up to sequence_length - 2 of its ids, between [CLS] and [SEP] (`ends`)."""
    document = np.asarray(ids, dtype)
    for first in range(0, len(document), sequence_length - 2):
        part = document[first : first + sequence_length - 2]
        piece = np.empty(len(part) + 2, dtype)
        piece[0], piece[1:-1], piece[-1] = ends[0], part, ends[1]
        yield piece


def write_manifest(
    folder: pathlib.Path,
    documents: int,
    tokenizer: str,
    dtype: np.dtype,
    splits: dict[str, dict[str, Any]],
    more: dict[str, Any] | None = None,
) -> None:
    """Makes a folder whole. tokenizer: its fingerprint. splits: what each SplitWriter returned."""
    manifest = {"layout": _LAYOUT, "documents": documents, "tokenizer": tokenizer}
    manifest |= {"dtype": dtype.name, **splits, **(more or {})}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


class SplitWriter:
    """Writes the pieces of one split: shards, then lengths. `close` returns its manifest."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.lengths = array.array("i")
        self.digest = hashlib.sha256()
        self.shards: list[tuple[pathlib.Path, int]] = []  # with records
        self.writer: Any = None
        self.records = self.bytes = 0

    def add(self, ids: np.ndarray) -> None:
        """Writes one piece."""
        if self.bytes >= SHARD_BYTES:
            self._end_shard()
        if self.writer is None:
            path = self.folder / f"{self.split}-{len(self.shards):05d}.part"
            # Group size 1: each record can be read without its neighbours.
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
        """Names the shards, writes the lengths; returns counts, sha256 and shards."""
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
            "pieces": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "sha256": self.digest.hexdigest(),
            "shards": shards,
        }
