"""Compiles the training step for the devices of a mesh, which need not exist."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..common.flops import PEAK
from ..common.optimizer import StableAdamWState
from ..common.sharding import batch_sharding, padded_batch_size, param_shardings
from ..pretrain.config import Phase, TrainConfig
from ..pretrain.masking import predicted_positions
from ..pretrain.step import Trainer, TrainState
from . import hlo

# The share of a GPU's memory that a program can use; the CUDA context, NCCL and fragmentation take
# the rest.
GPU_SHARE = 0.9
# Optimizes little, in a third of the time. Temporaries stay within a few percent of the real ones,
# cycles do not: it answers whether a step fits, nothing else.
_FAST: Any = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a step. All sizes are bytes per device.

    memory: the used bytes by what they hold. seconds: what compiling took. refused: by the
    compiler, for lack of memory. program: None if refused or compiled fast.
    """

    used: float
    available: float
    seconds: float
    memory: dict[str, float]
    refused: bool = False
    program: hlo.Program | None = None

    @property
    def fits(self) -> bool:
        return not self.refused and self.used <= self.available


def compile_step(
    config: TrainConfig,
    phase: Phase,
    mesh: Mesh,
    log: Callable[[str], None],
    *,
    fast: bool = False,
) -> Compiled:
    """Compiles the training step of a phase for the devices of `mesh`.

    log: called with lines of progress. fast: with few optimizations, only to learn what it needs
    of memory; the result has no program. Raises what the compiler raises, except for lack of
    memory.
    """
    device = mesh.devices.flat[0]
    available = available_bytes(device)
    platform = "cuda" if device.platform == "gpu" else device.platform
    trainer = Trainer(config, config.model, mesh)
    memory = state_bytes(trainer)
    shape = " x ".join(str(size) for size in mesh.shape.values())
    log(
        f"compiling{' fast' if fast else ''} for {mesh.size} {device.device_kind}: mesh {shape}, "
        f"{config.gradient_accumulation_steps} micro-batches of {config.micro_batch_size} "
        f"sequences, remat {config.remat}; this takes a minute or more"
    )
    start = time.monotonic()
    traced = trainer.train_step.trace(*abstract_arguments(trainer, phase))
    lowered = traced.lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile(_FAST if fast else None)
    except Exception as error:  # jax has no common class for these
        refusal = out_of_memory(str(error), sum(memory.values()))
        if refusal is None:
            raise
        seconds = time.monotonic() - start
        log(f"  does not fit ({seconds:.0f} s)")
        return Compiled(*refusal, seconds, memory, refused=True)
    stats: Any = compiled.memory_analysis()
    memory |= {
        "batch": stats.argument_size_in_bytes - sum(memory.values()),
        "activations and temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    used, seconds = sum(memory.values()), time.monotonic() - start
    log(f"  {used / 2**30:.2f} GiB per device ({seconds:.0f} s)")
    program = None if fast else hlo.read(compiled.as_text() or "", mesh.size)
    return Compiled(used, available, seconds, memory, program=program)


def abstract_arguments(trainer: Trainer, phase: Phase) -> tuple[Any, ...]:
    """Shapes and shardings of train_step's arguments: state, batch and the two rates."""
    config, mesh = trainer.config, trainer.mesh
    shardings = trainer.shardings.params
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in trainer.shapes.items()
    }
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=trainer.replicated)
    moments = trainer.of_trained(params)
    state = TrainState(params, StableAdamWState(step, moments, moments))  # type: ignore[arg-type]
    positions = predicted_positions(config.sequence_length, phase.mlm_probability)
    widths = {"input_ids": config.sequence_length, "segment_ids": config.sequence_length}
    widths |= {"predict_positions": positions, "labels": positions}
    rows = (
        config.gradient_accumulation_steps or 1,
        padded_batch_size(config.micro_batch_size, mesh),
    )
    batch = {
        name: jax.ShapeDtypeStruct((*rows, width), jnp.int32, sharding=batch_sharding(mesh))
        for name, width in widths.items()
    }
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=trainer.replicated)
    return state, batch, rate, rate


def state_bytes(trainer: Trainer) -> dict[str, float]:
    """Bytes of the parameters and of both moments on one device."""
    shardings = param_shardings(trainer.shapes, trainer.mesh)
    sizes = {
        path: math.prod(shardings[path].shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        for path, leaf in trainer.shapes.items()
    }
    moments = 2 * sum(trainer.of_trained(sizes).values())
    return {"parameters": sum(sizes.values()), "moments": moments}


def available_bytes(device: Any) -> float:
    """The bytes of a device's memory that a program can use.

    A TPU's compiler reserves some, and reports the rest when it refuses a program that is too large
    for any chip.
    """
    if device.platform != "tpu":
        return PEAK[device.device_kind].hbm_bytes * GPU_SHARE
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: jnp.sin(x) @ x).trace(x).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # jax has no common class for these
        if refusal := out_of_memory(str(error), 0):
            return refusal[1]
    return PEAK[device.device_kind].hbm_bytes


def out_of_memory(message: str, arguments: float) -> tuple[float, float] | None:
    """(bytes needed, bytes available) in a TPU compiler's error for lack of memory, else None.

    The error gives either the total or the temporaries alone; `arguments` is then added to them.
    """
    size = r"([\d.]+)([KMGT])"
    total = re.search(rf"Used {size} of {size} hbm", message)
    part = re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = total or part
    if found is None:
        return None
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, available = (float(found[i]) * scale[found[i + 1]] for i in (1, 3))
    return needed + (0 if total else arguments), available
