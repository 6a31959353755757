"""Facts about a fine-tuned model for its model card (`modernbert_jax.card`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.card import NOT_FOR_CARE, start_facts, versions
from .tasks.task import Task

if TYPE_CHECKING:  # run.py imports this module
    from .run import FinetuneConfig

# The hub's name of each of our metrics.
_METRICS = {"weighted_f1": "f1", "micro_f1": "f1", "f1": "f1", "accuracy": "accuracy"}


def finetuning_facts(
    config: "FinetuneConfig",
    task: Task,
    examples: Mapping[str, int],
    summary: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts of the model that `finetune` keeps.

    examples: how many by split. summary: as results.json has it. saved: the result.json of the run
    whose model it is.
    """
    start, settings = start_facts(config.model), saved["settings"]
    metric, seeds = task.metric, len(config.seeds)
    ways = ("mean", "median", "std", "min", "max")
    numbers = {k: v for k, v in saved["test"].items() if isinstance(v, float)}
    return {
        "title": f"{start['name']}, fine-tuned: {task.title}",
        "base_model": start.get("base_model"),
        "metrics": [_METRICS[metric]],
        "training": {
            "Task": f"{task.title}" + f" ({task.homepage})" * bool(task.homepage),
            "Start": start["name"],
            "Examples": [f"{count:,} {split}" for split, count in examples.items()],
            "Learning rate": f"{settings['lr']:g}, falling to 0 in a straight line",
            "Weight decay": settings["weight_decay"],
            "Epochs": f"{settings['epochs']}, the best by validation kept: {saved['best_epoch']}",
            "Examples of a step": settings["batch"] * settings["accumulation"],
            "Longest text": f"{settings['max_length']:,} tokens",
            "Seed": settings["seed"],
            "Trained with": versions() if config.backend == "jax" else "transformers and torch",
        },
        "tables": {
            f"Test {metric} over {seeds} seeds, per cent": [
                {"settings": point["point"]}
                | {way: f"{100 * point['test'][metric][way]:.2f}" for way in ways}
                for point in summary["points"]
            ],
            "This model, per cent": [
                {"split": "validation", metric: f"{100 * saved['validation'][metric]:.2f}"},
                {"split": "test", **{k: f"{100 * v:.2f}" for k, v in numbers.items()}},
            ],
        },
        "limits": [NOT_FOR_CARE],
    }
