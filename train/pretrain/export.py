"""What a finished run leaves behind: final scores, the exported model, curves, result.json."""

from __future__ import annotations

import json
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modernbert_jax import FillMask, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import write_bytes, write_text
from modernbert_jax.checkpoint.params import module_of

from ..common.hosts import from_first, is_first, log, to_host
from ..common.metrics import plot, read_metrics
from ..common.sharding import describe
from ..tokens.store import TokenStore
from .card import pretraining_facts
from .checkpoint import check_evaluation
from .data import Position
from .evaluate import Evaluation
from .session import Session
from .step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def finish(
    session: Session,
    state: TrainState,
    position: Position,
    corpora: Sequence[Mapping[str, Mapping[str, TokenStore]]],
    train: Sequence[TokenStore],
    evaluations: Sequence[Evaluation],
    general: Evaluation | None,
    recipe: str,
) -> dict[str, Any]:
    """Collects each phase's scores, exports the model, draws curves.png; returns result.json."""
    config, workdir, tokenizer = session.config, session.workdir, session.tokenizer
    phases = _phases(session, state, train, evaluations)
    general_after = general(state.params) if general else None
    params = {path: to_host(value) for path, value in state.params.items()}
    steps = int(state.optimizer.step)
    result: dict[str, Any] = {
        "phases": phases, "steps": steps, "total_tokens": position.total_tokens
    }  # fmt: skip
    if session.writer is None:
        return result
    if general_after is not None:
        lines = [m for m in read_metrics(workdir) if m["kind"] == "general"]
        result["general"] = {"before": _scores(lines[0]) if lines else None, **general_after}
    for line in before_and_after(result):
        log(line)
    model = module_of(ModernBertForMaskedLM, session.trainer.model_config, params)
    hardware = describe(session.trainer.mesh)
    facts = pretraining_facts(config, result, corpora, recipe=recipe, hardware=hardware)
    _export(model, tokenizer, workdir / "export", facts)
    result["goodput"] = session.goodput.share()
    result["fill_mask"] = _fill(model, tokenizer, config.fill_mask)
    for item in result["fill_mask"]:
        top = ", ".join(f"{token.strip()} {p:.0%}" for token, p in item["top"])
        log(f"{item['sentence']}\n    {top}")
    session.writer.publish()
    curves = plot(workdir, {p["phase"]: p["unigram_accuracy"] for p in phases})
    write_text(workdir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    folder = workdir / "export"
    log(f"curves: {curves}\nmodel in the Hugging Face format: {folder}")
    log(f'  transformers:           AutoModelForMaskedLM.from_pretrained("{folder}")')
    log(f'  sentence-transformers:  SentenceTransformer("{folder}")')
    log(f'  modernbert_jax:         pipeline("fill-mask", "{folder}")')
    return result


def _phases(
    session: Session,
    state: TrainState,
    train: Sequence[TokenStore],
    evaluations: Sequence[Evaluation],
) -> list[dict[str, Any]]:
    """Returns the scores of each phase at its own end and, if there are any, before the run."""
    config, step = session.config, int(state.optimizer.step)
    session.publish()
    lines = [m for m in read_metrics(session.workdir) if m["kind"] == "eval"] if is_first() else []
    found = []
    for phase, store, evaluation in zip(config.phases, train, evaluations, strict=True):
        own = [line for line in lines if line["phase"] == phase.name]
        unigram = evaluation.unigram_accuracy(store)
        if from_first(int(not own)):  # its line of metrics.jsonl is damaged
            scores = evaluation(state.params)
            check_evaluation(scores["loss"], step, session.trainer.model_config.vocab_size)
        else:
            scores = _scores(own[-1]) if own else {}
        row = {"phase": phase.name, **scores, "unigram_accuracy": unigram}
        if own and own[0]["total_tokens"] == 0:
            row["before"] = _scores(own[0])
        found.append(row)
    return found


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns loss and accuracy, of all sets and of each, from a line of metrics.jsonl."""
    return {k: v for k, v in line.items() if k.rpartition("/")[2] in ("loss", "accuracy")}


def before_and_after(result: Mapping[str, Any]) -> list[str]:
    """Returns a table of masked accuracy and perplexity, a line for each set of each phase."""
    rows = [(p["phase"], p.get("before"), p) for p in result["phases"]]
    if "general" in result:
        rows.append(("general text", result["general"]["before"], result["general"]))
    lines = [f"{'evaluation':<32}{'masked accuracy':>22}{'perplexity':>22}"]
    for name, before, after in rows:
        for key in [k for k in after if k.rpartition("/")[2] == "loss"]:
            prefix = key[: -len("loss")]
            label = f"{name} {prefix.rstrip('/')}".strip()
            accuracy = f"{after[prefix + 'accuracy']:.1%}"
            perplexity = f"{math.exp(min(after[key], 50.0)):.2f}"
            if before:
                accuracy = f"{before[prefix + 'accuracy']:.1%} -> {accuracy}"
                perplexity = f"{math.exp(min(before[key], 50.0)):.2f} -> {perplexity}"
            lines.append(f"{label:<32}{accuracy:>22}{perplexity:>22}")
        if "unigram_accuracy" in after:
            lines.append(f"{name + ', commonest token':<32}{after['unigram_accuracy']:>22.1%}")
    return lines


def _export(
    model: ModernBertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Any,
    facts: dict[str, Any],
) -> None:
    if isinstance(folder, pathlib.Path):
        return model.save_pretrained(folder, tokenizer=tokenizer, card=facts)
    with tempfile.TemporaryDirectory() as local:  # the folder is in a bucket
        model.save_pretrained(local, tokenizer=tokenizer, card=facts)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(pathlib.Path(local).iterdir(), key=lambda p: p.name == "config.json"):
            write_bytes(folder / file.name, file.read_bytes())


def _fill(
    model: ModernBertForMaskedLM, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns {"sentence", "top"} with the most likely tokens for each sentence's first [MASK]."""
    if not sentences:
        return []
    answers = FillMask(model, tokenizer, top_k=3)(sentences)
    answers = [answers] if len(sentences) == 1 else answers  # as in transformers
    firsts = [answer[0] if isinstance(answer[0], list) else answer for answer in answers]
    return [
        {"sentence": sentence, "top": [(a["token_str"], a["score"]) for a in first]}
        for sentence, first in zip(sentences, firsts, strict=True)
    ]
