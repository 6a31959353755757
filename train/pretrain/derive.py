"""What a configuration leaves to the checkpoint, the corpora and the devices, as numbers.

Everything but the number of micro-batches follows from the checkpoint and the corpora alone, so
that a run is the same on any hardware.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from modernbert_jax import ModernBertConfig

from .config import TrainConfig
from .extend import begun

FEWEST_STEPS = 300  # below it, a larger batch costs more than it gains
FEWEST_SEQUENCES, SHORTEST = 8, 128
# Peak learning rate of continued pretraining from a released checkpoint, by the model's width.
# Source: BioClinical ModernBERT trains base at 3e-4 and large at 5e-5 from checkpoints before their
# decay, in steps of 4.7M tokens; a released checkpoint has decayed and these steps are smaller.
BASE_RATE, LARGE_RATE, LARGE_WIDTH = 1e-4, 5e-5, 1024
# Bytes of activations for each token and layer and feature with --remat layers: 7.7 GiB for 6
# sequences of 8192 tokens of base on a TPU v5e, as its compiler reports.
_ACTIVATION_BYTES = 10
_STATE_BYTES = 16  # of a parameter: float32 weight, gradient and two moments
_MEMORY_SHARE = 0.8
_CPU_TOKENS = 8192  # of a micro-batch on a CPU, whose speed does not depend on it


def derived(
    config: TrainConfig,
    model: ModernBertConfig,
    tokens: Sequence[int],
    longest: int,
    devices: int = 1,
    memory_bytes: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Returns a configuration in which every number is set.

    tokens: of each phase's training text. longest: tokens of the longest chunk. devices: that split
    the sequences of a step. memory_bytes: of one of them; None for a CPU. record: run.json of a
    run that has begun.
    """
    given = config
    rate = LARGE_RATE if model.hidden_size >= LARGE_WIDTH else BASE_RATE
    phases = [
        dataclasses.replace(phase, learning_rate=phase.learning_rate or rate)
        for phase in config.phases
    ]
    if config.epochs:
        whole = sum(phase.tokens for phase in phases)
        phases = [
            _rescaled(phase, round(config.epochs * phase.tokens / whole * count))
            for phase, count in zip(phases, tokens, strict=True)
        ]
    config = dataclasses.replace(config, phases=tuple(phases))
    if record is not None:
        config = begun(config, given, record)
    elif config.fit_to_corpus:
        config = _fitted(config, sum(phase.tokens for phase in phases), longest)
    if config.gradient_accumulation_steps:
        return config
    steps = _micro_batches(config, model, devices, memory_bytes)
    return dataclasses.replace(config, gradient_accumulation_steps=steps)


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Returns in words what `derived` has set."""
    names = ("sequence_length", "global_batch_size", "gradient_accumulation_steps")
    lines = [
        f"{name.replace('_', ' ')}: {getattr(after, name):,}"
        for name in names
        if getattr(after, name) != getattr(before, name)
    ]
    for old, new in zip(before.phases, after.phases, strict=True):
        if old != new:
            lines.append(
                f"phase {new.name}: {new.tokens:,} tokens, mask {new.mlm_probability:.0%}, peak "
                f"learning rate {new.learning_rate:g}"
            )
    return lines


def _rescaled(phase: Any, tokens: int) -> Any:
    """Returns a phase with this budget in tokens; warm-up and decay keep their share of it."""
    names = ("warmup_tokens", "decay_tokens", "batch_size_warmup_tokens")
    scaled = {name: getattr(phase, name) * tokens // phase.tokens for name in names}
    return dataclasses.replace(phase, tokens=tokens, **scaled)


def _fitted(config: TrainConfig, budget: int, longest: int) -> TrainConfig:
    """Fits the length of a sequence to the longest chunk, and the size of a step to the budget."""
    length = min(config.sequence_length, max(SHORTEST, 2 ** math.ceil(math.log2(max(longest, 1)))))
    sequences = config.global_batch_size * (config.sequence_length // length)
    while sequences > FEWEST_SEQUENCES and budget < FEWEST_STEPS * sequences * length:
        sequences = max(FEWEST_SEQUENCES, sequences // 2)
    return dataclasses.replace(config, sequence_length=length, global_batch_size=sequences)


def _micro_batches(
    config: TrainConfig, model: ModernBertConfig, devices: int, memory_bytes: int | None
) -> int:
    """Returns the fewest micro-batches per step that should fit; the sequences divide evenly."""
    if memory_bytes is None:
        room = max(1, _CPU_TOKENS // config.sequence_length)
    else:
        free = _MEMORY_SHARE * memory_bytes - _STATE_BYTES * _parameters(model)
        width = model.hidden_size * model.num_hidden_layers
        room = int(free // (_ACTIVATION_BYTES * width * config.sequence_length))
    most = max(1, room) * devices
    return next(
        n
        for n in range(1, config.global_batch_size + 1)
        if config.global_batch_size % n == 0
        and (config.global_batch_size // n <= most)
        or n == config.global_batch_size
    )


def _parameters(model: ModernBertConfig) -> int:
    D, F = model.hidden_size, model.intermediate_size
    return model.vocab_size * D + model.num_hidden_layers * (4 * D * D + 3 * D * F)
