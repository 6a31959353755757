"""A pretraining run from its configuration: `run(config)`.

Everything that can be refused is refused before the first step. What a run writes to its workdir:

    run.json  attention.json  tokenizer/  tokens/  checkpoints/  metrics.jsonl  goodput.jsonl
    tensorboard/  curves.png  export/  result.json

Every process of a job calls it; the first one writes.
"""

import contextlib
import dataclasses
import math
from typing import Any

import flax
import jax
import numpy as np

from modernbert_jax.tokenizer import fingerprint

from ..common.hosts import (
    agree,
    barrier,
    check_shared,
    code_digest,
    connect,
    first_then_others,
    log,
)
from ..common.sharding import batch_shards, describe, make_mesh
from ..tokens.store import TokenStore, joined
from .checkpoint import Checkpoints, Diverged, check_evaluation
from .config import TrainConfig
from .data import Batches, Position
from .evaluate import Evaluation
from .export import finish
from .session import Session, StepLog
from .setup import masking_of, model_config_of, prepare, settle_attention, start_state
from .step import Trainer, TrainState


def run(config: TrainConfig, recipe: str = "") -> dict[str, Any]:
    """Trains through all phases and returns the content of result.json.

    A workdir with checkpoints resumes its run. recipe: name of the experiment in train/configs, for
    the model card. Raises ValueError, FileNotFoundError or OSError with one line for bad input,
    before training; Diverged (with the step and the last good checkpoint) if the loss, a weight or
    a moment is not finite or far too large, which is never saved; OSError if a checkpoint or
    metrics.jsonl cannot be written. Returns {"stopped": True} after SIGTERM.
    """
    config.validate()
    connect(config.hosts)
    # The paths of a workdir may differ between hosts, and `hosts` does.
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("workdir", "hosts")}
    versions = {"versions": [jax.__version__, flax.__version__], "code": code_digest()}
    agree(flags | versions)
    mesh = make_mesh(config.mesh)
    if config.round_batch:
        config, change = config.rounded(batch_shards(mesh) * config.gradient_accumulation_steps)
        log(change)
        config.validate()
    workdir, tokenizer, corpora = first_then_others("prepare", lambda: prepare(config))
    check_shared(workdir)
    stores = [(n, s["train"], s["eval"]) for part in corpora for n, s in part.items()]
    agree(
        {
            "the corpora": [(name, *(s.fingerprint for s in both)) for name, *both in stores],
            "the tokenizer": fingerprint(tokenizer),
            "the kind of device": sorted({d.device_kind for d in jax.local_devices()}),
        }
    )
    model_config = model_config_of(config, tokenizer)
    config = settle_attention(config, model_config, mesh, workdir)
    trainer = Trainer(config, model_config, mesh)
    checkpoints = Checkpoints(workdir, trainer, config.keep_checkpoints, log)
    restored = checkpoints.restore()
    if restored:
        state, position = restored[0], Position(**restored[1])
        log(f"resuming from {restored[2]} (step {int(state.optimizer.step):,})")
    else:
        state, position = start_state(config, trainer), Position()
    log(
        f"{sum(math.prod(p.shape) for p in trainer.shapes.values()):,} parameters on "
        f"{describe(mesh)}; a step has {config.global_batch_size} sequences of "
        f"{config.sequence_length} tokens in {config.gradient_accumulation_steps} micro-batches"
    )
    train = [joined([store["train"] for store in stores.values()]) for stores in corpora]
    masking = masking_of(config, tokenizer, config.eval_mlm_probability)
    evaluations = [
        Evaluation(config, trainer, masking, {name: s["eval"] for name, s in stores.items()})
        for stores in corpora
    ]
    session = Session(config, trainer, workdir, tokenizer, int(state.optimizer.step))
    with contextlib.closing(checkpoints), contextlib.closing(session):
        barrier("start")
        try:
            for index in range(position.phase, len(config.phases)):
                state, position = _train_phase(
                    session, checkpoints, index, train[index], evaluations[index], state, position
                )
                if session.stopped:
                    checkpoints.wait()
                    barrier("stopped")
                    log(f"stopped; the same command resumes from {checkpoints.last_good()}")
                    return {"stopped": True}
            checkpoints.wait()
            return finish(session, state, position, corpora, train, evaluations, recipe)
        except Diverged as error:
            checkpoints.wait()  # the last one may still be written, and the one before it removed
            raise Diverged(
                f"{error}; last good checkpoint: {checkpoints.last_good()}. Lower the learning "
                "rate and pass that checkpoint as --init-from with a new --workdir"
            ) from None


def _train_phase(
    session: Session,
    checkpoints: Checkpoints,
    index: int,
    store: TokenStore,
    evaluation: Evaluation,
    state: TrainState,
    position: Position,
) -> tuple[TrainState, Position]:
    """Trains until the phase's budget is spent; returns the state and where the next one starts."""
    config, trainer, phase = session.config, session.trainer, session.config.phases[index]
    position = _on_corpus(position, phase.name, store)
    step = int(state.optimizer.step)
    peak = np.float32(config.optimizer.max_learning_rate or phase.learning_rate)
    batches = Batches(
        store,
        masking_of(config, session.tokenizer, phase.mlm_probability),
        config,
        phase=index,
        epoch=position.epoch,
        row=position.row,
        tokens=position.phase_tokens,
        slots=trainer.local_slots(),
    )
    steps = StepLog(session, phase, position.phase_tokens)

    def evaluate() -> None:
        with session.goodput.doing("evaluating"):
            scores = evaluation(state.params)
        check_evaluation(scores["loss"], step, trainer.model_config.vocab_size)
        session.write("eval", step, **scores, phase=phase.name, total_tokens=position.total_tokens)
        session.stall.beat()

    def save() -> None:
        with session.goodput.doing("saving"):
            checkpoints.save(state, dataclasses.asdict(position))
        session.goodput.commit(step)
        if session.writer is not None:
            session.writer.publish()
        session.stall.beat()

    with contextlib.closing(batches), contextlib.closing(steps):
        while position.phase_tokens < phase.tokens and not session.stopped:
            with session.goodput.doing("waiting"):
                batch = next(batches)
            session.profile.before(step + 1, state)
            learning_rate = phase.learning_rate_at(position.phase_tokens)
            with session.goodput.doing("steps" if steps.count else "compiling"):
                # Every host learns from the step's sum of "stop" that one of them has to stop.
                arrays = batch.arrays | {"stop": session.signal.flags(batch)}
                state, metrics = trainer.train_step(
                    state, trainer.to_devices(arrays), np.float32(learning_rate), peak
                )
                step, position = step + 1, position.after(batch)
                steps.add(step, metrics, batch, position, learning_rate)
            session.stall.beat()
            if step % config.eval_every == 0:
                steps.flush()
                evaluate()
            if step % config.checkpoint_every == 0:
                steps.flush()
                save()
        steps.flush()
    if not session.stopped:
        evaluate()
        position = Position(phase=index + 1, total_tokens=position.total_tokens)
    save()
    return state, position


def _on_corpus(position: Position, name: str, store: TokenStore) -> Position:
    """Returns the position with the corpus's fingerprint. Raises ValueError for another corpus."""
    if position.tokens_sha256 not in ("", store.fingerprint):
        raise ValueError(
            f"phase {name}: the corpus is not the one that this run has been trained on "
            f"(tokens {store.fingerprint[:12]}, were {position.tokens_sha256[:12]}); restore it or "
            "use another --workdir"
        )
    return dataclasses.replace(position, tokens_sha256=store.fingerprint)
