"""Facts about a pretraining run for its model card (`modernbert_jax.card`).

No text of a document is among the facts. Unknown facts, such as the license, are left out.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..common.card import NOT_FOR_CARE, start_facts, versions
from ..common.settings import adapter_facts
from ..corpora.build.bpe import FEWEST_DOCUMENTS
from ..corpora.sources import GENERIC, find
from ..tokens.store import TokenStore, manifest_of
from .config import Phase, TrainConfig

_TOKENIZER = (
    "byte-level BPE, trained on the words that occur in at least "
    f"{FEWEST_DOCUMENTS} documents of the first phase (a tenth of them if they are fewer than "
    f"{10 * FEWEST_DOCUMENTS}, at least 2); a token can show such a word"
)


def pretraining_facts(
    config: TrainConfig,
    result: Mapping[str, Any],
    stores: Sequence[Mapping[str, Mapping[str, TokenStore]]],
    *,
    recipe: str,
    hardware: str,
) -> dict[str, Any]:
    """Returns the facts of a finished run. result: of result.json. stores: corpora of each phase.

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
            "Task": "masked language modeling on packed sequences",
            **({"Recipe": recipe} if recipe else {}),
            "Start": start["name"] + " with its moments" * config.init_optimizer,
            **({} if config.tokenizer or config.init_from else {"Tokenizer": _TOKENIZER}),
            "Tokens seen": result["total_tokens"],
            "Steps": result["steps"],
            "Batch size": f"{config.global_batch_size} sequences",
            "Sequence length": f"{config.sequence_length:,} tokens",
            "Optimizer": (
                f"StableAdamW, betas {optimizer.b1:g} and {optimizer.b2:g}, eps {optimizer.eps:g}, "
                f"weight decay {optimizer.weight_decay:g}"
            ),
            **adapter_facts(config),
            "Compute dtype": model.dtype,
            "Attention output dropout": model.attention_out_dropout,
            "Seed": config.seed,
            "Hardware": hardware,
            "Versions": versions(),
        },
        "tables": {
            "Phases": [
                {
                    "phase": phase.name,
                    "tokens": phase.tokens,
                    "mlm_probability": f"{phase.mlm_probability:.0%}",
                    "peak learning rate": phase.learning_rate,
                    "schedule": schedule_of(phase),
                    "corpora": [_last(name) for name in parts],
                }
                for phase, parts in zip(config.phases, stores, strict=True)
            ],
            "Corpora": [
                {"corpus": _last(name), **about, "training tokens": tokens}
                for name, about in sources.items()
                for tokens in [next(_tokens(p[name]) for p in stores if name in p)]
            ],
            f"Evaluation sets, masked at {config.eval_mlm_probability:.0%}": _evaluation(
                result["phases"]
            ),
        },
        "limits": [*_agreements(sources), NOT_FOR_CARE],
    }


def _last(name: str) -> str:
    return pathlib.PurePath(name).name


def _tokens(store: Mapping[str, TokenStore]) -> int:
    return int(store["train"].lengths.sum(dtype="int64"))


def _source(path: str) -> dict[str, Any]:
    """Returns the source that a corpus's manifest names, if `prepare` made it from one."""
    manifest = manifest_of(path) if path else {}
    if not manifest.get("source") or manifest["source"] in GENERIC:
        return {}
    return {name: manifest[name] for name in ("source", "title", "license", "documents")}


def _agreements(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the access terms of the corpora, which may apply to the weights as well."""
    found = [find(about["source"]) for about in sources.values() if about]
    return [
        f"Trained on {source.title} (access: {source.access}): its terms may apply to the weights."
        for source in found
        if source.access != "open"
    ]


def schedule_of(phase: Phase) -> str:
    """Returns the learning rate schedule of a phase in words."""
    parts = [f"warm-up over {phase.warmup_tokens:,} tokens"] if phase.warmup_tokens else []
    if phase.warmup_tokens + phase.decay_tokens < phase.tokens:
        parts.append("constant")
    if phase.decay_tokens:
        shape = {"one_minus_sqrt": "1 - sqrt", "linear": "linear"}[phase.decay]
        parts.append(f"{shape} decay over the last {phase.decay_tokens:,} tokens")
    return ", then ".join(parts)


def _evaluation(phases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each phase, and for each of its corpora if there are several."""
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
            if before := scores.get("before"):
                row["accuracy before"] = f"{before[f'{prefix}accuracy']:.1%}"
            if not prefix:
                row["unigram accuracy"] = f"{scores['unigram_accuracy']:.1%}"
            rows.append(row)
    return rows
