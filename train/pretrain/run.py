"""A pretraining run from its configuration: `run(config)`.

Everything that can be refused is refused before the first step. What a run writes to its workdir:

    run.json  attention.json  tokenizer/  tokens/  checkpoints/  metrics.jsonl  goodput.jsonl
    tensorboard/  curves.png  before_after.png  export/  result.json

Every process of a job calls it; the first one writes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.tokenizer import fingerprint

from ..common.hosts import (
    agree,
    barrier,
    check_shared,
    code_digest,
    connect,
    first_then_others,
    from_first,
    is_first,
    log,
)
from ..common.lease import Lease
from ..common.metrics import check_wandb
from ..common.sharding import batch_shards, describe, make_mesh, param_shardings
from ..tokens.store import TokenStore, joined
from .checkpoint import Checkpoints, Diverged, check_evaluation, past_of
from .config import Phase, TrainConfig
from .corpora import Corpora, open_corpora
from .data import Batches, Position
from .derive import changes, derived
from .evaluate import Evaluation, general_evaluation
from .export import finish
from .extend import Past, count_kept, first_larger, precedes, resumed
from .session import TIMED_STEPS, Session, StepLog
from .setup import (
    masking_of,
    model_config_of,
    open_workdir,
    prepare,
    read_record,
    settle_attention,
    start_state,
    within_positions,
    write_record,
)
from .step import Trainer, TrainState


def run(config: TrainConfig, recipe: str = "", model_flags: Collection[str] = ()) -> dict[str, Any]:
    """Trains through all phases and returns the content of result.json.

    A workdir with checkpoints resumes its run. recipe: name of the experiment in train/configs, for
    the model card. model_flags: fields of config.model that were set by hand; those that
    init_from decides otherwise are refused. Raises ValueError, FileNotFoundError or OSError with
    one line for bad input, before training; Diverged (with the step and the last good checkpoint)
    if the loss, a weight or a moment is not finite or far too large, which is never saved; OSError
    if a checkpoint or metrics.jsonl cannot be written. Returns {"stopped": True} after SIGTERM;
    after Ctrl-C raises KeyboardInterrupt, once a checkpoint is saved.
    """
    config.validate()
    connect(config.hosts)
    # The paths of a workdir may differ between hosts, and `hosts` does.
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("workdir", "hosts")}
    versions = {"versions": [jax.__version__, flax.__version__], "code": code_digest()}
    agree(flags | versions)
    mesh = make_mesh(config.mesh)
    if config.round_batch:
        config, change = config.rounded(
            batch_shards(mesh) * (config.gradient_accumulation_steps or 1)
        )
        log(change)
        config.validate()
    check_wandb(config.wandb)
    workdir = open_workdir(config)
    check_shared(workdir)
    lease = _lease(workdir)
    with contextlib.closing(lease) if lease else contextlib.nullcontext():
        return _run(config, recipe, model_flags, mesh, workdir, lease)


def _lease(workdir: Any) -> Lease | None:
    """Takes the workdir on the first process; raises ValueError on all if another run has it."""
    lease = refusal = None
    if is_first():
        try:
            lease = Lease(workdir, log)
        except ValueError as error:
            refusal = error
    if from_first(int(refusal is not None)):
        raise refusal or ValueError(f"workdir {workdir}: another run is using it")
    return lease


def _run(
    config: TrainConfig,
    recipe: str,
    model_flags: Collection[str],
    mesh: Mesh,
    workdir: Any,
    lease: Lease | None,
) -> dict[str, Any]:
    flags = first_then_others("checkpoint", lambda: within_positions(config))
    config = flags
    record = read_record(workdir)
    tokenizer = first_then_others("prepare", lambda: prepare(config, workdir))
    model_config = model_config_of(config, tokenizer, model_flags)
    # A mesh that does not divide the model, or a kernel that fails, is refused before hours of
    # tokenization.
    param_shardings(param_shapes(ModernBertForMaskedLM, model_config), mesh)
    config = settle_attention(config, model_config, mesh, workdir)
    corpora = first_then_others("corpora", lambda: open_corpora(config, workdir))
    given, config = config, _derived(config, model_config, corpora, mesh, record)
    for line in changes(given, config):
        log(line)
    config.validate()
    train = [joined([store["train"] for store in stores.values()]) for stores in corpora]
    trainer = Trainer(config, model_config, mesh)
    stores = [(n, s["train"], s["eval"]) for part in corpora for n, s in part.items()]
    agree(
        {
            "the corpora": [(name, *(s.fingerprint for s in both)) for name, *both in stores],
            "the tokenizer": fingerprint(tokenizer),
            "the kind of device": sorted({d.device_kind for d in jax.local_devices()}),
        }
    )
    checkpoints = Checkpoints(workdir, trainer, config.keep_checkpoints, log)
    if config.extend:
        _extend(config, record, checkpoints, train)
    if is_first():
        write_record(workdir, flags, config)
    restored = checkpoints.restore()
    if restored:
        state, past = restored[0], past_of(restored[2])
        position = resumed(Position(**restored[1]), past, config.phases)
        log(f"resuming from {restored[2]} (step {int(state.optimizer.step):,})")
    else:
        state, position = start_state(config, trainer), Position()
    log(_plan(config, trainer))
    masking = masking_of(config, tokenizer, config.eval_mlm_probability)
    evaluations = [
        Evaluation(config, trainer, masking, {name: s["eval"] for name, s in stores.items()})
        for stores in corpora
    ]
    general = general_evaluation(config, trainer, masking, workdir)
    session = Session(config, trainer, workdir, tokenizer, int(state.optimizer.step), lease)
    with contextlib.closing(checkpoints), contextlib.closing(session):
        barrier("start")
        try:
            if config.init_from and not restored:
                _evaluate_start(session, evaluations, general, state)
            for index in range(position.phase, len(config.phases)):
                state, position = _train_phase(
                    session, checkpoints, index, train[index], evaluations[index], state, position
                )
                if session.stopped:
                    checkpoints.wait()
                    barrier("stopped")
                    log(f"stopped; the same command resumes from {checkpoints.last_good()}")
                    if session.signal.interrupted:
                        raise KeyboardInterrupt
                    return {"stopped": True}
            checkpoints.wait()
            return finish(session, state, position, corpora, train, evaluations, general, recipe)
        except Diverged as error:
            checkpoints.wait()  # the last one may still be written, and the one before it removed
            raise Diverged(
                f"{error}; last good checkpoint: {checkpoints.last_good()}. Lower the learning "
                "rate and pass that checkpoint as --init-from with a new --workdir"
            ) from None


def _derived(
    config: TrainConfig,
    model: ModernBertConfig,
    corpora: Sequence[Corpora],
    mesh: Mesh,
    record: Mapping[str, Any] | None,
) -> TrainConfig:
    stores = [[store for parts in c.values() for store in parts.values()] for c in corpora]
    lengths = [store.lengths for stores_ in stores for store in stores_ if len(store.lengths)]
    device = mesh.local_devices[0]
    memory = device.memory_stats() if device.platform != "cpu" else None
    return derived(
        config,
        model,
        [sum(int(s["train"].lengths.sum(dtype=np.int64)) for s in c.values()) for c in corpora],
        max(int(x.max()) for x in lengths),
        batch_shards(mesh),
        memory["bytes_limit"] if memory else None,
        record,
    )


def _extend(
    config: TrainConfig,
    record: Mapping[str, Any] | None,
    checkpoints: Checkpoints,
    train: Sequence[TokenStore],
) -> None:
    """Removes the checkpoints that a larger budget makes useless, and logs what is discarded.

    Raises ValueError, before anything is removed, if the run cannot be extended.
    """
    if record is None:
        raise ValueError(
            "extend: expected run.json with what was derived for the run, found none of it: an "
            "earlier version began this run; pass its last checkpoint as --init-from instead"
        )
    index = first_larger(config.phases, record)
    if index is None:
        for phase in config.phases[len(record["derived"]["phases"]) :]:
            log(f"extend: a further phase, {phase.name}; nothing is discarded")
        return
    before = [Phase(**old) for old in record["derived"]["phases"]]
    found = checkpoints.newest(lambda past: precedes(past, before, index))
    if from_first(int(found is None)) or found is None:
        raise ValueError(
            f"extend: phase {config.phases[index].name} has a larger budget, but no checkpoint "
            "from before its decay is left; train it in a new --workdir"
        )
    folder, past = found
    name, where = config.phases[past.position.phase].name, past.position.phase
    if past.position.phase_tokens < config.phases[where].tokens:
        _on_corpus(past.position, name, train[where])
    barrier("extend")  # all processes have found it
    newest = checkpoints.discard_after(folder) if is_first() else 0
    step, newest = int(folder.name), from_first(newest)
    log(
        f"extend: phase {name} starts again from step {step:,}, before the decay; "
        + (f"steps {step + 1:,} to {newest:,} are discarded" if newest > step else "")
        + ("nothing is discarded" if newest == step else "")
    )


def _plan(config: TrainConfig, trainer: Trainer) -> str:
    """Returns what the run will do and need; the corpora have been logged before."""
    parameters = sum(math.prod(p.shape) for p in trainer.shapes.values())
    trained = sum(math.prod(p.shape) for p in trainer.of_trained(trainer.shapes).values())
    step_tokens = config.global_batch_size * config.sequence_length
    steps = {phase.name: -(-phase.tokens // step_tokens) for phase in config.phases}
    count = config.keep_checkpoints + 1 + count_kept(config.phases)
    lines = [
        f"plan: {parameters:,} parameters on {describe(trainer.mesh)}"
        + (f", {trained:,} of them trained" if trained < parameters else ""),
        f"a step has {config.global_batch_size} sequences of {config.sequence_length} tokens "
        f"({step_tokens:,}) in {config.gradient_accumulation_steps} micro-batches",
        *(f"{p.name}: {p.tokens:,} tokens, about {steps[p.name]:,} steps" for p in config.phases),
        f"in total {sum(phase.tokens for phase in config.phases):,} tokens, about "
        f"{sum(steps.values()):,} steps; checkpoints need up to "
        f"{(4 * parameters + 8 * trained) * count / 2**30:.1f} GiB; the remaining time follows "
        f"after {TIMED_STEPS} steps",
    ]
    return "\n    ".join(lines)


def _evaluate_start(
    session: Session,
    evaluations: Sequence[Evaluation],
    general: Evaluation | None,
    state: TrainState,
) -> None:
    """Scores the checkpoint that the run starts from, so that there is a before."""
    step = int(state.optimizer.step)  # not 0 if the checkpoint came with its moments
    known: dict[tuple[str, ...], dict[str, float]] = {}
    for phase, evaluation in zip(session.config.phases, evaluations, strict=True):
        names = tuple(evaluation.batches)
        if names not in known:
            known[names] = evaluation(state.params)
            log(f"before, {phase.name}: masked accuracy {known[names]['accuracy']:.1%}")
        session.write("eval", step, **known[names], phase=phase.name, total_tokens=0)
    if general is not None:
        session.write("general", step, **general(state.params), total_tokens=0)


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
    step, began = int(state.optimizer.step), position.phase_tokens
    constant = phase.tokens - phase.decay_tokens
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
    steps = StepLog(session, index, position.phase_tokens)

    def evaluate() -> None:
        with session.goodput.doing("evaluating"):
            scores = evaluation(state.params)
        check_evaluation(scores["loss"], step, trainer.model_config.vocab_size)
        session.write("eval", step, **scores, phase=phase.name, total_tokens=position.total_tokens)
        session.stall.beat()

    def save(past: Position) -> None:
        with session.goodput.doing("saving"):
            checkpoints.save(state, dataclasses.asdict(position), Past(past, began))
        session.goodput.commit(step)
        session.clock.saved()
        session.save_due = False
        session.publish()
        session.stall.beat()

    with contextlib.closing(batches), contextlib.closing(steps):
        while position.phase_tokens < phase.tokens and not session.stopped:
            with session.goodput.doing("waiting"):
                batch = next(batches)
            session.profile.before(step + 1, state)
            learning_rate = phase.learning_rate_at(position.phase_tokens)
            with session.goodput.doing("steps" if steps.count else "compiling"):
                # Every host learns from the step's sums whether to stop or to save.
                arrays = batch.arrays | session.flags(batch)
                state, metrics = trainer.train_step(
                    state, trainer.to_devices(arrays), np.float32(learning_rate), peak
                )
                began = position.phase_tokens
                step, position = step + 1, position.after(batch)
                steps.add(step, metrics, batch, position, learning_rate)
            session.stall.beat()
            if step % config.eval_every == 0:
                steps.flush()
                evaluate()
            decays = began < constant <= position.phase_tokens < phase.tokens
            if step % config.checkpoint_every == 0 or session.save_due or decays:
                steps.flush()
                save(position)
        steps.flush()
    past = position
    if not session.stopped:
        evaluate()
        position = Position(phase=index + 1, total_tokens=position.total_tokens)
    save(past)
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
