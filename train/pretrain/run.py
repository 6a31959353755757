"""A pretraining run from its configuration: `run(config)`.

Everything that can be refused is refused before the first step. What a run leaves in its workdir:

    run.json  tokenizer/  tokens/  checkpoints/  metrics.jsonl  goodput.jsonl  tensorboard/
    curves.png  export/  result.json

Every process of a job runs this; the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from modernbert_jax import FillMask, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import write_bytes, write_text
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.packing import IGNORE_INDEX

from ..common import flops, watch
from ..common.hosts import barrier, connect, first_then_others, is_first, to_host, total
from ..common.metrics import MetricsWriter, plot
from ..common.sharding import local_slots, make_mesh, padded_rows, to_devices
from ..common.workdir import committed, is_remote
from ..tokens.store import SPLITS, TokenStore, is_store, joined, open_store
from . import card
from .checkpoint import Checkpoints
from .config import TrainConfig
from .data import Batch, Batches, Masking, eval_batches
from .setup import (
    masking_of,
    open_workdir,
    prepare_corpus,
    run_model_config,
    run_tokenizer,
    start_state,
    with_corpora,
)
from .step import Trainer, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Store = dict[str, TokenStore]  # a corpus: split -> its chunks


@dataclasses.dataclass
class Position:
    """Where a run stands: everything but the weights and moments. Stored in each checkpoint."""

    phase: int = 0
    phase_tokens: int = 0  # the phase's clock, without padding
    total_tokens: int = 0
    epoch: int = 0
    row: int = 0
    tokens_sha256: str = ""  # of the phase's tokens


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def say(text: str) -> None:
    """A line from the first process."""
    if is_first():
        print(text, flush=True)


def run(config: TrainConfig, recipe: str = "") -> dict[str, Any]:
    """Trains through all phases, takes up an interrupted run, and returns what result.json holds.

    recipe: the name of the experiment in train/configs, for the model card. Raises ValueError,
    FileNotFoundError or OSError with one line for bad input, before training; Diverged (with the
    step and the last good checkpoint) when the loss is NaN or infinite; OSError where a checkpoint
    could not be written.
    """
    config.validate()
    connect(config.hosts)
    mesh = make_mesh(config.mesh)
    workdir, tokenizer, stores = first_then_others("prepare", lambda: _prepare(config))
    model_config = run_model_config(config, tokenizer)
    trainer = Trainer(config, model_config, mesh)
    checkpoints = Checkpoints(workdir, trainer, config.keep_checkpoints, say)
    restored = checkpoints.restore()
    if restored:
        state, data, folder = restored
        position = Position(**data)
        say(f"taking up {folder} (step {int(state.optimizer.step):,})")
    else:
        state, position = start_state(config, trainer), Position()
    say(
        f"{sum(math.prod(p.shape) for p in trainer.shapes.values()):,} parameters on "
        f"{_hardware(mesh)}; a step is {config.global_batch_size} rows of {config.sequence_length} tokens in "
        f"{config.gradient_accumulation_steps} micro-batches"
    )

    session = _Session(config, trainer, workdir, tokenizer, stores, checkpoints, state)
    try:
        for index in range(position.phase, len(config.phases)):
            state, position = session.phase(index, state, position)
            if session.stopped:
                checkpoints.wait()
                barrier("stopped")
                say(f"stopped; the same command goes on from {committed(workdir)[-1]}")
                return {"stopped": True}
        checkpoints.wait()
        return session.finish(state, position, recipe)
    finally:
        session.close()
        checkpoints.close()


def _hardware(mesh: jax.sharding.Mesh) -> str:
    grid = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{grid} ({mesh.devices.flat[0].device_kind}, {jax.process_count()} processes)"


def _prepare(config: TrainConfig) -> tuple[Any, PreTrainedTokenizerFast, list[dict[str, Store]]]:
    """(workdir, tokenizer, each phase's corpora by name); finds again what is there."""
    workdir = open_workdir(config, say)
    config = with_corpora(config, workdir, say)
    tokenizer = run_tokenizer(config, workdir, say)
    for number, sentence in enumerate(config.fill_mask, start=1):
        if str(tokenizer.mask_token) not in sentence:
            raise ValueError(
                f"fill_mask: expected {tokenizer.mask_token} in each sentence, sentence {number} "
                "has none"
            )

    def store(corpus: str) -> Store:
        if is_store(corpus):
            cache = None if is_remote(workdir) else workdir / "tokens"
            return open_store(corpus, config.eval_fraction, cache)
        return open_store(prepare_corpus(config, workdir, corpus, say))

    opened = {corpus: store(corpus) for phase in config.phases for corpus in phase.corpus}
    stores = [
        _named({path: _times(opened[path], n) for path, n in Counter(phase.corpus).items()})
        for phase in config.phases
    ]
    for phase, parts in zip(config.phases, stores, strict=True):
        train, held_out = (joined([s[split] for s in parts.values()]) for split in SPLITS)
        if not len(held_out.lengths):
            raise ValueError(
                f"phase {phase.name}: its corpora hold no document out; prepare them with a larger "
                "--eval-fraction"
            )
        say(
            f"phase {phase.name}: {len(train.lengths):,} chunks, {train.lengths.sum():,} tokens to "
            f"train on, {held_out.lengths.sum():,} held out; budget {phase.tokens:,} tokens"
        )
    return workdir, tokenizer, stores


def _times(store: Store, count: int) -> Store:
    """A corpus that is named several times counts that often in an epoch, masked anew each time."""
    return store | {"train": joined([store["train"]] * count)}


def _named(by_path: dict[str, Store]) -> dict[str, Store]:
    """By the last part of each path, where that tells them apart."""
    names = [pathlib.PurePath(path).name for path in by_path]
    return (
        by_path if len(set(names)) < len(names) else dict(zip(names, by_path.values(), strict=True))
    )


class _Session:
    """One start of a run: what the phases share."""

    def __init__(self, config, trainer, workdir, tokenizer, stores, checkpoints, state):
        self.config: TrainConfig = config
        self.trainer: Trainer = trainer
        self.workdir, self.tokenizer = workdir, tokenizer
        self.stores: list[dict[str, Store]] = stores
        self.checkpoints: Checkpoints = checkpoints
        self.slots = padded_rows(config.micro_batch_size, trainer.mesh)
        self.own = local_slots(self.slots, trainer.mesh)
        self.train = [joined([s["train"] for s in parts.values()]) for parts in stores]
        self.eval_mask = masking_of(config, tokenizer, config.eval_mlm_probability)
        self.held_out = [
            {
                name: eval_batches(s["eval"], self.eval_mask, config, self.own)
                for name, s in parts.items()
                if len(s["eval"].lengths)  # small corpora may hold nothing out
            }
            for parts in stores
        ]
        step = int(state.optimizer.step)
        self.writer = MetricsWriter(workdir, step, config.wandb) if is_first() else None
        ledger = workdir / "goodput.jsonl" if is_first() else None
        self.goodput = watch.Goodput(ledger, step)
        self.spikes = watch.Spikes()
        self.where = "starting"
        self.stall = watch.Stall(config.stall_minutes, lambda: self.where, host=jax.process_index())
        self.profile = watch.Profile(
            config.profile_step, config.profile_steps, str(workdir / "profile")
        )
        self.stop = _StopSignal()
        self.stopped = False

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self.stall.close()
        self.profile.close()
        self.stop.close()
        if self.writer is not None:
            self.writer.close()

    def phase(self, index: int, state: TrainState, position: Position):
        """Steps until the phase's budget is spent; (state, where the next phase starts)."""
        config, phase, store = self.config, self.config.phases[index], self.train[index]
        if position.tokens_sha256 not in ("", store.fingerprint):
            raise ValueError(
                f"phase {phase.name}: the corpus is not the one that this run has been trained on "
                f"(tokens {store.fingerprint[:12]}, were {position.tokens_sha256[:12]}); put it "
                "back or use another --workdir"
            )
        position = dataclasses.replace(position, tokens_sha256=store.fingerprint)
        batches = Batches(
            store,
            masking_of(config, self.tokenizer, phase.mlm_probability),
            config,
            phase=index,
            epoch=position.epoch,
            row=position.row,
            tokens=position.phase_tokens,
            slots=self.own,
        )
        bar = tqdm(
            total=phase.tokens, initial=position.phase_tokens, unit=" tok", unit_scale=True,
            desc=f"{phase.name} (mask {phase.mlm_probability:.0%})", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0, disable=not is_first(),
        )  # fmt: skip
        peak = np.float32(config.optimizer.max_learning_rate or phase.learning_rate)
        step = int(state.optimizer.step)
        clock = _Clock()
        pending: tuple[int, dict, dict] | None = None
        try:
            while position.phase_tokens < phase.tokens and not self.stopped:
                self.where = f"phase {phase.name}, step {step + 1}: waiting for data"
                with clock.waiting(), self.goodput.doing("waiting"):
                    batch = next(batches)
                self.where = f"phase {phase.name}, step {step + 1}: in the step"
                self.profile.before(step + 1, state)
                rate = phase.learning_rate_at(position.phase_tokens)
                with self.goodput.doing("steps" if clock.laps else "compiling"):
                    state, metrics = self.trainer.train_step(
                        state, self._on_devices(batch), np.float32(rate), peak
                    )
                    step += 1
                    position = dataclasses.replace(
                        position,
                        phase_tokens=position.phase_tokens + batch.tokens,
                        total_tokens=position.total_tokens + batch.tokens,
                        epoch=batch.epoch,
                        row=batch.row,
                    )
                    # The numbers of a step are fetched after the next one has been handed over.
                    self._report(pending, bar, clock)
                pending = (step, metrics, self._facts(index, position, batch, rate))
                self.stall.beat()
                due = [step % n == 0 for n in (config.eval_every, config.checkpoint_every)]
                if any(due):
                    with self.goodput.doing("steps"):
                        self._report(pending, bar, clock)
                    pending = None
                    with clock.paused():
                        if due[0]:
                            self._evaluate(index, state, step, position)
                        if due[1]:
                            self._save(state, step, position)
            self._report(pending, bar, clock)
        finally:
            bar.close()
            batches.close()
        if not self.stopped:
            self._evaluate(index, state, step, position)
            position = Position(phase=index + 1, total_tokens=position.total_tokens)
        self._save(state, step, position)
        return state, position

    def _on_devices(self, batch: Batch) -> dict[str, jax.Array]:
        shape = batch.arrays["labels"].shape[:2]
        # Every host learns from the step's sum that one of them was asked to stop.
        asked = np.full((*shape, 1), self.stop.asked, np.int32)
        arrays = {**batch.arrays, "stop": asked}
        return to_devices(arrays, self.own, self.slots, self.trainer.mesh)

    def _facts(self, index: int, position: Position, batch: Batch, rate: float) -> dict[str, Any]:
        places = batch.rows * self.config.sequence_length
        return {
            "phase": self.config.phases[index].name,
            "learning_rate": rate,
            "total_tokens": position.total_tokens,
            "phase_tokens": position.phase_tokens,
            "rows": batch.rows,
            "padding": 1.0 - batch.tokens / places,
            "epoch": batch.epoch,
            "tokens": batch.tokens,
            "segments": flops.segment_lengths(batch.arrays["segment_ids"]),
        }

    def _report(self, pending, bar: tqdm, clock: _Clock) -> None:
        if pending is None:
            return
        step, metrics, facts = pending
        values = {name: float(value) for name, value in metrics.items()}
        self.stopped = values.pop("stop") > 0
        tokens, lengths = facts.pop("tokens"), facts.pop("segments")
        speed, waited = clock.lap(tokens)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            good = committed(self.workdir)
            raise Diverged(
                f"step {step}: the loss is {values['loss']}, the gradient's norm "
                f"{values['grad_norm']}; last good checkpoint: {good[-1] if good else 'none yet'}. "
                "Lower the learning rate, then take it as --init-from in a new --workdir"
            )
        if spike := self.spikes(step, values["loss"]):
            say(spike)
        devices = self.trainer.mesh.devices
        kind = devices.flat[0].device_kind
        speeds = {"tokens_per_second": speed, "tokens_per_second_device": speed / devices.size}
        if kind in flops.PEAK and len(lengths):
            model = flops.model_flops(
                self.trainer.model_config, lengths, values["masked"] * lengths.sum() / tokens
            )
            speeds["mfu"] = flops.mfu(speed / devices.size, model.train / lengths.sum(), kind)
        if self.writer is not None:
            self.writer.write(
                "train", step, **values, **facts, **speeds, waiting=waited,
                goodput=self.goodput.share(),
            )  # fmt: skip
        bar.update(tokens)
        if step % self.config.log_every == 0 or sys.stderr.isatty():
            used = f" mfu {speeds['mfu']:.1%}" if "mfu" in speeds else ""
            bar.set_postfix_str(
                f"step {step} loss {values['loss']:.3f} acc {values['accuracy']:.1%} "
                f"{speed / 1e3:.1f}k tok/s{used} pad {facts['padding']:.1%} wait {waited:.0%}",
                refresh=False,
            )

    def _evaluate(self, index: int, state: TrainState, step: int, position: Position) -> None:
        self.where = f"evaluating after step {step}"
        with self.goodput.doing("evaluating"):
            scores = self.evaluate(index, state)
        if self.writer is not None:
            phase = self.config.phases[index].name
            self.writer.write(
                "eval", step, **scores, phase=phase, total_tokens=position.total_tokens
            )
        self.stall.beat()

    def evaluate(self, index: int, state: TrainState) -> dict[str, float]:
        """Loss (nats) and accuracy over a phase's held-out masked tokens, and for each corpus."""
        sums = {
            name: sum(
                (
                    np.asarray([float(x) for x in self.trainer.eval_step(state.params, arrays)])
                    for batch in batches
                    for arrays in [self._eval_arrays(batch)]
                ),
                np.zeros(3),
            )
            for name, batches in self.held_out[index].items()
        }
        scores = _scores(sum(sums.values(), np.zeros(3)))
        if len(sums) > 1:
            for name, part in sums.items():
                scores |= {f"{name}/{key}": value for key, value in _scores(part).items()}
        return scores

    def _eval_arrays(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        arrays = {name: array[None] for name, array in batch.items()}
        return to_devices(arrays, self.own, self.slots, self.trainer.mesh)

    def _save(self, state: TrainState, step: int, position: Position) -> None:
        self.where = f"saving step {step}"
        with self.goodput.doing("saving"):
            self.checkpoints.save(state, dataclasses.asdict(position))
        self.goodput.commit(step)
        if self.writer is not None:
            self.writer.publish()
        self.stall.beat()

    def finish(self, state: TrainState, position: Position, recipe: str) -> dict[str, Any]:
        """Scores, export, sentences, curves: what a run leaves behind."""
        config, phases = self.config, []
        for index, phase in enumerate(config.phases):
            scores = self.evaluate(index, state)
            batches = [b for part in self.held_out[index].values() for b in part]
            baseline = unigram_accuracy(self.train[index], self.eval_mask, batches)
            phases.append({"phase": phase.name, **scores, "unigram_accuracy": baseline})
            say(
                f"held out, {phase.name}: masked accuracy {scores['accuracy']:.1%}, unigram "
                f"baseline {baseline:.1%}, loss {scores['loss']:.3f}"
            )
        params = {path: to_host(value) for path, value in state.params.items()}
        result: dict[str, Any] = {
            "phases": phases,
            "steps": int(state.optimizer.step),
            "total_tokens": position.total_tokens,
        }
        if self.writer is None:
            return result
        model = module_of(ModernBertForMaskedLM, self.trainer.model_config, params)
        facts = card.pretraining_facts(
            config, result, self.stores, recipe=recipe, hardware=_hardware(self.trainer.mesh)
        )
        _export(model, self.tokenizer, self.workdir / "export", facts)
        result["goodput"] = self.goodput.share()
        result["fill_mask"] = _filled(model, self.tokenizer, config.fill_mask)
        for item in result["fill_mask"]:
            tops = ", ".join(f"{token.strip()} {p:.0%}" for token, p in item["top"])
            say(f"{item['sentence']}\n    {tops}")
        self.writer.publish()
        baselines = {p["phase"]: p["unigram_accuracy"] for p in phases}
        curves = plot(self.workdir, baselines)
        write_text(self.workdir / "result.json", json.dumps(result, indent=2) + "\n")
        say(f"curves: {curves}\nmodel, in HF's layout: {self.workdir / 'export'}")
        return result


def _scores(sums: np.ndarray) -> dict[str, float]:
    loss, right, count = (float(x) for x in sums)
    return {"loss": loss / max(count, 1.0), "accuracy": right / max(count, 1.0)}


def _export(
    model: ModernBertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Any,
    facts: dict[str, Any],
) -> None:
    if isinstance(folder, pathlib.Path):
        return model.save_pretrained(folder, tokenizer=tokenizer, card=facts)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made, tokenizer=tokenizer, card=facts)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(pathlib.Path(made).iterdir(), key=lambda p: p.name == "config.json"):
            write_bytes(folder / file.name, file.read_bytes())


def unigram_accuracy(train: TokenStore, masking: Masking, held_out: list[dict]) -> float:
    """Accuracy of always guessing the commonest token of the training text."""
    counts = train.counts(masking.vocab_size)
    if not masking.mask_special:
        counts[list(masking.special_ids)] = 0
    labels = np.concatenate([batch["labels"].ravel() for batch in held_out])
    right, count = total([(labels == counts.argmax()).sum(), (labels != IGNORE_INDEX).sum()])
    return float(right / count)


def _filled(
    model: ModernBertForMaskedLM, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]
) -> list[dict[str, Any]]:
    """The likeliest tokens for the first [MASK] of each sentence: {"sentence", "top"}."""
    if not sentences:
        return []
    answers = FillMask(model, tokenizer, top_k=3)(sentences)
    rows = [answers] if len(sentences) == 1 else answers  # in transformers' form
    firsts = [row[0] if isinstance(row[0], list) else row for row in rows]
    return [
        {"sentence": sentence, "top": [(a["token_str"], a["score"]) for a in first]}
        for sentence, first in zip(sentences, firsts, strict=True)
    ]


class _Clock:
    """Speed without compilation, evaluation and saving, and the share of time spent waiting."""

    def __init__(self) -> None:
        self.laps = 0
        self.tokens = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    class _Span:
        def __init__(self, done):
            self.done = done

        def __enter__(self):
            self.start = time.perf_counter()

        def __exit__(self, *_):
            self.done(time.perf_counter() - self.start)

    def waiting(self) -> _Clock._Span:
        """Time in here is waiting for data."""
        return self._Span(lambda s: setattr(self, "waited", self.waited + s))

    def paused(self) -> _Clock._Span:
        """Time in here counts for nothing."""
        return self._Span(lambda s: setattr(self, "start", self.start + s))

    def lap(self, tokens: int) -> tuple[float, float]:
        """(tokens a second, share of waiting) since the second step; the first compiles."""
        self.laps += 1
        if self.laps == 1:
            self.start, self.waited = time.perf_counter(), 0.0
            return 0.0, 0.0
        self.tokens += tokens
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return self.tokens / seconds, self.waited / seconds


class _StopSignal:
    """SIGTERM asks the loop to save and leave (preemption)."""

    def __init__(self) -> None:
        self.asked = False
        self._old = None
        try:
            self._old = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: whoever runs the thread owns the signals
            pass

    def _ask(self, *_) -> None:
        self.asked = True

    def close(self) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
