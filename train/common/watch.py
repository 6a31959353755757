"""Watching a run: norms by kind of weight, loss spikes, stalls, goodput, a profiler's window."""

import collections
import contextlib
import faulthandler
import json
import math
import os
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.weights import weight_of


def norms_by_kind(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """L2 norm of the parameters (or gradients) {path: array} of each kind, float32 scalars.

    For use under jit; leaves may be sharded. The squares add up to the square of the global norm.
    """
    squares: dict[str, Any] = collections.defaultdict(lambda: jnp.zeros((), jnp.float32))
    for path, leaf in tree.items():
        squares[weight_of(path).kind] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {kind: jnp.sqrt(square) for kind, square in squares.items()}


class Spikes:
    """Tells when a loss stands out above the last `window` of them.

    A spike is more than `factor` standard deviations above the median, the deviation being that of
    the median absolute deviation and at least 1 % of the median. Neither is moved by a few spikes;
    a level that stays becomes the new median. After a resume it starts over.
    """

    def __init__(self, window: int = 200, factor: float = 6.0):
        self.factor = factor
        self.losses: collections.deque[float] = collections.deque(maxlen=window)
        self.inside = False

    def __call__(self, step: int, loss: float) -> str | None:
        """A message at the first step of a spike, else None."""
        was_inside, message = self.inside, None
        if len(self.losses) >= 20:  # fewer do not tell what is usual
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            spread = max(spread, 0.01 * abs(median))
            self.inside = not loss <= median + self.factor * spread
            message = (
                f"step {step}: loss spike: {loss:.3f}, where the median of the last "
                f"{len(self.losses)} steps is {median:.3f} (spread {spread:.3f})"
            )
        self.losses.append(loss)
        return message if self.inside and not was_inside else None


class Stall:
    """Says on stderr where this host stands when no step has been done for `minutes`.

    Host number, `where()` and the stacks of all threads (files, lines and functions, no values),
    again every further `minutes`. A thread that waits inside a C call is listed by the Python line
    that made it. 0 minutes: never.
    """

    def __init__(
        self, minutes: float, where: Callable[[], str], file: TextIO | None = None, host: int = 0
    ):
        self.seconds, self.where, self.host = 60.0 * minutes, where, host
        # A file with a descriptor: sys.stderr of a notebook has none.
        self.file = file or sys.__stderr__ or sys.stderr
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
        if minutes > 0:
            self._thread.start()

    def beat(self) -> None:
        """A step was done."""
        self._beat = time.monotonic()

    def _watch(self) -> None:
        told, due = self._beat, self._beat + self.seconds
        while not self._stop.wait(max(due - time.monotonic(), 0.0)):
            if self._beat != told:
                told, due = self._beat, self._beat + self.seconds
            elif time.monotonic() >= due:
                self._tell()
                due += self.seconds

    def _tell(self) -> None:
        try:
            place = self.where()
        except Exception as error:  # the stacks matter more
            place = f"where: {type(error).__name__}"
        minutes = (time.monotonic() - self._beat) / 60
        print(
            f"host {self.host}: no step for {minutes:.1f} minutes; {place}",
            file=self.file,
            flush=True,
        )
        faulthandler.dump_traceback(self.file, all_threads=True)

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


class Goodput:
    """The share of a run's wall time that went into steps that were kept, across restarts.

    Each second since the very first start belongs to one kind. A ledger holds them, a line of JSON
    at each start and each saved checkpoint:

        {"start": unix seconds, "step": 1200}
        {"time": unix seconds, "step": 1400, "starting": s, "steps": s, "waiting": s, ...}

    What is not in it is unproductive: the steps between the last checkpoint and a crash, and the
    time until the restart. So are the lines beyond the step that a restart begins at. A last line
    cut short by a crash is left out. For one thread.
    """

    KINDS: tuple[str, ...] = ("starting", "steps", "waiting", "saving", "evaluating", "compiling")

    def __init__(
        self,
        path: Any,
        step: int,
        now: Callable[[], float] = time.time,
    ):
        """path: pathlib's or epath's; None on all hosts but one: they write nothing. step: done."""
        self.path = path
        self.now = now
        self.lines = [] if self.path is None else _read_ledger(self.path)
        self.kind, self._since = "starting", now()
        self._seconds: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)
        if isinstance(path, pathlib.Path) and path.exists():
            if not path.read_bytes().endswith(b"\n"):  # cut short: keep it a line of its own
                self._append("\n")
        self._write({"start": self._since, "step": step})

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Time in here is of that kind, but for what is inside another `doing`."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def commit(self, step: int) -> None:
        """The state after `step` is safe, and with it the time until now. Call after each save."""
        self._switch(self.kind)
        self._write({"time": self._since, "step": step, **self._seconds})
        self._seconds = dict.fromkeys(self.KINDS, 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds by kind over all starts but for lost steps, and "wall" since the first start."""
        self._switch(self.kind)
        kept: list[dict[str, Any]] = []
        for line in self.lines:
            if "start" in line:  # goes on from here: later work is done again
                kept = [k for k in kept if k["step"] <= line["step"]]
            else:
                kept.append(line)
        kept.append(self._seconds)
        first = next(line["start"] for line in self.lines if "start" in line)
        sums = {kind: math.fsum(k.get(kind, 0.0) for k in kept) for kind in self.KINDS}
        return sums | {"wall": self._since - first}

    def share(self) -> float:
        """Seconds in steps over wall seconds since the very first start; 0 at that moment."""
        seconds = self.seconds()
        return seconds["steps"] / seconds["wall"] if seconds["wall"] > 0 else 0.0

    def _switch(self, kind: str) -> str:
        now, outer = self.now(), self.kind
        self._seconds[outer] += now - self._since
        self.kind, self._since = kind, now
        return outer

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if isinstance(self.path, pathlib.Path):
            self._append(json.dumps(line) + "\n")
        elif self.path is not None:  # in a bucket a file cannot grow
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)


def _read_ledger(path: Any) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


class Profile:
    """jax.profiler from the start of step `first`, for `steps` steps, into `folder`; 0: never.

    Read it with `tensorboard --logdir FOLDER` (its profile plug-in) or xprof.
    """

    def __init__(self, first: int, steps: int, folder: str | os.PathLike):
        self.first, self.last, self.folder = first, first + steps, os.fspath(folder)
        self.running = False

    def before(self, step: int, pending: Any = None) -> None:
        """To be called before each step. pending: the last step's arrays, waited for at the end."""
        if self.running and step >= self.last:
            jax.block_until_ready(pending)
            self.close()
        elif self.first and step == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def close(self) -> None:
        """Ends a window that is still open."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
