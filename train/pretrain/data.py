"""Documents to batches of packed, masked sequences, the same for any number of hosts and workers.

A row plan assigns the documents of an epoch to packed sequences (`modernbert_jax.packing`); its
rows are these sequences. A step uses the next rows of the plan, and each process builds only those
of its own devices. Two integers, the epoch and the row, and the phase's token clock are all that is
needed to resume.
"""

import dataclasses
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grain
import numpy as np
from absl import flags

from modernbert_jax.packing import IGNORE_INDEX, RowPlan, plan_rows

from ..tokens.store import TokenStore
from .config import TrainConfig
from .masking import (
    Masking,
    corrupt,
    fit_positions,
    pick_positions,
    predicted_positions,
    token_draws,
)

_EVAL_EPOCH = 2**31  # seeds the masks of evaluation; no training epoch has this number


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands in its phases and data. Stored in each checkpoint."""

    phase: int = 0
    phase_tokens: int = 0  # the phase's clock, without padding
    total_tokens: int = 0
    epoch: int = 0
    row: int = 0  # of the epoch's plan, where the next step starts
    tokens_sha256: str = ""  # of the phase's tokens

    def after(self, batch: "Batch") -> "Position":
        """Returns the position after a step."""
        return dataclasses.replace(
            self,
            phase_tokens=self.phase_tokens + batch.tokens,
            total_tokens=self.total_tokens + batch.tokens,
            epoch=batch.epoch,
            row=batch.row,
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """The part of one step's batch that this process builds, and where the next step starts.

    arrays, int32: input_ids, segment_ids [A, local, L]; predict_positions, labels [A, local, P]
    (labels are IGNORE_INDEX at unused positions); dropped [A, local], selected tokens beyond P. A
    micro-batches, P predictions per sequence. tokens (without padding) and sequences count the
    whole step; they, epoch and row are the same on every host. documents: read by this process.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    sequences: int
    epoch: int
    row: int
    documents: np.ndarray

    @property
    def masked(self) -> int:
        """Tokens to predict, of this process."""
        return int((self.arrays["labels"] != IGNORE_INDEX).sum())

    @property
    def dropped(self) -> int:
        """Selected tokens beyond P, of this process."""
        return int(self.arrays["dropped"].sum())


class Batches(Iterator[Batch]):
    """An endless iterator over the batches of one phase; a batch may continue into the next epoch.

    Continues at `epoch`, `row` and `tokens` (the phase's clock), whatever the number of hosts was
    before. Sequence k of a step is slot k % micro_batch_size of micro-batch k // micro_batch_size.
    slots: those that this process builds, None for all; slots from micro_batch_size on pad the
    batch to the number of devices and stay empty. Grain reads ahead in `threads` threads of this
    process, or in `workers` processes. Raises ValueError for documents longer than a sequence and
    for token ids outside the vocabulary.
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
        tokens: int = 0,
        slots: np.ndarray | None = None,
        workers: int = 0,
        threads: int = 4,
    ):
        self.config, self.phase, self.tokens = config, phase, tokens
        micro_batch_size, batch_size = config.micro_batch_size, config.global_batch_size
        self.slots = np.arange(micro_batch_size) if slots is None else np.asarray(slots)
        self._filled = np.flatnonzero(self.slots < micro_batch_size)
        self._plans = Plans(store, config.sequence_length, (config.seed, phase))
        self._plans.epoch_rows = len(self._plans(epoch))
        self._next = epoch * self._plans.epoch_rows + row
        self._limit = predicted_positions(config.sequence_length, masking.rate)
        self._rows = iter(())
        # The rows of this process repeat with each micro-batch, or with each step if the last
        # micro-batch of a step is not full.
        unit = micro_batch_size if batch_size % micro_batch_size == 0 else batch_size
        own = np.flatnonzero(np.isin(np.arange(unit) % micro_batch_size, self.slots))
        if len(own):
            source = _Rows(store, masking, self._plans, self._next, own, unit)
            ahead = 2 * batch_size // unit * len(own)  # two steps
            self._rows = _read_ahead(source, ahead, workers, threads)

    def __next__(self) -> Batch:
        config, plans, local = self.config, self._plans, len(self.slots)
        micro_batch_size = config.micro_batch_size
        sequences = config.phases[self.phase].batch_size_at(
            self.tokens, config.global_batch_size, micro_batch_size
        )
        micro_batches = -(-sequences // micro_batch_size)
        arrays = _empty(micro_batches * local, config.sequence_length, self._limit)
        documents = [np.zeros(0, np.int64)]
        for micro in range(micro_batches):
            for slot in self._filled.tolist():
                if micro * micro_batch_size + self.slots[slot] >= sequences:
                    continue
                row = next(self._rows)
                documents.append(row.pop("documents"))
                for name, array in row.items():
                    arrays[name][micro * local + slot] = array
        tokens = plans.tokens(self._next, sequences)
        self._next += sequences
        self.tokens += tokens
        return Batch(
            {k: v.reshape(micro_batches, local, *v.shape[1:]) for k, v in arrays.items()},
            tokens,
            sequences,
            *divmod(self._next, plans.epoch_rows),
            np.concatenate(documents),
        )

    def close(self) -> None:
        """Ends the threads and workers."""
        if isinstance(self._rows, grain.DatasetIterator):
            self._rows.close()
            self._rows = iter(())  # Grain's iterators complain if the interpreter ends first
        self._plans.close()


class Plans:
    """The row plan of each epoch; a thread prepares the next one while one is in use.

    Best fit over lengths gives the same number of rows in every epoch, so that row r of epoch e is
    row `e * epoch_rows + r` of the phase.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: tuple[int, ...]):
        self.lengths = _lengths(store, sequence_length)
        self.sequence_length, self.seed = sequence_length, seed
        self.epoch_rows = 0
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._made: dict[int, futures.Future[RowPlan]] = {}
        self._lock = threading.Lock()
        self._thread = futures.ThreadPoolExecutor(1, "row-plan")

    def __call__(self, epoch: int) -> RowPlan:
        return self.begin(epoch).result()

    def begin(self, epoch: int) -> futures.Future[RowPlan]:
        """Starts to make this epoch's plan, unless it exists; drops the plans of past epochs."""
        with self._lock:
            if epoch not in self._made:
                self._made = {e: plan for e, plan in self._made.items() if e >= epoch - 1}
                self._made[epoch] = self._thread.submit(
                    plan_rows, self.lengths, self.sequence_length, (*self.seed, epoch)
                )
            return self._made[epoch]

    def row(self, number: int) -> tuple[int, np.ndarray]:
        """Returns (epoch, documents) of a row of the phase."""
        epoch, row = divmod(number, self.epoch_rows)
        if 2 * row >= self.epoch_rows:
            self.begin(epoch + 1)
        return epoch, self(epoch).row(row)

    def tokens(self, first: int, rows: int) -> int:
        """Returns the number of tokens in `rows` rows of the phase, without padding."""
        epoch, row = divmod(first, self.epoch_rows)
        here = min(rows, self.epoch_rows - row)
        plan = self(epoch)
        documents = plan.documents[plan.starts[row] : plan.starts[row + here]]
        total = int(self.lengths[documents].sum(dtype=np.int64))
        return total + (self.tokens(first + here, rows - here) if rows > here else 0)

    def close(self) -> None:
        """Ends the thread, after the plan that it is making."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows that a process builds, as an endless random-access source for Grain."""

    store: TokenStore
    masking: Masking
    plans: Plans
    first: int  # row of the phase
    own: np.ndarray  # indices of this process's rows in each unit
    unit: int

    def __len__(self) -> int:
        return 2**60

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        units, offset = divmod(int(index), len(self.own))
        epoch, documents = self.plans.row(self.first + units * self.unit + int(self.own[offset]))
        seed = (*self.plans.seed, epoch)
        return build_row(self.store, documents, self.masking, self.plans.sequence_length, seed)


def _read_ahead(source: _Rows, ahead: int, workers: int, threads: int) -> Iterator[dict[str, Any]]:
    ahead = max(ahead // max(workers, 1), threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    rows = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which we do not use
            flags.FLAGS.mark_as_parsed()
        rows = rows.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        )
    return iter(rows)


def build_row(
    store: TokenStore,
    documents: np.ndarray,
    masking: Masking,
    sequence_length: int,
    seed: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """Returns the packed sequence of these documents: arrays as in Batch, and `documents`.

    Each document is masked with (*seed, document). Raises ValueError for an id outside the
    vocabulary.
    """
    limit = predicted_positions(sequence_length, masking.rate)
    parts = [ids[:sequence_length] for ids in store.read(documents)]
    lengths = np.array([len(part) for part in parts])
    original = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    if original.max() >= masking.vocab_size:
        raise ValueError(
            f"token ids: expected less than the tokenizer's {masking.vocab_size:,}, got "
            f"{original.max():,}; the corpus was tokenized with another tokenizer"
        )
    draws = token_draws(documents, lengths, seed)
    picked, dropped = fit_positions(
        pick_positions(original, draws, masking), limit, (*seed, int(documents[0]), 1)
    )
    row = {name: array[0] for name, array in _empty(1, sequence_length, limit).items()}
    row["input_ids"][: len(original)] = corrupt(original, picked, draws, masking)
    row["segment_ids"][: len(original)] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    row["predict_positions"][: len(picked)] = picked
    row["labels"][: len(picked)] = original[picked]
    row["dropped"] = np.array(dropped, np.int32)
    return row | {"documents": documents}


def _empty(count: int, sequence_length: int, limit: int) -> dict[str, np.ndarray]:
    """Returns the arrays of `count` sequences of padding."""
    shapes = {"input_ids": (sequence_length,), "segment_ids": (sequence_length,)}
    shapes |= {"predict_positions": (limit,), "labels": (limit,), "dropped": ()}
    arrays = {name: np.zeros((count, *shape), np.int32) for name, shape in shapes.items()}
    arrays["labels"][:] = IGNORE_INDEX
    return arrays


def _lengths(store: TokenStore, sequence_length: int) -> np.ndarray:
    """Returns the documents' lengths in sequences of sequence_length; refuses longer documents.

    The reference's preparation makes some documents a token or two too long, and its loader cuts
    them; so do we.
    """
    longest = int(store.lengths.max(initial=0))
    if longest > sequence_length + sequence_length // 64 + 1:
        raise ValueError(
            f"corpus: its documents have up to {longest:,} tokens, sequence_length is "
            f"{sequence_length:,}; prepare the text again with this --sequence-length, or raise it"
        )
    if not longest:
        raise ValueError("corpus: expected documents to train on, got none")
    return np.minimum(store.lengths, sequence_length)


def eval_batches(
    store: TokenStore, masking: Masking, config: TrainConfig, slots: np.ndarray | None = None
) -> list[dict[str, np.ndarray]]:
    """Returns the batches [local, ...] of one evaluation set: at most eval_sequences, masked once.

    slots as in Batches; the number of batches is the same on every host.
    """
    micro_batch_size, length = config.micro_batch_size, config.sequence_length
    slots = np.arange(micro_batch_size) if slots is None else np.asarray(slots)
    plan = plan_rows(_lengths(store, length), length, (config.seed, 0))
    limit = predicted_positions(length, masking.rate)
    count = min(len(plan), config.eval_sequences)
    seed = (config.seed, 0, _EVAL_EPOCH)
    batches = []
    for first in range(0, count, micro_batch_size):
        arrays = _empty(len(slots), length, limit)
        for offset, slot in enumerate(slots.tolist()):
            if slot < micro_batch_size and first + slot < count:
                row = build_row(store, plan.row(first + slot), masking, length, seed)
                for name, array in arrays.items():
                    array[offset] = row[name]
        batches.append(arrays)
    return batches
