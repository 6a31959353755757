"""The token stage of `prepare`: turns a TFDS data set of text into a token folder.

Each shard of text becomes one shard of tokens (or more, beyond SHARD_BYTES) in a folder of its own
below `work`, which is renamed when it is complete. At the end the shards move to the token folder,
numbered; the manifest comes last. The bytes depend on the text shards alone.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)
)

from ...common.parallel import run_all
from ...common.records import read_object
from ...tokens.store import SPLITS
from ...tokens.writer import SplitWriter, cut, write_manifest

_RECORDS = 256  # read at once
_CHARACTERS = 4 << 20  # tokenized at once, which takes some 120 bytes each
_WINDOW = 1 << 20  # characters of a long document that are tokenized together
_CUT = re.compile(r"(?<=[!-~]) ")  # a space after a visible character of ASCII: see _windows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How text becomes ids. A literal "[SEP]" in a document is text.

    tokenizer: its JSON, with all settings. ends: ids of [CLS], [SEP]. space_before_chunks: see
    `spaced`.
    """

    tokenizer: str
    vocab_size: int
    ends: tuple[int, int]
    sequence_length: int
    space_before_chunks: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids on disk."""
        return np.dtype("<u2" if self.vocab_size <= 65_536 else "<u4")

    @property
    def fingerprint(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenJob:
    """A shard of text and the folder for its tokens."""

    text: pathlib.Path
    split: str
    folder: pathlib.Path
    fingerprint: str  # of the text shard and the recipe

    def facts(self) -> dict[str, Any]:
        """What SplitWriter.close returned, with documents and seconds; {} until it is complete."""
        facts = read_object(self.folder / "facts.json", "fingerprint", "shards")
        complete = facts.get("fingerprint") == self.fingerprint and all(
            (self.folder / shard["name"]).is_file() for shard in facts["shards"]
        )
        return facts if complete else {}


def tokenize(
    shards: dict[str, list[tuple[pathlib.Path, str]]],
    recipe: Recipe,
    work: pathlib.Path,
    folder: pathlib.Path,
    tokenizer: str,
    more: dict[str, Any],
    workers: int = 1,
) -> dict[str, Any]:
    """Makes the token folder from shards of text and their sha256, by split; returns its manifest.

    tokenizer: fingerprint for the manifest. more: further entries of the manifest.
    """
    jobs = [
        TokenJob(
            path,
            split,
            work / f"{split}-{number:05d}",
            hashlib.sha256(f"{sha256} {recipe.fingerprint}".encode()).hexdigest(),
        )
        for split in SPLITS
        for number, (path, sha256) in enumerate(shards.get(split, []))
    ]
    todo = [job for job in jobs if not job.facts()]
    run_all(functools.partial(tokenize_shard, recipe), todo, "tokenize", workers)
    complete = work / "complete"
    shutil.rmtree(complete, ignore_errors=True)
    complete.mkdir(parents=True)
    splits, documents, seconds = {}, 0, 0.0
    for split in SPLITS:
        facts = [(job.folder, job.facts()) for job in jobs if job.split == split]
        splits[split] = _gather(facts, split, complete, recipe.dtype)
        documents += sum(f["documents"] for _, f in facts)
        seconds += sum(f["seconds"] for _, f in facts)
    more = more | {"sequence_length": recipe.sequence_length, "tokenize_seconds": round(seconds, 2)}
    write_manifest(complete, documents, tokenizer, recipe.dtype, splits, more)
    shutil.rmtree(folder, ignore_errors=True)
    complete.rename(folder)
    return read_object(folder / "manifest.json")


def tokenize_shard(recipe: Recipe, job: TokenJob) -> None:
    """Turns one shard of text into tokens."""
    start = time.perf_counter()
    temporary = job.folder.with_name(f"{job.folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    backend = tokenizers.Tokenizer.from_str(recipe.tokenizer)
    backend.encode_special_tokens = True  # JSON does not keep it
    dtype = recipe.dtype
    writer = SplitWriter(temporary, job.split, dtype)
    documents = 0
    window = _WINDOW if _can_cut(recipe.tokenizer) else None
    ids: list[np.ndarray] = []  # of the windows of one document
    for batch in _batches(_windows((text for _, text in read_shard(job.text)), window)):
        # The call without offsets takes three quarters of the time of encode_batch.
        encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            ids.append(np.asarray(encoding.ids, dtype))
            if is_last:
                documents += 1
                for chunk in cut(np.concatenate(ids), recipe.ends, recipe.sequence_length, dtype):
                    writer.add(spaced(chunk, backend) if recipe.space_before_chunks else chunk)
                ids = []
    facts = writer.close() | {"documents": documents, "fingerprint": job.fingerprint}
    facts["seconds"] = time.perf_counter() - start
    (temporary / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(job.folder, ignore_errors=True)
    temporary.rename(job.folder)


def spaced(chunk: np.ndarray, backend: tokenizers.Tokenizer) -> np.ndarray:
    """Encodes the first token of a chunk's text again, as a space and the token's text.

    The public script of BioClinical ModernBERT (convert_dataset_to_mds) does so with every chunk. A
    token that has its own space gets a second one, and the chunk may become longer. With
    transformers 4 that script removed the own space of a punctuation mark first; we do not.
    """
    text = backend.decode([int(chunk[1])], skip_special_tokens=False)
    ids = backend.encode(f" {text}", add_special_tokens=False).ids
    return np.concatenate([chunk[:1], np.asarray(ids, chunk.dtype), chunk[2:]])


def read_shard(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(id, text) of each document in a TFDS shard."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse: Any = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    reader = array_record_module.ArrayRecordReader(
        os.fspath(path), options="readahead_buffer_size:0,max_parallelism:0"
    )
    count = reader.num_records()
    for first in range(0, count, _RECORDS):
        for record in reader.read(first, min(first + _RECORDS, count)):
            feature = parse(record).features.feature
            yield tuple(feature[name].bytes_list.value[0].decode() for name in ("id", "text"))
    reader.close()


def _can_cut(tokenizer: str) -> bool:
    """Whether a tokenizer, given as JSON, gives a text's ids window by window: see _windows."""
    parts = json.loads(tokenizer)
    normalizer, before = parts["normalizer"], parts["pre_tokenizer"]
    return (
        (normalizer is None or normalizer["type"] == "NFC")
        and (before is not None and before["type"] == "ByteLevel" and before["use_regex"])
        and parts["model"]["type"] == "BPE"
        and not any(token["rstrip"] or _CUT.search(token["content"])
                    for token in parts["added_tokens"])
    )  # fmt: skip


def _windows(texts: Iterable[str], size: int | None) -> Iterator[tuple[str, bool]]:
    """Cuts each text into windows of about `size` characters; True marks the last of a text.

    The windows have the ids of the whole text. Each but the first begins with a space after a
    visible character: a byte-level pre-tokenizer never joins the two and does not look behind, NFC
    composes nothing with a space, no prefix space is put before another, and a special token that
    includes spaces before it ([MASK]) finds all of them. A text without such a place is one window.
    """
    for text in texts:
        first = 0
        while size and (found := _CUT.search(text, first + size)):
            yield text[first : found.start()], False
            first = found.start()
        yield text[first:], True


def _batches(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text[0])
        if size >= _CHARACTERS or len(batch) == _RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _gather(
    jobs: Sequence[tuple[pathlib.Path, dict[str, Any]]],
    split: str,
    folder: pathlib.Path,
    dtype: np.dtype,
) -> dict[str, Any]:
    """Moves the shards of a split to `folder`; returns the split's part of the manifest."""
    if not jobs:
        return SplitWriter(folder, split, dtype).close()
    count = sum(len(facts["shards"]) for _, facts in jobs)
    digest, lengths, shards = hashlib.sha256(), [], []
    for at, facts in jobs:
        digest.update(facts["sha256"].encode())
        lengths.append(np.load(at / f"{split}.lengths.npy"))
        for shard in facts["shards"]:
            name = f"{split}-{len(shards):05d}-of-{count:05d}.array_record"
            (at / shard["name"]).rename(folder / name)
            shards.append(shard | {"name": name})
    joined = np.concatenate(lengths)
    np.save(folder / f"{split}.lengths.npy", joined)
    return {
        "chunks": len(joined),
        "tokens": int(joined.sum(dtype=np.int64)),
        "sha256": digest.hexdigest(),
        "shards": shards,
    }
