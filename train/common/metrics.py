"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases and, at the end, curves.png."""

import contextlib
import importlib.util
import io
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # made when it is imported
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.summary import scalar

from modernbert_jax.checkpoint.files import write_bytes, write_text

from .records import naming, read_lines


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    Lines of steps past resumed_step are discarded. A file in a bucket cannot be appended to: there
    both are in a local folder until `publish`. wandb: a Weights & Biases project to log to as well.
    Raises OSError if metrics.jsonl cannot be written.
    TensorBoard and Weights & Biases are extras: the first failure of one is told on stderr and
    switches it off.
    """

    def __init__(self, workdir: Any, resumed_step: int, wandb: str | None = None):
        self._wandb = _Extra("Weights & Biases", _wandb_run(wandb, workdir)) if wandb else None
        self.workdir, self._local = workdir, workdir
        self._temporary = None
        if not isinstance(workdir, pathlib.Path):
            self._temporary = tempfile.TemporaryDirectory()
            self._local = pathlib.Path(self._temporary.name)
        kept = [line for line in read_metrics(workdir) if line["step"] <= resumed_step]
        path = self._local / "metrics.jsonl"
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)
        self._board = _Extra("TensorBoard")
        self._board.do(lambda _: self._open_board(resumed_step + 1))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes one line; `kind` is train or eval."""
        with naming(self._local / "metrics.jsonl"):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {
            f"{kind}/{k}": v
            for k, v in values.items()
            if isinstance(v, int | float) and k != "step"
        }
        self._board.do(lambda board: _add_scalars(board, numbers, step))
        if self._wandb is not None:
            self._wandb.do(lambda run: run.log(numbers, step=step))

    def _open_board(self, first_step: int) -> None:
        """Opens the event file. Events of earlier starts from first_step on are discarded."""
        folder = self._local / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Written in this thread: SummaryWriter has one of its own, behind a bounded queue that
        # blocks for ever once a full disk has ended the thread.
        self._board.value = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        event = Event(step=first_step, session_log=start, wall_time=time.time())
        self._board.value.write_event(event)

    def publish(self) -> None:
        """Copies all files to a workdir in a bucket."""
        self._board.do(lambda board: board.flush())
        if self._local is self.workdir:
            return
        for file in sorted(p for p in self._local.rglob("*") if p.is_file()):
            target = self.workdir / str(file.relative_to(self._local))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, file.read_bytes())

    def close(self) -> None:
        """Flushes and closes all files."""
        try:
            with naming(self._local / "metrics.jsonl"):
                self._file.close()
            self.publish()
        finally:
            self._board.end(lambda board: board.close())
            if self._wandb is not None:
                self._wandb.end(lambda run: run.finish())
            if self._temporary is not None:
                self._temporary.cleanup()


class _Extra:
    """A place for metrics that the run can do without; value: what writes there."""

    def __init__(self, name: str, value: Any = None):
        self.name, self.value, self._failed = name, value, False

    def do(self, action: Callable[[Any], None]) -> None:
        """Calls action(value), unless an earlier call has failed."""
        if self._failed:
            return
        try:
            action(self.value)
        except Exception as error:  # those of the network, of the disk, of wandb itself
            self._failed = True
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            print(
                f"warning: {self.name} is switched off for the rest of this start ({reason}); "
                "metrics.jsonl has every number",
                file=sys.stderr,
            )

    def end(self, action: Callable[[Any], None]) -> None:
        """Calls action(value) also after a failure, whose consequences are not told again."""
        if self._failed and self.value is not None:
            with contextlib.suppress(Exception):
                action(self.value)
        self.do(action)


def _add_scalars(board: EventsWriter, numbers: dict[str, Any], step: int) -> None:
    for name, value in numbers.items():
        board.write_event(Event(step=step, summary=scalar(name, value), wall_time=time.time()))


def check_wandb(project: str | None) -> None:
    """Raises ValueError if a project is given and the package wandb is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: expected the package wandb, found none; pip install wandb")


def _wandb_run(project: str, workdir: Any) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb.init(project=project, name=workdir.name, id=workdir.name, resume="allow")


def read_metrics(workdir: Any) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; one that is damaged or cut short is left out."""
    return read_lines(workdir / "metrics.jsonl", "kind", "step")


def plot(workdir: Any, baselines: dict[str, float]) -> Any:
    """Writes WORKDIR/curves.png: loss, masked accuracy and learning rate over tokens.

    baselines: {phase: accuracy of always predicting the commonest token}.
    """
    from matplotlib.figure import Figure  # pyplot would change a notebook's settings

    lines = read_metrics(workdir)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("loss", "accuracy", "learning_rate"), strict=True):
        for kind, style in (("train", "-"), ("eval", "o-")):
            part = [m for m in lines if m["kind"] == kind and name in m]
            if part:
                x = [m["total_tokens"] / 1e6 for m in part]
                axis.plot(x, [m[name] for m in part], style, label=kind, markersize=4, lw=1.2)
        axis.set(xlabel="tokens (millions)", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    for phase, value in baselines.items():
        axes[1].axhline(value, color="grey", ls=":", label=f"unigram ({phase})")
    previous = None
    for line in (m for m in lines if m["kind"] == "train"):
        if previous is not None and line["phase"] != previous["phase"]:
            for axis in axes:
                axis.axvline(previous["total_tokens"] / 1e6, color="grey", lw=0.8)
        previous = line
    axes[0].set_ylabel("nats per masked token")
    axes[1].legend(fontsize=8)
    return save_figure(figure, workdir / "curves.png")


def save_figure(figure: Any, path: Any) -> Any:
    """Writes a figure of matplotlib as PNG, also to a bucket, and returns the path."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_bytes(path, picture.getvalue())
    return path
