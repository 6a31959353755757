"""Where numbers go: metrics.jsonl, TensorBoard and, at the end, curves.png."""

import json
import pathlib
from typing import Any

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; a resumed run drops later steps."""

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= resumed_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = open(self.path, "a", buffering=1)
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resumed_step + 1, write_to_disk=True
        )

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line; `kind` is train or eval."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one cut short by a crash is left out."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def plot(workdir: pathlib.Path, baselines: dict[str, float]) -> pathlib.Path:
    """WORKDIR/curves.png: loss, masked accuracy and learning rate over tokens.

    baselines: phase name -> accuracy of always guessing the commonest token.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(workdir)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
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
    axes[0].set_ylabel("nats a masked token")
    axes[1].legend(fontsize=8)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
