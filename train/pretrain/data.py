"""Pieces of text to batches of packed, masked rows, the same for any number of hosts and workers.

A row plan says which pieces make which row of an epoch. A step takes the next rows of the plan;
each process builds only those of its own slots. What a run must keep to go on is two integers, the
epoch and the row, and the phase's token clock.
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

_EVAL_EPOCH = 2**31  # a mask seed that no training epoch has


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's rows that this process builds, and where the next step starts.

    arrays, int32: input_ids, segment_ids [A, S, L]; predict_positions, labels [A, S, P] (labels are
    IGNORE_INDEX where a place is unused); dropped [A, S], picks beyond P. A micro-batches, S slots.
    tokens (without padding) and rows are those of the whole step, on every host the same, like
    epoch and row. documents: the pieces that this process read.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    rows: int
    epoch: int
    row: int
    documents: np.ndarray

    @property
    def masked(self) -> int:
        """Tokens to predict, of this process."""
        return int((self.arrays["labels"] != IGNORE_INDEX).sum())

    @property
    def dropped(self) -> int:
        """Picks beyond P, of this process."""
        return int(self.arrays["dropped"].sum())


class Batches(Iterator[Batch]):
    """The batches of one phase, without end: epochs follow each other inside a batch if need be.

    Goes on where `epoch`, `row` and `tokens` (the phase's clock) say, whatever slots or hosts there
    were before. Row k of a step is slot k % micro_batch_size of micro-batch k // micro_batch_size. slots: those
    that this process builds, None for all; slots from micro_batch_size on stay empty and fill the
    devices. Rows are read ahead by Grain, in `threads` of this process or, with workers, of as many
    processes. Raises ValueError for pieces longer than a row or ids beyond the vocabulary.
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
        self.slots = np.arange(config.micro_batch_size) if slots is None else np.asarray(slots)
        self._filled = np.flatnonzero(self.slots < config.micro_batch_size)
        self._plans = Plans(store, config.sequence_length, (config.seed, phase))
        self._plans.epoch_rows = len(self._plans(epoch))
        self._next = epoch * self._plans.epoch_rows + row
        self._limit = predicted_positions(config.sequence_length, masking.rate)
        self._rows = iter(())
        # Rows come in units that are alike: micro-batches, or steps where the last micro-batch of
        # each is not full.
        whole = config.global_batch_size % config.micro_batch_size == 0
        unit = config.micro_batch_size if whole else config.global_batch_size
        own = np.flatnonzero(np.isin(np.arange(unit) % config.micro_batch_size, self.slots))
        if len(own):
            source = _Rows(store, masking, self._plans, self._next, own, unit)
            ahead = 2 * config.global_batch_size // unit * len(own)  # two steps
            self._rows = _read_ahead(source, ahead, workers, threads)

    def __next__(self) -> Batch:
        config, plans = self.config, self._plans
        rows = config.phases[self.phase].batch_size_at(
            self.tokens, config.global_batch_size, config.micro_batch_size
        )
        gradient_accumulation_steps = -(-rows // config.micro_batch_size)
        arrays = _empty(
            gradient_accumulation_steps * len(self.slots), config.sequence_length, self._limit
        )
        documents = [np.zeros(0, np.int64)]
        for micro in range(gradient_accumulation_steps):
            for slot in self._filled.tolist():
                if micro * config.micro_batch_size + self.slots[slot] >= rows:
                    continue
                row = next(self._rows)
                documents.append(row.pop("documents"))
                for name, array in row.items():
                    arrays[name][micro * len(self.slots) + slot] = array
        tokens = plans.tokens(self._next, rows)
        self._next += rows
        self.tokens += tokens
        return Batch(
            {
                k: v.reshape(gradient_accumulation_steps, len(self.slots), *v.shape[1:])
                for k, v in arrays.items()
            },
            tokens,
            rows,
            *divmod(self._next, plans.epoch_rows),
            np.concatenate(documents),
        )

    def close(self) -> None:
        """Ends the threads and workers."""
        if isinstance(self._rows, grain.DatasetIterator):
            self._rows.close()
            self._rows = iter(())  # Grain's iterators complain when the interpreter ends first
        self._plans.close()


class Plans:
    """The row plan of each epoch; the next one is made in a thread while this one is in use.

    Best fit over lengths makes the same number of rows in every epoch, so that row r of epoch e is
    row `e * epoch_rows + r` of the phase.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: tuple[int, ...]):
        self.lengths, self.sequence_length, self.seed = (
            _fitted(store, sequence_length),
            sequence_length,
            seed,
        )
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
        """Starts on this epoch's plan, unless that is done; forgets those that are past."""
        with self._lock:
            if epoch not in self._made:
                self._made = {e: plan for e, plan in self._made.items() if e >= epoch - 1}
                self._made[epoch] = self._thread.submit(
                    plan_rows, self.lengths, self.sequence_length, (*self.seed, epoch)
                )
            return self._made[epoch]

    def row(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, pieces) of a row of the phase."""
        epoch, row = divmod(number, self.epoch_rows)
        if 2 * row >= self.epoch_rows:
            self.begin(epoch + 1)
        return epoch, self(epoch).row(row)

    def tokens(self, first: int, rows: int) -> int:
        """Tokens in so many rows of the phase, without padding."""
        epoch, row = divmod(first, self.epoch_rows)
        here = min(rows, self.epoch_rows - row)
        plan = self(epoch)
        pieces = plan.documents[plan.starts[row] : plan.starts[row + here]]
        total = int(self.lengths[pieces].sum(dtype=np.int64))
        return total + (self.tokens(first + here, rows - here) if rows > here else 0)

    def close(self) -> None:
        """Ends the thread, after the plan that it is making."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows that a process builds, by number, as Grain reads them; there is no last one."""

    store: TokenStore
    masking: Masking
    plans: Plans
    first: int  # row of the phase
    own: np.ndarray  # of each `unit` of rows, those that this process builds
    unit: int

    def __len__(self) -> int:
        return 2**60

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        units, place = divmod(int(index), len(self.own))
        epoch, pieces = self.plans.row(self.first + units * self.unit + int(self.own[place]))
        seed = (*self.plans.seed, epoch)
        return build_row(self.store, pieces, self.masking, self.plans.sequence_length, seed)


def _read_ahead(source: _Rows, ahead: int, workers: int, threads: int) -> Iterator[dict[str, Any]]:
    ahead = max(ahead // max(workers, 1), threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    rows = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks absl, whose flags we do not use
            flags.FLAGS.mark_as_parsed()
        rows = rows.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        )
    return iter(rows)


def build_row(
    store: TokenStore,
    pieces: np.ndarray,
    masking: Masking,
    sequence_length: int,
    seed: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """One row of these pieces, masked by (*seed, piece): arrays as in Batch, and `documents`.

    Raises ValueError for an id beyond the vocabulary.
    """
    limit = predicted_positions(sequence_length, masking.rate)
    parts = [ids[:sequence_length] for ids in store.read(pieces)]
    lengths = np.array([len(part) for part in parts])
    original = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    if original.max() >= masking.vocab_size:
        raise ValueError(
            f"token ids: expected less than the tokenizer's {masking.vocab_size:,}, got "
            f"{original.max():,}; the corpus was tokenized with another tokenizer"
        )
    draws = token_draws(pieces, lengths, seed)
    picked, dropped = fit_positions(
        pick_positions(original, draws, masking), limit, (*seed, int(pieces[0]), 1)
    )
    row = {name: array[0] for name, array in _empty(1, sequence_length, limit).items()}
    row["input_ids"][: len(original)] = corrupt(original, picked, draws, masking)
    row["segment_ids"][: len(original)] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    row["predict_positions"][: len(picked)] = picked
    row["labels"][: len(picked)] = original[picked]
    row["dropped"] = np.array(dropped, np.int32)
    return row | {"documents": pieces}


def _empty(rows: int, sequence_length: int, limit: int) -> dict[str, np.ndarray]:
    """Rows of padding alone."""
    shapes = {"input_ids": (sequence_length,), "segment_ids": (sequence_length,)}
    shapes |= {"predict_positions": (limit,), "labels": (limit,), "dropped": ()}
    arrays = {name: np.zeros((rows, *shape), np.int32) for name, shape in shapes.items()}
    arrays["labels"][:] = IGNORE_INDEX
    return arrays


def _fitted(store: TokenStore, sequence_length: int) -> np.ndarray:
    """The pieces' lengths in rows of sequence_length.

    The reference's preparation makes some pieces a token or two too long and its loader cuts them;
    so are they here. Longer ones are refused.
    """
    longest = int(store.lengths.max(initial=0))
    if longest > sequence_length + sequence_length // 64 + 1:
        raise ValueError(
            f"corpus: its pieces have up to {longest:,} tokens, sequence_length is {sequence_length:,}; "
            "prepare the text again with this --sequence-length, or raise it"
        )
    if not longest:
        raise ValueError("corpus: expected pieces to train on, got none")
    return np.minimum(store.lengths, sequence_length)


def eval_batches(
    store: TokenStore, masking: Masking, config: TrainConfig, slots: np.ndarray | None = None
) -> list[dict[str, np.ndarray]]:
    """Held-out rows of one corpus under one fixed mask: batches [S, ...], at most eval_sequences rows.

    slots as in Batches; the number of batches is the same on every host.
    """
    slots = np.arange(config.micro_batch_size) if slots is None else np.asarray(slots)
    plan = plan_rows(
        _fitted(store, config.sequence_length), config.sequence_length, (config.seed, 0)
    )
    limit = predicted_positions(config.sequence_length, masking.rate)
    count = min(len(plan), config.eval_sequences)
    seed = (config.seed, 0, _EVAL_EPOCH)
    batches = []
    for first in range(0, count, config.micro_batch_size):
        arrays = _empty(len(slots), config.sequence_length, limit)
        for place, slot in enumerate(slots.tolist()):
            if slot < config.micro_batch_size and first + slot < count:
                pieces = plan.row(first + slot)
                row = build_row(store, pieces, masking, config.sequence_length, seed)
                for name, array in arrays.items():
                    array[place] = row[name]
        batches.append(arrays)
    return batches
