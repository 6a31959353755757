"""Facts about a fine-tuned model for its model card (`modernbert_jax.card`)."""

from collections.abc import Mapping
from typing import Any

from ..common.card import NOT_FOR_CARE, start_facts, versions
from ..common.settings import adapter_facts
from .config import FinetuneConfig
from .tasks.task import Task

# The hub's name of each of our metrics.
_METRICS = {"weighted_f1": "f1", "micro_f1": "f1", "f1": "f1", "accuracy": "accuracy"}


def finetuning_facts(
    config: FinetuneConfig,
    task: Task,
    examples: Mapping[str, int],
    summary: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts about the model that `finetune` saves.

    examples: their number per split. summary: the content of results.json. saved: the result.json
    of the run whose model it is.
    """
    start, settings = start_facts(config.model), saved["settings"]
    metric, seeds = task.metric, len(config.seeds)
    statistics = ("mean", "median", "std", "min", "max")
    numbers = {k: v for k, v in saved["test"].items() if isinstance(v, float)}
    step_size = settings["batch_size"] * settings["gradient_accumulation_steps"]
    return {
        "title": f"{start['name']}, fine-tuned: {task.title}",
        "base_model": start.get("base_model"),
        "metrics": [_METRICS[metric]],
        "training": {
            "Task": f"{task.title}" + f" ({task.homepage})" * bool(task.homepage),
            "Start": start["name"],
            "Examples": [f"{count:,} {split}" for split, count in examples.items()],
            "Learning rate": f"{settings['learning_rate']:g}, linear decay to 0",
            **adapter_facts(config),
            "Weight decay": settings["weight_decay"],
            "Epochs": f"{settings['epochs']}; best by validation: {saved['best_epoch']}",
            "Examples per step": step_size,
            "Maximum length": f"{settings['max_length']:,} tokens",
            "Seed": settings["seed"],
            "Trained with": versions() if config.backend == "jax" else "transformers and torch",
        },
        "tables": {
            f"Test {metric} over {seeds} seeds, in percent": [
                {"settings": point["point"]}
                | {name: f"{100 * point['test'][metric][name]:.2f}" for name in statistics}
                for point in summary["points"]
            ],
            "This model, in percent": [
                {"split": "validation", metric: f"{100 * saved['validation'][metric]:.2f}"},
                {"split": "test", **{k: f"{100 * v:.2f}" for k, v in numbers.items()}},
            ],
        },
        "limits": [NOT_FOR_CARE],
    }
