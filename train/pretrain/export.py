"""What a finished run leaves behind: final scores, the exported model, curves, result.json."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modernbert_jax import FillMask, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import write_bytes, write_text
from modernbert_jax.checkpoint.params import module_of

from ..common.hosts import log, to_host
from ..common.metrics import plot
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
    recipe: str,
) -> dict[str, Any]:
    """Evaluates each phase's sets, exports the model, draws curves.png; returns result.json."""
    config, workdir, tokenizer = session.config, session.workdir, session.tokenizer
    phases = []
    for phase, store, evaluation in zip(config.phases, train, evaluations, strict=True):
        scores, unigram = evaluation(state.params), evaluation.unigram_accuracy(store)
        check_evaluation(
            scores["loss"], int(state.optimizer.step), session.trainer.model_config.vocab_size
        )
        phases.append({"phase": phase.name, **scores, "unigram_accuracy": unigram})
        log(
            f"evaluation, {phase.name}: masked accuracy {scores['accuracy']:.1%}, unigram "
            f"baseline {unigram:.1%}, loss {scores['loss']:.3f}"
        )
    params = {path: to_host(value) for path, value in state.params.items()}
    steps = int(state.optimizer.step)
    result: dict[str, Any] = {
        "phases": phases, "steps": steps, "total_tokens": position.total_tokens
    }  # fmt: skip
    if session.writer is None:
        return result
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
    log(f"curves: {curves}\nmodel in the Hugging Face format: {workdir / 'export'}")
    return result


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
