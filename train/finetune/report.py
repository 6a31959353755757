"""The summary, the table and the curves of all runs of a command."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .config import FinetuneConfig
from .tasks.task import Task

STATISTICS = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max}


def point_name(config: FinetuneConfig, point: FinetuneConfig) -> str:
    """The name of a point of the grid of `config`, such as learning_rate=1e-05_epochs=3."""
    names = [item.partition("=")[0] for item in config.grid]
    return "_".join(f"{name}={getattr(point, name):g}" for name in names) or "default"


def summarize(
    config: FinetuneConfig, task: Task, labels: Sequence[str], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of results.json. results: of all seeds of the first point, then of the next."""
    n = len(config.seeds)
    return {
        "task": config.task,
        "model": config.model,
        "backend": config.backend,
        "metric": task.metric,
        "labels": list(labels),
        "points": [
            _summarize_point(point_name(config, point), results[i * n : (i + 1) * n])
            for i, point in enumerate(config.points())
        ],
    }


def _summarize_point(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics over the seeds of every number among the test scores."""
    tests = [{k: v for k, v in r["test"].items() if isinstance(v, int | float)} for r in results]
    scores = {}
    for key in tests[0]:
        values = [test[key] for test in tests]
        scores[key] = {statistic: float(f(values)) for statistic, f in STATISTICS.items()}
        scores[key]["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "point": name,
        "seeds": [r["settings"]["seed"] for r in results],
        "validation": float(np.mean([next(iter(r["validation"].values())) for r in results])),
        "test": scores,
        "seconds": float(np.mean([r["seconds"] for r in results])),
    }


def table(task: Task, summary: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Markdown: the test scores of each point, the published ones, and the best run per label."""
    lines = [
        f"# {task.title}",
        "",
        f"Test {task.metric} in percent; {summary['model']} ({summary['backend']})",
        "",
        *_markdown("settings seeds mean median std min max validation seconds/run".split(), [
            [
                point["point"],
                len(point["seeds"]),
                *_percent(point["test"][task.metric], "mean median std min max", 2),
                f"{100 * point['validation']:.2f}",
                f"{point['seconds']:.0f}",
            ]
            for point in summary["points"]
        ]),
    ]  # fmt: skip
    if task.published:
        lines += ["", *_markdown(["published", "test"], task.published.items())]
    best = max(results, key=lambda r: r["validation"][task.metric])
    if per_label := best["test"].get("per_label"):
        lines += ["", f"Per label, seed {best['settings']['seed']}:", ""]
        lines += _markdown(["label", "precision", "recall", "f1", "support"], [
            [label, *_percent(s, "precision recall f1", 1), s["support"]]
            for label, s in per_label.items()
        ])  # fmt: skip
    if "confusion" in best["test"]:
        names, rows = summary["labels"], best["test"]["confusion"]
        lines += ["", "Confusion matrix (one row per true label):", ""]
        lines += _markdown(["", *names], [[n, *row] for n, row in zip(names, rows, strict=True)])
    return "\n".join(lines) + "\n"


def _percent(scores: dict[str, float], names: str, digits: int) -> list[str]:
    return [f"{100 * scores[name]:.{digits}f}" for name in names.split()]


def _markdown(header: Sequence[str], rows: Any) -> list[str]:
    rule = ["---"] * len(header)
    return [f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows)]


def _cell(value: Any) -> str:
    """One line that fits into a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def plot(path: pathlib.Path, metric: str, names: list[str], results: list[dict[str, Any]]) -> None:
    """Writes the training loss and the validation score of every run as a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's figures

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in zip(names, results, strict=True):
        steps = np.arange(1, len(result["losses"]) + 1)
        left.plot(steps, result["losses"], lw=0.9, label=name)
        epochs = result["epochs"]
        right.plot([e["epoch"] for e in epochs], [e[metric] for e in epochs], "o-")
    left.set(xlabel="step", title="training loss")
    right.set(xlabel="epoch", title=f"validation {metric}")
    if len(names) <= 10:
        left.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
