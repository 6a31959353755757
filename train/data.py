"""Text to token files once, then token files to batches of packed, masked rows.

A token folder holds, for each of train and eval, `ids.npy` (one document after the other) and
`lengths.npy`, and `manifest.json`, which is written last and makes the folder whole.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from modernbert_jax.packing import RowPlan, plan_rows
from modernbert_jax.tokenizer import Tokenizer

from .config import TrainConfig
from .corpora.text import read_documents, split_of
from .loss import IGNORE
from .masking import Masking, fit_positions, mask_document, predicted_positions

SPLITS = ("train", "eval")
_TOKENIZE_AT_ONCE = 256  # documents
_EVAL_EPOCH = 2**31  # a mask seed that no training epoch has


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The documents of one split: `ids[starts[d]:starts[d + 1]]`, each with [CLS] and [SEP]."""

    ids: np.ndarray
    lengths: np.ndarray
    fingerprint: str  # sha256 of ids and lengths

    @property
    def starts(self) -> np.ndarray:
        """Where each document starts in `ids`, and the end."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def tokens_folder(
    root: pathlib.Path, corpus: str, tokenizer: Tokenizer, config: TrainConfig
) -> pathlib.Path:
    """Where the tokens of a corpus lie: its name and a hash of all that they depend on."""
    path = pathlib.Path(corpus)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
    text = json.dumps(
        [stats, tokenizer.fingerprint, config.row_length, config.eval_fraction, config.text_column]
    )
    return root / f"{path.name or 'corpus'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prepare_tokens(
    corpus: str, tokenizer: Tokenizer, config: TrainConfig, folder: pathlib.Path
) -> dict[str, TokenStore]:
    """Reads, splits and tokenises a corpus into `folder`, or opens it where that is done already.

    Documents are cut at row_length - 2 tokens; each piece gets [CLS] and [SEP]. Raises ValueError
    for a corpus without a document for training and one for evaluation.
    """
    if not (folder / "manifest.json").exists():
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest = _tokenise(corpus, tokenizer, config, temporary)
        for split in SPLITS:
            if not manifest[split]["pieces"]:
                raise ValueError(
                    f"{corpus}: no document fell into the {split} split "
                    f"(eval_fraction {config.eval_fraction}, {manifest['documents']} documents); "
                    "give more text or another --eval-fraction"
                )
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        split: TokenStore(
            np.load(folder / f"{split}.ids.npy", mmap_mode="r"),
            np.load(folder / f"{split}.lengths.npy"),
            manifest[split]["sha256"],
        )
        for split in SPLITS
    }


def _tokenise(
    corpus: str, tokenizer: Tokenizer, config: TrainConfig, folder: pathlib.Path
) -> dict[str, Any]:
    dtype = np.uint16 if len(tokenizer) <= 65_536 else np.uint32
    raw = {split: open(folder / f"{split}.raw", "wb") for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    documents = 0
    cut = config.row_length - 2

    def flush(texts: list[str]) -> None:
        for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
            split = split_of(text, config.eval_fraction)
            for first in range(0, len(ids), cut):
                piece = [tokenizer.cls_token_id, *ids[first : first + cut], tokenizer.sep_token_id]
                raw[split].write(np.asarray(piece, dtype).tobytes())
                lengths[split].append(len(piece))

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
    manifest: dict[str, Any] = {"documents": documents, "tokenizer": tokenizer.fingerprint}
    for split in SPLITS:
        raw[split].close()
        data = np.fromfile(folder / f"{split}.raw", dtype)
        sizes = np.asarray(lengths[split], np.int32)
        np.save(folder / f"{split}.ids.npy", data)
        np.save(folder / f"{split}.lengths.npy", sizes)
        (folder / f"{split}.raw").unlink()
        digest = hashlib.sha256(data.tobytes() + sizes.tobytes()).hexdigest()
        manifest[split] = {"pieces": len(sizes), "tokens": int(sizes.sum()), "sha256": digest}
    return manifest


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's rows, and where the next one starts.

    arrays, int32: input_ids, segment_ids [A, B, L]; predict_positions, labels [A, B, P] (labels are
    IGNORE where a place is unused). tokens: without padding. dropped: picks beyond P.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    masked: int
    dropped: int
    epoch: int
    row: int


class Batches(Iterator[Batch]):
    """The batches of one phase, without end: epochs follow each other inside a batch if need be.

    The state is two integers: the epoch and the row of its plan that comes next.
    """

    def __init__(
        self,
        store: TokenStore,
        masking: Masking,
        config: TrainConfig,
        *,
        phase: int,
        epoch: int = 0,
        row: int = 0,
    ):
        self.store, self.masking, self.config = store, masking, config
        self.phase, self.epoch, self.row = phase, epoch, row
        self.starts = store.starts
        self.limit = predicted_positions(config.row_length, masking.rate)
        self.plan = self._plan()

    def _plan(self) -> RowPlan:
        seed = (self.config.seed, self.phase, self.epoch)
        return plan_rows(self.store.lengths, self.config.row_length, seed)

    def __next__(self) -> Batch:
        config = self.config
        rows = RowBuilder(config.rows, config.row_length, self.limit)
        for _ in range(config.rows):
            if self.row == len(self.plan):
                self.epoch, self.row = self.epoch + 1, 0
                self.plan = self._plan()
            seed = (config.seed, self.phase, self.epoch)
            rows.add(self.store, self.starts, self.plan.row(self.row), self.masking, seed)
            self.row += 1
        arrays = {
            name: array.reshape(config.micro_batches, config.micro_rows, -1)
            for name, array in rows.arrays.items()
        }
        return Batch(arrays, rows.tokens, rows.masked, rows.dropped, self.epoch, self.row)


class RowBuilder:
    """Fills rows one after the other; rows never added stay empty (padding)."""

    def __init__(self, rows: int, row_length: int, limit: int):
        shapes = {"input_ids": row_length, "segment_ids": row_length}
        shapes |= {"predict_positions": limit, "labels": limit}
        self.arrays = {name: np.zeros((rows, n), np.int32) for name, n in shapes.items()}
        self.arrays["labels"][:] = IGNORE
        self.limit = limit
        self.rows = self.tokens = self.masked = self.dropped = 0

    def add(
        self,
        store: TokenStore,
        starts: np.ndarray,
        documents: np.ndarray,
        masking: Masking,
        seed: tuple[int, ...],
    ) -> None:
        """Adds a row of these documents."""
        a, r, end = self.arrays, self.rows, 0
        places, originals, corrupted = [], [], []
        for number, document in enumerate(documents, start=1):
            ids = store.ids[starts[document] : starts[document + 1]].astype(np.int32)
            changed, picked = mask_document(ids, masking, (*seed, int(document)))
            a["segment_ids"][r, end : end + len(ids)] = number
            places.append(picked + end)
            originals.append(ids)
            corrupted.append(changed)
            end += len(ids)
        original, changed = np.concatenate(originals), np.concatenate(corrupted)
        picked, dropped = fit_positions(
            np.concatenate(places), self.limit, (*seed, int(documents[0]), 1)
        )
        if dropped:  # a pick that is not predicted stays as it was
            kept = np.zeros(end, bool)
            kept[picked] = True
            changed = np.where(kept, changed, original)
        a["input_ids"][r, :end] = changed
        a["predict_positions"][r, : len(picked)] = picked
        a["labels"][r, : len(picked)] = original[picked]
        self.rows += 1
        self.tokens += end
        self.masked += len(picked)
        self.dropped += dropped


def eval_batches(store: TokenStore, masking: Masking, config: TrainConfig) -> list[dict]:
    """Held-out rows under one fixed mask: batches [micro_rows, ...], at most eval_rows rows."""
    plan = plan_rows(store.lengths, config.row_length, (config.seed, 0))
    starts = store.starts
    limit = predicted_positions(config.row_length, masking.rate)
    count = min(len(plan), config.eval_rows)
    batches = []
    for first in range(0, count, config.micro_rows):
        rows = RowBuilder(config.micro_rows, config.row_length, limit)
        for r in range(first, min(first + config.micro_rows, count)):
            rows.add(store, starts, plan.row(r), masking, (config.seed, 0, _EVAL_EPOCH))
        batches.append(rows.arrays)
    return batches


class Prefetch(Iterator[Batch]):
    """Draws batches in a thread, a few ahead; an error there is raised here."""

    def __init__(self, batches: Iterator[Batch], ahead: int = 4):
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True)
        self._thread.start()

    def _fill(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                while not self._stop.is_set():
                    try:
                        self._queue.put(batch, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the reader
            self._queue.put(error)

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()
