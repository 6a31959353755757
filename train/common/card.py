"""What a run says of itself in the model card that it writes: facts for `modernbert_jax.card`.

A corpus or checkpoint is called by its name, never by a path of the machine, and no text of a
document is among the facts. What a run does not know, such as the licence, stays out.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modernbert_jax

from ..corpora.sources import GENERIC, find
from ..finetune.tasks.task import Task
from ..pretrain.config import Phase, TrainConfig
from ..tokens.store import TokenStore, manifest_of

if TYPE_CHECKING:  # they import this module
    from ..finetune.retrieval import RetrievalConfig
    from ..finetune.run import FinetuneConfig

_NOT_FOR_CARE = "Not tested for use in care; test it on your own data."
# A task's metric as the hub calls it.
_METRICS = {"weighted_f1": "f1", "micro_f1": "f1", "f1": "f1", "accuracy": "accuracy"}
# Folders inside a run's workdir: the name that says something is above them.
_PARTS = ("checkpoints", "export", "model")


def start_facts(start: str) -> dict[str, Any]:
    """{"base_model", "name"} of a checkpoint to start from; a folder has a name alone."""
    path = pathlib.Path(start).expanduser()
    if not path.exists():
        try:
            validate_repo_id(start)
            return {"base_model": start, "name": start}
        except HFValidationError:  # a folder that is gone by now
            pass
    return {"name": _name(path)}


def _name(path: pathlib.Path) -> str:
    """The last part of a path that says something, and the step of a run's checkpoint."""
    parts = [p for p in path.parts if p not in _PARTS and not p.isdigit()]
    name = parts[-1] if parts else path.name
    return f"{name}, step {int(path.name):,}" if path.name.isdigit() and parts else name


def versions() -> str:
    """The versions of what trained."""
    return ", ".join(f"{m.__name__} {m.__version__}" for m in (modernbert_jax, jax, flax))


# Pretraining.


def pretraining_facts(
    config: TrainConfig,
    result: Mapping[str, Any],
    stores: Sequence[Mapping[str, Mapping[str, TokenStore]]],
    *,
    recipe: str,
    hardware: str,
) -> dict[str, Any]:
    """Facts of a finished run. result: as result.json has it. stores: each phase's, by corpus.

    recipe: the name of its experiment in train/configs, or empty. hardware: devices and mesh.
    """
    start = start_facts(config.init_from) if config.init_from else {"name": "random weights"}
    optimizer, model = config.optimizer, config.model
    paths = {
        pathlib.PurePath(path).name: path
        for phase in config.phases
        for path in phase.corpus or config.corpus
    }
    sources = {name: _source(paths.get(_last(name), "")) for parts in stores for name in parts}
    return {
        "base_model": start.get("base_model"),
        "metrics": ["accuracy"],
        "training": {
            "Task": "masked language modelling on packed rows",
            **({"Recipe": recipe} if recipe else {}),
            "Start": start["name"] + " with its moments" * config.init_optimizer,
            "Tokens seen": result["total_tokens"],
            "Steps": result["steps"],
            "Rows of a step": f"{config.global_batch_size} of {config.sequence_length:,} tokens",
            "Optimizer": (
                f"StableAdamW, betas {optimizer.b1:g} and {optimizer.b2:g}, eps {optimizer.eps:g}, "
                f"weight decay {optimizer.weight_decay:g}"
            ),
            "Computed in": model.dtype,
            "Dropout of the attention's output": model.attention_out_dropout,
            "Seed": config.seed,
            "Hardware": hardware,
            "Versions": versions(),
        },
        "tables": {
            "Phases": [
                {
                    "phase": phase.name,
                    "tokens": phase.tokens,
                    "mask rate": f"{phase.mlm_probability:.0%}",
                    "peak learning rate": phase.learning_rate,
                    "schedule": schedule_of(phase),
                    "corpora": [_last(name) for name in parts],
                }
                for phase, parts in zip(config.phases, stores, strict=True)
            ],
            "Corpora": [
                {"corpus": _last(name), **about, "tokens to train on": tokens}
                for name, about in sources.items()
                for tokens in [next(_tokens(p[name]) for p in stores if name in p)]
            ],
            f"Held-out text, masked at {config.eval_mlm_probability:.0%}": _held_out(
                result["phases"]
            ),
        },
        "limits": [*_agreements(sources), _NOT_FOR_CARE],
    }


def _last(name: str) -> str:
    return pathlib.PurePath(name).name


def _tokens(store: Mapping[str, TokenStore]) -> int:
    return int(store["train"].lengths.sum(dtype="int64"))


def _source(path: str) -> dict[str, Any]:
    """What the manifest of a corpus says of its source, where `prepare` made it from one."""
    manifest = manifest_of(path) if path else {}
    if not manifest.get("source") or manifest["source"] in GENERIC:
        return {}
    return {name: manifest[name] for name in ("source", "title", "licence", "documents")}


def _agreements(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What one must have signed for the corpora, which may hold for the weights as well."""
    found = [find(about["source"]) for about in sources.values() if about]
    return [
        f"Trained on {source.title} (access: {source.access}): its terms may hold for the weights."
        for source in found
        if source.access != "open"
    ]


def schedule_of(phase: Phase) -> str:
    """The learning rate of a phase in words."""
    parts = [f"warm-up over {phase.warmup_tokens:,} tokens"] if phase.warmup_tokens else []
    if phase.warmup_tokens + phase.decay_tokens < phase.tokens:
        parts.append("constant")
    if phase.decay_tokens:
        shape = {"one_minus_sqrt": "1 - sqrt", "linear": "linear"}[phase.decay]
        parts.append(f"{shape} decay over the last {phase.decay_tokens:,} tokens")
    return ", then ".join(parts)


def _held_out(phases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each phase, and for each of its corpora where there are several."""
    rows = []
    for scores in phases:
        names = [key.removesuffix("loss") for key in scores if key.endswith("/loss")]
        for prefix in ["", *names]:
            row = {
                "phase": scores["phase"],
                "corpus": _last(prefix) or "all",
                "loss, nats": f"{scores[f'{prefix}loss']:.3f}",
                "accuracy": f"{scores[f'{prefix}accuracy']:.1%}",
            }
            if not prefix:
                row["commonest token"] = f"{scores['unigram_accuracy']:.1%}"
            rows.append(row)
    return rows


# Fine-tuning.


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
        "limits": [_NOT_FOR_CARE],
    }


def retrieval_facts(
    config: "RetrievalConfig",
    pairs: int,
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    """Facts of a bi-encoder. before and after: its scores, empty without judgements."""
    start = start_facts(config.model)
    return {
        "title": f"{start['name']}, trained for retrieval",
        "base_model": start.get("base_model"),
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction"],
        "training": {
            "Task": "retrieval: each query picks its document among all of a step",
            "Start": start["name"],
            "Pairs": pairs,
            "Steps": steps,
            "Pairs of a step": config.batch,
            "Learning rate": f"{config.lr:g}",
            "Temperature": config.temperature,
            "Pooling": f"{config.pooling}, then length 1",
            "Longest text": f"{config.max_length:,} tokens",
            "Seed": config.seed,
            "Versions": versions(),
        },
        "tables": {
            "Scores": [
                {"score": name, "before": f"{before[name]:.4f}", "after": f"{after[name]:.4f}"}
                for name in after
            ]
        },
        "limits": [_NOT_FOR_CARE],
    }
