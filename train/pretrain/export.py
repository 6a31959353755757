"""What a finished run leaves behind: final scores, the exported model, curves, result.json."""

from __future__ import annotations

import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modernbert_jax import FillMask, ModernBertForMaskedLM, lora
from modernbert_jax.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, write_bytes, write_text

from ..common.hosts import from_first, is_first, log, to_host
from ..common.metrics import plot, read_metrics, save_figure
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
    """Collects each phase's scores, exports the model, draws the figures; returns result.json."""
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
    model = session.trainer.build(params)
    hardware = describe(session.trainer.mesh)
    facts = pretraining_facts(config, result, corpora, recipe=recipe, hardware=hardware)
    if config.lora_rank is not None:
        base = facts["base_model"]
        _write(workdir / "adapter", lambda to: lora.save_adapter(model, to, base_model=base))
        lora.merge(model)
        log(f"adapters in PEFT's format: {workdir / 'adapter'}")
    _write(
        workdir / "export",
        lambda to: model.save_pretrained(to, tokenizer=tokenizer, card=facts),
    )
    result["goodput"] = session.goodput.share()
    result["fill_mask"] = _fill(model, tokenizer, config.fill_mask)
    for item in result["fill_mask"]:
        top = ", ".join(f"{token.strip()} {p:.0%}" for token, p in item["top"])
        log(f"{item['sentence']}\n    {top}")
    session.writer.publish()
    curves = plot(workdir, {p["phase"]: p["unigram_accuracy"] for p in phases})
    write_text(workdir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    if compared := plot_before_and_after(workdir, result):
        log(f"before and after: {compared}")
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
    sets = {p.name: tuple(e.batches) for p, e in zip(config.phases, evaluations, strict=True)}
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
        # A phase that was added later has the score before the run of one with the same sets.
        starts = [line for line in lines if line["total_tokens"] == 0]
        before = next((m for m in starts if sets[m["phase"]] == sets[phase.name]), None)
        if before:
            row["before"] = _scores(before)
        found.append(row)
    return found


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns loss and accuracy, of all sets and of each, from a line of metrics.jsonl."""
    return {k: v for k, v in line.items() if k.rpartition("/")[2] in ("loss", "accuracy")}


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
    """Yields (label, before, after) of each evaluation set; scores: {"accuracy", "loss"}."""
    rows = [(p["phase"], p.get("before"), p) for p in result["phases"]]
    if "general" in result:
        rows.append(("general text", result["general"]["before"], result["general"]))
    for name, before, after in rows:
        for key in [k for k in after if k.rpartition("/")[2] == "loss"]:
            prefix = key[: -len("loss")]
            scores = [
                {k: one[prefix + k] for k in ("accuracy", "loss")} if one else None
                for one in (before, after)
            ]
            yield f"{name} {prefix.rstrip('/')}".strip(), scores[0], scores[1] or {}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


def before_and_after(result: Mapping[str, Any]) -> list[str]:
    """Returns a table of masked accuracy and perplexity, a line for each set of each phase."""
    lines = [f"{'evaluation':<32}{'masked accuracy':>22}{'perplexity':>22}"]
    for label, before, after in _rows(result):
        accuracy = f"{after['accuracy']:.1%}"
        perplexity = f"{_perplexity(after['loss']):.2f}"
        if before:
            accuracy = f"{before['accuracy']:.1%} -> {accuracy}"
            perplexity = f"{_perplexity(before['loss']):.2f} -> {perplexity}"
        lines.append(f"{label:<32}{accuracy:>22}{perplexity:>22}")
    for phase in result["phases"]:
        label = f"{phase['phase']}, commonest token"
        lines.append(f"{label:<32}{phase['unigram_accuracy']:>22.1%}")
    return lines


def plot_before_and_after(workdir: Any, result: Mapping[str, Any]) -> Any:
    """Writes WORKDIR/before_after.png, the same as bars, and returns its path.

    A run from random weights has no before: it gets no figure, and None is returned.
    """
    rows = [(label, before, after) for label, before, after in _rows(result) if before]
    if not rows:
        return None
    from matplotlib.figure import Figure  # pyplot would change a notebook's settings

    figure = Figure(figsize=(10, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, title, value in (
        (axes[0], "masked accuracy (%)", lambda scores: 100 * scores["accuracy"]),
        (axes[1], "perplexity", lambda scores: _perplexity(scores["loss"])),
    ):
        for offset, column, name, color in ((-0.2, 1, "before", "0.7"), (0.2, 2, "after", "C0")):
            values = [value(row[column]) for row in rows]
            places = [index + offset for index in range(len(rows))]
            bars = axis.barh(places, values, 0.38, label=name, color=color)
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axis.set(title=title, yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    return save_figure(figure, workdir / "before_after.png")


def _write(folder: Any, save: Callable[[Any], None]) -> None:
    """Calls save(folder), by way of a local folder if it is in a bucket."""
    if isinstance(folder, pathlib.Path):
        return save(folder)
    with tempfile.TemporaryDirectory() as local:
        save(local)
        folder.mkdir(parents=True, exist_ok=True)
        last = (CONFIG_FILE, ADAPTER_FILE)
        for file in sorted(pathlib.Path(local).iterdir(), key=lambda p: p.name in last):
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
