"""Packs the texts of concurrent requests into rows: one thread computes, row after row."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from modernbert_jax.packing import SLOT_TOKENS
from modernbert_jax.untrusted import panics_as_errors

WINDOW = 1024  # waiting texts that are considered for a row, from the oldest on


def row_costs(tokens: Sequence[int]) -> list[int]:
    """Returns how many tokens of a row each text takes: at least those of a segment slot."""
    return [max(count, SLOT_TOKENS) for count in tokens]


class QueueFull(Exception):
    """The tokens of a request do not fit into the queue now. seconds: when they may."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """The batcher no longer accepts work."""


@dataclasses.dataclass(eq=False)
class Job:
    """The texts of one request. `future` gets the list of their results, or the error of one."""

    key: Hashable
    values: Sequence[Any]
    tokens: Sequence[int]  # per value, as they count for a row
    waiting: list[int] = dataclasses.field(default_factory=list)  # indices of values
    results: dict[int, Any] = dataclasses.field(default_factory=dict)
    future: Future[list[Any]] = dataclasses.field(default_factory=Future)


class Batcher:
    """Runs `run(key, values)` in one thread on rows of texts of any waiting requests.

    A row begins with the oldest text that waits; of the others with the same key, the longest that
    still fit follow, up to `row_tokens` in total. Each text counts as SLOT_TOKENS at least, so a
    row never needs more segment slots than its length provides. A text longer than row_tokens is a
    row of its own.

    If `run` raises, each text of the row runs alone, and only the requests whose texts raise again
    fail. At most `queue_tokens` are accepted at a time; what is computed now counts.
    """

    def __init__(
        self,
        run: Callable[[Any, Sequence[Any]], Sequence[Any]],
        row_tokens: int,
        queue_tokens: int,
        observe: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None,
    ):
        """observe: called after each row with its texts, its tokens and the seconds it took."""
        self.row_tokens, self.queue_tokens = row_tokens, queue_tokens
        self._run, self._observe = run, observe
        self._jobs: dict[Job, None] = {}  # those with waiting texts, the oldest first
        self._queued = 0  # tokens that wait or run
        self._speed = 0.0  # tokens per second of the last rows; 0: none has run
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="rows", daemon=True)
        self._thread.start()

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait or are being computed."""
        return self._queued

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, key: Hashable, values: Sequence[Any], tokens: Sequence[int]) -> Job:
        """Accepts texts. Only those with equal keys share a row.

        Raises QueueFull, and Closed after `close`.
        """
        job = Job(key, values, row_costs(tokens))
        job.waiting = list(range(len(values)))
        total = sum(job.tokens)
        with self._wake:
            if self._closed:
                raise Closed
            if self._queued + total > self.queue_tokens:
                speed = self._speed or self.queue_tokens
                seconds = (self._queued + total - self.queue_tokens) / speed
                raise QueueFull(min(max(math.ceil(seconds), 1), 60))
            job.future.set_running_or_notify_cancel()  # from here on only the thread ends it
            self._queued += total
            self._jobs[job] = None
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Drops the texts of a request that still wait."""
        with self._wake:
            self._drop(job)

    def close(self) -> None:
        """Accepts nothing more, computes what waits, and ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _drop(self, job: Job) -> None:
        self._jobs.pop(job, None)
        self._queued -= sum(job.tokens[i] for i in job.waiting)
        job.waiting = []

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs:
                    if self._closed:
                        return
                    self._wake.wait()
                row = self._take()
            began = time.monotonic()
            for (job, index), result in zip(row, self._results(row), strict=True):
                self._finish(job, index, result)
            tokens = sum(job.tokens[index] for job, index in row)
            seconds = max(time.monotonic() - began, 1e-6)
            with self._wake:
                self._queued -= tokens
                self._speed = 0.8 * (self._speed or tokens / seconds) + 0.2 * tokens / seconds
            self._observe(len(row), tokens, seconds)

    def _take(self) -> list[tuple[Job, int]]:
        """Removes the texts of the next row from those that wait."""
        oldest = next(iter(self._jobs))
        row = [(oldest, oldest.waiting[0])]
        room = self.row_tokens - oldest.tokens[oldest.waiting[0]]
        others = itertools.islice(self._waiting(oldest.key), 1, WINDOW)
        for job, index in sorted(others, key=lambda item: -item[0].tokens[item[1]]):
            if job.tokens[index] <= room:
                row.append((job, index))
                room -= job.tokens[index]
        taken: dict[Job, set[int]] = {}
        for job, index in row:
            taken.setdefault(job, set()).add(index)
        for job, indices in taken.items():
            job.waiting = [index for index in job.waiting if index not in indices]
            if not job.waiting:
                del self._jobs[job]
        return row

    def _waiting(self, key: Hashable) -> Iterator[tuple[Job, int]]:
        for job in self._jobs:
            if job.key == key:
                for index in job.waiting:
                    yield job, index

    def _results(self, row: list[tuple[Job, int]]) -> list[Any]:
        """The result of each text of a row, or the exception that it raised."""
        try:
            return self._values(row)
        except Exception as error:
            if len(row) == 1:
                return [error]
        found: list[Any] = []
        for item in row:
            try:
                found += self._values([item])
            except Exception as error:
                found.append(error)
        return found

    def _values(self, row: list[tuple[Job, int]]) -> list[Any]:
        with panics_as_errors():
            values = [job.values[index] for job, index in row]
            results = list(self._run(row[0][0].key, values))
        if len(results) != len(row):
            raise RuntimeError(f"expected {len(row)} results, got {len(results)}")
        return results

    def _finish(self, job: Job, index: int, result: Any) -> None:
        if job.future.done():
            return
        if isinstance(result, Exception):
            with self._wake:
                self._drop(job)
            job.future.set_exception(result)
            return
        job.results[index] = result
        if len(job.results) == len(job.values):
            job.future.set_result([job.results[i] for i in range(len(job.values))])
