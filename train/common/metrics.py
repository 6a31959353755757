"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases and, at the end, curves.png."""

import io
import json
import pathlib
import tempfile
from typing import Any

from tensorboardX import SummaryWriter

from modernbert_jax.checkpoint.files import write_bytes, write_text


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    Lines of steps past resumed_step are discarded. A file in a bucket cannot be appended to: there
    both are in a local folder until `publish`. wandb: a Weights & Biases project to log to as well.
    Raises ValueError if the package wandb is missing.
    """

    def __init__(self, workdir: Any, resumed_step: int, wandb: str = ""):
        self._wandb = _wandb_run(wandb, workdir) if wandb else None
        self.workdir, self._local = workdir, workdir
        self._temporary = None
        if not isinstance(workdir, pathlib.Path):
            self._temporary = tempfile.TemporaryDirectory()
            self._local = pathlib.Path(self._temporary.name)
        kept = [line for line in read_metrics(workdir) if line["step"] <= resumed_step]
        path = self._local / "metrics.jsonl"
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)
        self._board = SummaryWriter(
            str(self._local / "tensorboard"), purge_step=resumed_step + 1, write_to_disk=True
        )

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes one line; `kind` is train or eval."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {
            f"{kind}/{k}": v
            for k, v in values.items()
            if isinstance(v, int | float) and k != "step"
        }
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def publish(self) -> None:
        """Copies all files to a workdir in a bucket."""
        self._board.flush()
        if self._local is self.workdir:
            return
        for file in sorted(p for p in self._local.rglob("*") if p.is_file()):
            target = self.workdir / str(file.relative_to(self._local))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, file.read_bytes())

    def close(self) -> None:
        """Flushes and closes all files."""
        self._file.close()
        self._board.close()
        self.publish()
        if self._wandb is not None:
            self._wandb.finish()
        if self._temporary is not None:
            self._temporary.cleanup()


def _wandb_run(project: str, workdir: Any) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "wandb: expected the package wandb, found none; pip install wandb"
        ) from None
    return wandb.init(project=project, name=workdir.name, id=workdir.name, resume="allow")


def read_metrics(workdir: Any) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without one that a crash cut short."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


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
    path = workdir / "curves.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_bytes(path, picture.getvalue())
    return path
