"""A pretraining run from its configuration: `run(config)`.

Everything that can be refused is refused before the first step. What a run leaves in its workdir:

    run.json  tokenizer/  tokens/  checkpoints/  metrics.jsonl  tensorboard/  curves.png  export/
    result.json
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.pretrained import (
    flatten,
    is_orbax,
    load_orbax,
    module_of,
    param_shapes,
    resolve,
    write_text,
)
from modernbert_jax.tokenizer import AutoTokenizer, Tokenizer

from . import checkpoint
from .config import TrainConfig
from .corpora.bpe import train_bpe
from .corpora.synthetic import write_corpus
from .corpora.text import read_documents
from .data import (
    Batch,
    Batches,
    Masking,
    Prefetch,
    TokenStore,
    eval_batches,
    prepare_tokens,
    tokens_folder,
)
from .loss import IGNORE
from .metrics import MetricsWriter, plot
from .optimizer import decay_mask, schedule, stable_adamw
from .step import TrainState, make_eval_step, make_train_step

# What may differ when a run is taken up again: none of it changes a step.
_FREE = {"workdir", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "fill_mask"}


@dataclasses.dataclass
class Position:
    """Where a run stands: everything but the weights and moments. Stored in each checkpoint."""

    phase: int = 0
    phase_tokens: int = 0  # the phase's clock, without padding
    total_tokens: int = 0
    epoch: int = 0
    row: int = 0
    tokens_sha256: str = ""  # of the phase's token file


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains through all phases, takes up an interrupted run, and returns what result.json holds.

    Raises ValueError, FileNotFoundError or OSError with one line for bad input, before training;
    Diverged (with the step and the last good checkpoint) when the loss is NaN or infinite.
    """
    # ---- What the run needs ----------------------------------------------------------------------
    config.validate()
    workdir = _open_workdir(config)
    say = lambda text: print(text, flush=True)  # noqa: E731
    config = _with_corpora(config, workdir, say)
    tokenizer = _tokenizer(config, workdir, say)
    model_config = _model_config(config, tokenizer)
    stores = [
        prepare_tokens(
            phase.corpus,
            tokenizer,
            config,
            tokens_folder(workdir / "tokens", phase.corpus, tokenizer, config),
        )
        for phase in config.phases
    ]
    for phase, store in zip(config.phases, stores, strict=True):
        say(
            f"phase {phase.name}: {len(store['train'].lengths):,} pieces, "
            f"{int(store['train'].lengths.sum()):,} tokens to train on, "
            f"{int(store['eval'].lengths.sum()):,} held out; budget {phase.tokens:,} tokens"
        )

    # ---- State: the newest checkpoint, else init_from, else fresh weights ------------------------
    optimizer = config.optimizer
    tx = stable_adamw(
        optimizer.b1,
        optimizer.b2,
        optimizer.eps,
        optimizer.weight_decay,
        decay_mask(param_shapes(ModernBertForMaskedLM, model_config)),
    )
    done = checkpoint.committed(workdir)
    if done:
        state, data = checkpoint.restore(done[-1], model_config)
        position = Position(**data)
        say(f"taking up {done[-1]} (step {int(state.optimizer.step):,})")
    else:
        state, position = _fresh_state(config, model_config, tx), Position()
    say(
        f"{sum(p.size for p in state.params.values()):,} parameters; a step is "
        f"{config.rows} rows of {config.row_length} tokens"
    )

    # ---- Steps -----------------------------------------------------------------------------------
    how = {"scan_layers": config.scan_layers, "remat": config.remat}
    train_step = jax.jit(
        make_train_step(model_config, tx, seed=config.seed, loss_chunk=config.loss_chunk, **how),
        donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(model_config, loss_chunk=config.loss_chunk, **how))
    eval_mask = _masking(config, tokenizer, config.eval_mask_rate)
    held_out = [eval_batches(store["eval"], eval_mask, config) for store in stores]
    writer = MetricsWriter(workdir, int(state.optimizer.step))
    result: dict[str, Any] = {"phases": []}
    stop = _StopSignal()
    try:
        for index in range(position.phase, len(config.phases)):
            trainer = _PhaseRun(
                config, model_config, workdir, tokenizer, stores[index]["train"], held_out[index],
                index, train_step, eval_step, writer, stop,
            )  # fmt: skip
            state, position = trainer.run(state, position)
            if stop.asked:
                say(f"stopped; the same command goes on from {checkpoint.committed(workdir)[-1]}")
                return {"stopped": True}
    finally:
        writer.close()
        stop.close()

    # ---- What is left behind ---------------------------------------------------------------------
    baselines = {}
    for index, phase in enumerate(config.phases):
        scores = evaluate(eval_step, state.params, held_out[index])
        baselines[phase.name] = unigram_accuracy(stores[index]["train"], eval_mask, held_out[index])
        result["phases"].append(
            {"phase": phase.name, **scores, "unigram_accuracy": baselines[phase.name]}
        )
        say(
            f"held out, {phase.name}: masked accuracy {scores['accuracy']:.1%}, unigram baseline "
            f"{baselines[phase.name]:.1%}, loss {scores['loss']:.3f}"
        )
    model = module_of(ModernBertForMaskedLM, model_config, state.params)
    model.save_pretrained(workdir / "export", tokenizer=tokenizer)
    result["steps"] = int(state.optimizer.step)
    result["total_tokens"] = position.total_tokens
    result["fill_mask"] = [
        {"sentence": sentence, "top": fill_mask(model, tokenizer, sentence)}
        for sentence in config.fill_mask
    ]
    for item in result["fill_mask"]:
        tops = ", ".join(f"{token.strip()} {p:.0%}" for token, p in item["top"])
        say(f"{item['sentence']}\n    {tops}")
    write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    say(f"curves: {plot(workdir, baselines)}\nmodel, in HF's layout: {workdir / 'export'}")
    return result


class _PhaseRun:
    """One phase: the step loop, with its evaluations, checkpoints and progress."""

    def __init__(
        self, config, model_config, workdir, tokenizer, train, held_out, index, train_step,
        eval_step, writer, stop,
    ):  # fmt: skip
        self.config, self.model_config, self.workdir = config, model_config, workdir
        self.phase, self.index, self.train = config.phases[index], index, train
        self.held_out = held_out
        self.train_step, self.eval_step = train_step, eval_step
        self.writer, self.stop = writer, stop
        self.masking = _masking(config, tokenizer, self.phase.mask_rate)
        self.rate = schedule(self.phase)
        self.peak = config.optimizer.max_learning_rate or self.phase.learning_rate

    def run(self, state: TrainState, position: Position) -> tuple[TrainState, Position]:
        """Steps until the budget is spent; returns the state and where the next phase starts."""
        config, phase = self.config, self.phase
        sha256 = self.train.fingerprint
        if position.tokens_sha256 not in ("", sha256):
            raise ValueError(
                f"phase {phase.name}: the corpus is not the one that this run has been trained on "
                f"(tokens {sha256[:12]}, were {position.tokens_sha256[:12]}); put it back or use "
                "another --workdir"
            )
        position = dataclasses.replace(position, tokens_sha256=sha256)
        batches = Prefetch(
            Batches(
                self.train,
                self.masking,
                config,
                phase=self.index,
                epoch=position.epoch,
                row=position.row,
            )  # fmt: skip
        )
        bar = tqdm(
            total=phase.tokens, initial=position.phase_tokens, unit=" tok", unit_scale=True,
            desc=f"{phase.name} (mask {phase.mask_rate:.0%})", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )  # fmt: skip
        step = int(state.optimizer.step)
        clock = _Clock()
        pending: tuple[int, dict, dict] | None = None
        try:
            while position.phase_tokens < phase.tokens and not self.stop.asked:
                with clock.waiting():
                    batch = next(batches)
                rate = self.rate(position.phase_tokens)
                state, metrics = self.train_step(
                    state, batch.arrays, np.float32(rate), np.float32(self.peak)
                )
                step += 1
                position = dataclasses.replace(
                    position,
                    phase_tokens=position.phase_tokens + batch.tokens,
                    total_tokens=position.total_tokens + batch.tokens,
                    epoch=batch.epoch,
                    row=batch.row,
                )
                facts = self._facts(position, batch, rate)
                # The numbers of a step are fetched after the next one has been handed over.
                self._report(pending, bar, clock)
                pending = (step, metrics, facts)
                if step % config.eval_every == 0 or step % config.checkpoint_every == 0:
                    self._report(pending, bar, clock)
                    pending = None
                    with clock.paused():
                        if step % config.eval_every == 0:
                            self._evaluate(state, step, position)
                        if step % config.checkpoint_every == 0:
                            self._save(state, position)
            self._report(pending, bar, clock)
        finally:
            bar.close()
            batches.close()
        if self.stop.asked:
            self._save(state, position)
            return state, position
        self._evaluate(state, step, position)
        position = Position(phase=self.index + 1, total_tokens=position.total_tokens)
        self._save(state, position)
        return state, position

    def _facts(self, position: Position, batch: Batch, rate: float) -> dict[str, Any]:
        places = self.config.rows * self.config.row_length
        return {
            "phase": self.phase.name,
            "learning_rate": rate,
            "total_tokens": position.total_tokens,
            "phase_tokens": position.phase_tokens,
            "padding": 1.0 - batch.tokens / places,
            "masked": batch.masked,
            "dropped": batch.dropped,
            "epoch": batch.epoch,
            "tokens": batch.tokens,
        }

    def _report(self, pending, bar: tqdm, clock: "_Clock") -> None:
        if pending is None:
            return
        step, metrics, facts = pending
        values = {name: float(value) for name, value in metrics.items()}
        tokens = facts.pop("tokens")
        speed, waited = clock.lap(tokens)
        if not all(math.isfinite(v) for v in values.values()):
            good = checkpoint.committed(self.workdir)
            raise Diverged(
                f"step {step}: the loss is {values['loss']}, the gradient's norm "
                f"{values['grad_norm']}; last good checkpoint: {good[-1] if good else 'none yet'}. "
                "Lower the learning rate, then take it as --init-from in a new --workdir"
            )
        self.writer.write("train", step, **values, **facts, tokens_per_second=speed, waiting=waited)
        bar.update(tokens)
        if step % self.config.log_every == 0 or sys.stderr.isatty():
            bar.set_postfix_str(
                f"step {step} loss {values['loss']:.3f} acc {values['accuracy']:.1%} "
                f"{speed / 1e3:.1f}k tok/s pad {facts['padding']:.1%} wait {waited:.0%}",
                refresh=False,
            )

    def _evaluate(self, state: TrainState, step: int, position: Position) -> None:
        scores = evaluate(self.eval_step, state.params, self.held_out)
        self.writer.write(
            "eval", step, **scores, phase=self.phase.name, total_tokens=position.total_tokens
        )

    def _save(self, state: TrainState, position: Position) -> None:
        checkpoint.save(
            self.workdir,
            state,
            self.model_config,
            dataclasses.asdict(position),
            keep=self.config.keep_checkpoints,
        )


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

    def waiting(self) -> "_Clock._Span":
        """Time in here is waiting for data."""
        return self._Span(lambda s: setattr(self, "waited", self.waited + s))

    def paused(self) -> "_Clock._Span":
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


def evaluate(eval_step, params, batches: list[dict]) -> dict[str, float]:
    """Loss (nats) and accuracy over held-out masked tokens."""
    loss = right = count = 0.0
    for batch in batches:
        sums = eval_step(params, batch)
        loss, right = loss + float(sums[0]), right + float(sums[1])
        count += int((batch["labels"] != IGNORE).sum())
    return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1)}


def unigram_accuracy(train: TokenStore, masking: Masking, held_out: list[dict]) -> float:
    """Accuracy of always guessing the commonest token of the training text."""
    counts = np.bincount(train.ids, minlength=masking.vocab_size)
    if not masking.mask_special:
        counts[list(masking.special_ids)] = 0
    labels = np.concatenate([batch["labels"].ravel() for batch in held_out])
    return float(np.mean(labels[labels != IGNORE] == counts.argmax()))


def fill_mask(
    model: ModernBertForMaskedLM, tokenizer: Tokenizer, sentence: str, top: int = 3
) -> list[tuple[str, float]]:
    """The likeliest tokens for the first [MASK] of a sentence, with their probabilities."""
    inputs = tokenizer([sentence], return_tensors="np")
    ids = np.asarray(inputs["input_ids"])
    places = np.flatnonzero(ids[0] == tokenizer.mask_token_id)
    if not len(places):
        raise ValueError(f"fill_mask: expected {tokenizer.mask_token} in the sentence, found none")
    logits = model(**inputs, predict_positions_BP=places[None, :1]).logits
    p_V = np.asarray(jax.nn.softmax(logits[0, 0]))
    return [(tokenizer.decode([int(i)]), float(p_V[i])) for i in np.argsort(-p_V)[:top]]


# Preparation.


def _open_workdir(config: TrainConfig) -> pathlib.Path:
    """Makes the workdir and refuses one that cannot be written or belongs to another run."""
    workdir = pathlib.Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"workdir {workdir}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    record = workdir / "run.json"
    if record.exists():
        found = json.loads(record.read_text())
        for name in sorted((set(wanted) | set(found)) - _FREE):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"workdir {workdir} belongs to a run with another configuration: {name} "
                    f"{_brief(found.get(name), wanted.get(name))}; choose another --workdir, or "
                    "give the old value to go on"
                )
    elif checkpoint.committed(workdir):
        raise ValueError(
            f"workdir {workdir}: checkpoints without run.json; choose another --workdir"
        )
    else:
        write_text(record, json.dumps(wanted, indent=2) + "\n")
    return workdir


def _brief(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                return f"{name} {_brief(found.get(name), wanted.get(name))}"
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (old, new) in enumerate(zip(found, wanted, strict=True)):
            if old != new:
                return f"{index} {_brief(old, new)}"
    return f"was {json.dumps(found)}, is {json.dumps(wanted)}"


def _with_corpora(config: TrainConfig, workdir: pathlib.Path, say) -> TrainConfig:
    """Fills in each phase's corpus, making the synthetic one where none is named."""
    default = config.corpus
    if not default and not all(phase.corpus for phase in config.phases):
        folder = workdir / "synthetic"
        if not (folder / "done").exists():
            say(f"writing {config.synthetic_notes:,} synthetic clinical notes")
            write_corpus(folder, config.synthetic_notes, config.seed)
            (folder / "done").write_text("")
        default = str(folder)
    phases = tuple(dataclasses.replace(p, corpus=p.corpus or default) for p in config.phases)
    for phase in phases:
        if not os.path.exists(phase.corpus):
            raise FileNotFoundError(
                f"corpus {phase.corpus}: expected a folder or file of .txt, .jsonl, .csv or .tsv, "
                "found nothing"
            )
    return dataclasses.replace(config, phases=phases)


def _tokenizer(config: TrainConfig, workdir: pathlib.Path, say) -> Tokenizer:
    """The run's tokenizer, kept in WORKDIR/tokenizer."""
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        source = config.tokenizer or config.init_from
        if source:
            tokenizer = AutoTokenizer.from_pretrained(source)
        else:
            say(f"training a byte-level BPE of at most {config.model.vocab_size:,} tokens")
            column = config.text_column or None
            texts = (d.text for d in read_documents(config.phases[0].corpus, text_column=column))
            tokenizer = train_bpe(texts, config.model.vocab_size)
        temporary = workdir / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("cls", "sep", "pad", "mask"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(
                f"tokenizer {config.tokenizer}: expected a {name} token, found none; use a "
                "tokenizer with ModernBERT's special tokens"
            )
    return tokenizer


def _model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModernBertConfig:
    """The model that is trained: init_from's architecture, the run's dtypes and dropout."""
    model = config.model
    if config.init_from:
        start = ModernBertConfig.from_json(resolve(config.init_from) / "config.json")
        same = ("dtype", "param_dtype", "residual_dtype", "attention_out_dropout")
        model = start.replace(**{name: getattr(model, name) for name in same})
        if config.row_length > model.max_position_embeddings:
            raise ValueError(
                f"row_length {config.row_length} exceeds the {model.max_position_embeddings} "
                f"positions of {config.init_from}; lower --row-length"
            )
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's vocab_size is "
            f"{model.vocab_size:,}; pass --model.vocab-size {-(-len(tokenizer) // 64) * 64} or "
            "another --tokenizer"
        )
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    return model.replace(**ids)


def _masking(config: TrainConfig, tokenizer: Tokenizer, rate: float) -> Masking:
    mask_id = tokenizer.mask_token_id
    assert mask_id is not None  # _tokenizer refused the others
    return Masking(
        rate=rate,
        mask_id=mask_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
        mask_special=config.mask_special_tokens,
    )


def _fresh_state(config: TrainConfig, model_config: ModernBertConfig, tx) -> TrainState:
    """The state at step 0: init_from's weights (and moments, when asked), or new ones."""
    from flax import nnx

    if not config.init_from:
        params = jax.jit(
            lambda: flatten(ModernBertForMaskedLM(model_config, rngs=nnx.Rngs(config.seed)))
        )()
        return TrainState(params, tx.init(params))
    model = ModernBertForMaskedLM.from_pretrained(
        config.init_from, dtype=model_config.dtype, param_dtype=model_config.param_dtype
    )
    params = flatten(model)
    optimizer = tx.init(params)
    if config.init_optimizer:
        folder = resolve(config.init_from)
        if not is_orbax(folder):
            raise ValueError(
                f"init_from {config.init_from}: init_optimizer needs an Orbax checkpoint; convert "
                "with `python -m convert from-composer ... --optimizer`"
            )
        saved = load_orbax(folder, optimizer=True)["optimizer"]
        optimizer = optimizer._replace(
            step=jnp.asarray(saved["step"], jnp.int32),
            mu={k: jnp.asarray(saved["mu"][k], jnp.float32) for k in params},
            nu={k: jnp.asarray(saved["nu"][k], jnp.float32) for k in params},
        )
    return TrainState(params, optimizer)
