"""Monitoring of a run: norms by kind of weight, loss spikes, stalls, goodput, profiler window."""

import collections
import contextlib
import faulthandler
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.weights import weight_of

from .records import naming, read_lines


def norms_by_kind(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the L2 norm of the parameters (or gradients) {path: array} of each kind, float32.

    For use under jit; leaves may be sharded. The squares add up to the square of the global norm.
    """
    squares: dict[str, Any] = collections.defaultdict(lambda: jnp.zeros((), jnp.float32))
    for path, leaf in tree.items():
        squares[weight_of(path).kind] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {kind: jnp.sqrt(square) for kind, square in squares.items()}


class Spikes:
    """Flags loss spikes: losses far above the last `window` losses.

    A spike is more than `factor` standard deviations above the median, where the deviation is
    estimated from the median absolute deviation and is at least 1 % of the median. A few spikes
    move neither; a level that stays becomes the new median. A resumed run starts without losses.
    """

    def __init__(self, window: int = 200, factor: float = 6.0):
        self.factor = factor
        self.losses: collections.deque[float] = collections.deque(maxlen=window)
        self.inside = False

    def __call__(self, step: int, loss: float) -> str | None:
        """Returns a message at the first step of a spike, else None."""
        was_inside, message = self.inside, None
        if len(self.losses) >= 20:  # too few losses to estimate the spread otherwise
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            spread = max(spread, 0.01 * abs(median))
            self.inside = not loss <= median + self.factor * spread
            message = (
                f"step {step}: loss spike: {loss:.3f}; the last {len(self.losses)} steps have "
                f"median {median:.3f}, spread {spread:.3f}"
            )
        self.losses.append(loss)
        return message if self.inside and not was_inside else None


class Stall:
    """Dumps the stacks of all threads to stderr when no step completes for `minutes`.

    It repeats every further `minutes`; None turns it off. Stacks name files, lines and functions,
    and no values. `faulthandler` writes them from a thread without Python, so that a stall inside a
    C call that holds the interpreter lock is shown as well.
    """

    def __init__(self, minutes: float | None, file: TextIO | None = None):
        self.seconds = 60.0 * (minutes or 0.0)
        # A notebook's sys.stderr has no file descriptor.
        self.file = file or sys.__stderr__ or sys.stderr
        self.beat()

    def beat(self) -> None:
        """Restarts the wait: a step was completed."""
        if self.seconds > 0:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self.file)

    def close(self) -> None:
        """Ends the monitoring."""
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()


class Goodput:
    """The share of a run's wall time that went into steps that were kept, across restarts.

    Each second since the very first start belongs to one kind. A ledger file holds them, one line
    of JSON per start and per saved checkpoint:

        {"start": unix seconds, "step": 1200}
        {"time": unix seconds, "step": 1400, "starting": s, "steps": s, "waiting": s, ...}

    Time that is not in the ledger is unproductive: steps between the last checkpoint and a crash,
    and the time until the restart. Entries past the step we restart from are discarded, as is a
    last line that a crash cut short. For use by a single thread.
    """

    KINDS: tuple[str, ...] = ("starting", "steps", "waiting", "saving", "evaluating", "compiling")

    def __init__(self, path: Any, step: int, now: Callable[[], float] = time.time):
        """path: a path of pathlib or epath; None writes no file, on all hosts but one.

        step: the last completed step.
        """
        self.path = path
        self.now = now
        self.lines = [] if self.path is None else read_lines(self.path, "step")
        self.kind, self._since = "starting", now()
        self._seconds: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)
        self._spent: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)  # since this start
        if isinstance(path, pathlib.Path) and path.exists():
            if not path.read_bytes().endswith(b"\n"):  # cut short: keep it a line of its own
                self._append("\n")
        self._write({"start": self._since, "step": step})

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Counts the time inside as this kind, except what is inside a nested `doing`."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def commit(self, step: int) -> None:
        """Records the time until now; to be called after the state of `step` has been saved."""
        self._switch(self.kind)
        self._write({"time": self._since, "step": step, **self._seconds})
        self._seconds = dict.fromkeys(self.KINDS, 0.0)

    def seconds(self) -> dict[str, float]:
        """Returns seconds by kind without lost steps, and "wall" since the very first start."""
        self._switch(self.kind)
        kept: list[dict[str, Any]] = []
        for line in self.lines:
            if "start" in line:  # steps after this one are done again
                kept = [k for k in kept if k["step"] <= line["step"]]
            else:
                kept.append(line)
        kept.append(self._seconds)
        first = next(line["start"] for line in self.lines if "start" in line)
        sums = {kind: math.fsum(k.get(kind, 0.0) for k in kept) for kind in self.KINDS}
        return sums | {"wall": self._since - first}

    def since_start(self) -> dict[str, float]:
        """Returns seconds by kind since this start."""
        self._switch(self.kind)
        return dict(self._spent)

    def share(self) -> float:
        """Returns seconds in steps over wall seconds since the very first start; 0 at that time."""
        seconds = self.seconds()
        return seconds["steps"] / seconds["wall"] if seconds["wall"] > 0 else 0.0

    def _switch(self, kind: str) -> str:
        now, outer = self.now(), self.kind
        for seconds in (self._seconds, self._spent):
            seconds[outer] += now - self._since
        self.kind, self._since = kind, now
        return outer

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if isinstance(self.path, pathlib.Path):
            self._append(json.dumps(line) + "\n")
        elif self.path is not None:  # a file in a bucket cannot be appended to
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _append(self, text: str) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(text)


class Profile:
    """Runs jax.profiler for `steps` steps from step `first` on, into `folder`; None: never.

    Read it with `tensorboard --logdir FOLDER` (its profile plug-in) or xprof.
    """

    def __init__(self, first: int | None, steps: int, folder: str | os.PathLike):
        self.first, self.last, self.folder = first, (first or 0) + steps, os.fspath(folder)
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
