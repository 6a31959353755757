"""python -m train plan: a training step compiled for devices that are not here, and what that says.

    python -m train plan --config bioclinical_base --topology v5e:4x4
    python -m train plan --config bioclinical_large --topology h100:1x1x8 --json plan.json

Bytes, collectives and whether it fits are the compiler's; FLOPs are counted (train/common/flops.py); times
are floors, from peaks and bandwidths, and hours are at a model FLOPs utilisation (MFU) that is
stated, not measured.

What a config leaves open is chosen here:
- mesh: fsdp over all devices up to 16, data over the rest, tensor 1. At 16 ways parameters and
  moments of the large model are 0.3 GB a device; more ways would only lengthen the rings that
  gather weights. tensor exchanges activations in every layer; models this narrow never need it.
- gradient_accumulation_steps: of the numbers that the rows make, the one with the fewest empty rows, then the
  fewest micro-batches, among those of at most 65,536 tokens a device: that many keep the matrix
  units busy. Where it does not fit, fewer rows a micro-batch are tried.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import topologies as absent

if TYPE_CHECKING:  # at run time only after the environment is set
    from jax.sharding import Mesh

    from ..common.sharding import MeshShape
    from ..pretrain.config import Phase, TrainConfig
    from ..pretrain.step import Trainer

ENOUGH_TOKENS = 65_536  # of a micro-batch, a device
MOST_FSDP = 16
# Of a GPU's memory: the rest goes to the CUDA context, NCCL and fragmentation.
GPU_SHARE = 0.9


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code: 0 where the plan fits, else 1."""
    arguments, rest = _parser().parse_known_args(list(argv))
    settings = absent.environment(arguments.topology)
    if any(os.environ.get(name) != value for name, value in settings.items()):
        package = (__package__ or "").removesuffix(".plan")  # modernbert_jax.train in a wheel
        command = [sys.executable, "-m", package, "plan", *argv]
        return subprocess.run(command, env=os.environ | settings).returncode
    config, given = _config(arguments.config, rest)
    found = plan(
        config,
        arguments.topology,
        gradient_accumulation_steps=config.gradient_accumulation_steps
        if "gradient_accumulation_steps" in given
        else None,
        mfu=arguments.mfu,
        search=arguments.search,
        document_tokens=arguments.document_tokens,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = {"config": arguments.config or "", "command": _command(argv)} | found
    print(table(found))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train plan",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="Every field of the config is an option too, as of pretrain: --mesh.fsdp 16",
    )
    parser.add_argument("--config", help="name of an experiment in train/configs")
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:8x8x16, h100:1x1x8, ...")
    parser.add_argument("--json", metavar="FILE", help="write the plan there, too")
    parser.add_argument("--mfu", type=float, default=0.4, help="at which hours are given")
    parser.add_argument("--search", action="store_true", help="find the largest micro-batch")
    parser.add_argument(
        "--document-tokens",
        type=int,
        default=0,
        help="length of each document, for the attention's FLOPs; 0: as long as a row",
    )
    return parser


def _config(name: str | None, rest: list[str]) -> tuple["TrainConfig", set[str]]:
    """(the config, the names of the fields that the command line gives)."""
    import tyro

    from ..cli import config_names
    from ..pretrain.config import TrainConfig

    default = TrainConfig()
    if name is not None:
        if name not in config_names():
            raise ValueError(f"--config: expected one of {', '.join(config_names())}, got {name!r}")
        default = importlib.import_module(f".configs.{name}", __package__).get_config()
    config = tyro.cli(TrainConfig, prog="python -m train plan", args=rest, default=default)
    given = {arg[2:].partition("=")[0].replace("-", "_") for arg in rest if arg[:2] == "--"}
    return config, given


def _command(argv: Sequence[str]) -> str:
    return " ".join(["python -m train plan", *argv])


def plan(
    config: "TrainConfig",
    topology: str,
    *,
    gradient_accumulation_steps: int | None = None,
    mfu: float = 0.4,
    search: bool = False,
    document_tokens: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What the training step of `config` takes on the absent devices of `topology`, ready for JSON.

    A mesh of config.mesh's defaults is chosen; so are the micro-batches where `gradient_accumulation_steps` is
    None. The step is compiled for the phase that predicts the most positions. mfu: at which hours
    are given. document_tokens: of each document, 0 for config.sequence_length, where attention costs
    the most. say: gets lines of progress. Sizes are in bytes a device, FLOPs and times of one step.

    `absent.environment(topology)` must be set. Raises ValueError for bad values, a mesh that the
    model does not divide and a topology that nobody knows.
    """
    from ..common.flops import PEAK
    from ..common.sharding import MeshShape, make_mesh, row_shards

    config.validate()
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu: expected above 0 and at most 1, got {mfu}")
    devices = absent.devices(topology)
    if devices[0].device_kind not in PEAK:
        raise ValueError(
            f"device {devices[0].device_kind!r}: add its peak to PEAK in train/common/flops.py"
        )
    if config.mesh == MeshShape():
        config = dataclasses.replace(config, mesh=default_mesh(config.model.hidden_size, devices))
    mesh = make_mesh(config.mesh, devices)
    phase = max(config.phases, key=lambda phase: phase.mlm_probability)
    fills = choices(config.global_batch_size, row_shards(mesh))
    tried: dict[int, Outcome] = {}

    def attempt(fill: Fill) -> Outcome:
        if fill.gradient_accumulation_steps not in tried:
            trial = dataclasses.replace(
                config, gradient_accumulation_steps=fill.gradient_accumulation_steps
            )
            tried[fill.gradient_accumulation_steps] = compile_step(trial, phase, mesh, say)
        return tried[fill.gradient_accumulation_steps]

    fill = _take(fills, gradient_accumulation_steps, config.sequence_length)
    outcome = attempt(fill)
    while not outcome.fits and gradient_accumulation_steps is None and fill.device_rows > 1:
        fill = _better([f for f in fills if f.device_rows < fill.device_rows])
        outcome = attempt(fill)
    config = dataclasses.replace(
        config, gradient_accumulation_steps=fill.gradient_accumulation_steps
    )
    most = _largest(fills, lambda fill: attempt(fill).fits) if search else None
    return _report(config, phase, topology, mesh, fill, outcome, most, mfu, document_tokens)


def default_mesh(width: int, devices: Sequence[Any]) -> "MeshShape":
    """fsdp over as many devices as divide `width` and the devices, at most 16; data the rest."""
    from ..common.sharding import MeshShape

    ways = range(1, min(MOST_FSDP, len(devices)) + 1)
    return MeshShape(fsdp=max(n for n in ways if len(devices) % n == width % n == 0))


# How rows are dealt out.


@dataclasses.dataclass(frozen=True)
class Fill:
    """A step of `rows` rows as `gradient_accumulation_steps` of `slots` row slots, `device_rows` a device."""

    rows: int
    gradient_accumulation_steps: int
    slots: int
    device_rows: int

    @property
    def waste(self) -> float:
        """The share of slots that stays empty because the devices do not divide the rows."""
        return 1.0 - self.rows / (self.gradient_accumulation_steps * self.slots)


def choices(rows: int, shards: int) -> list[Fill]:
    """A fill for every number of micro-batches that `rows` make, on devices that split one of them
    `shards` ways; the largest micro-batches first. The last one of a step may have fewer rows."""
    up = lambda n, by: -(-n // by)  # noqa: E731
    counts = [n for n in range(1, rows + 1) if up(rows, up(rows, n)) == n]
    each = {n: up(up(rows, n), shards) for n in counts}
    return [Fill(rows, n, each[n] * shards, each[n]) for n in counts]


def _better(fills: list[Fill]) -> Fill:
    """The fewest empty rows, then the fewest micro-batches."""
    return min(fills, key=lambda fill: (fill.waste, fill.gradient_accumulation_steps))


def _take(fills: list[Fill], gradient_accumulation_steps: int | None, sequence_length: int) -> Fill:
    if gradient_accumulation_steps is not None:
        return next(
            fill
            for fill in fills
            if fill.gradient_accumulation_steps == gradient_accumulation_steps
        )
    enough = [f for f in fills if f.device_rows * sequence_length <= ENOUGH_TOKENS]
    return _better(enough or [f for f in fills if f.device_rows == fills[-1].device_rows])


def _largest(fills: list[Fill], fits: Callable[[Fill], bool]) -> Fill | None:
    """The fitting fill with the most rows a device, by bisection; None where not one row fits."""
    sizes = sorted({fill.device_rows for fill in fills})
    at = [_better([fill for fill in fills if fill.device_rows == size]) for size in sizes]
    low, high = -1, len(at)  # at[low] fits, at[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at[middle]) else (low, middle)
    return at[low] if low >= 0 else None


# Compiling.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of compiling a step. missing: bytes a device beyond what there is."""

    fits: bool
    used: float
    available: float
    seconds: float
    missing: float = 0.0
    kinds: dict[str, float] = dataclasses.field(default_factory=dict)
    program: Any = None  # hlo.Program


def compile_step(
    config: "TrainConfig", phase: "Phase", mesh: "Mesh", say: Callable[[str], None]
) -> Outcome:
    """Compiles the training step of one phase for the devices of `mesh`, which need not be here."""
    import warnings

    from ..pretrain.step import Trainer
    from . import hlo

    device = mesh.devices.flat[0]
    available = _available(device)
    platform = "cuda" if device.platform == "gpu" else device.platform
    trainer = Trainer(config, config.model, mesh)
    kinds = _state_bytes(trainer)
    say(
        f"compiling for {mesh.size} {device.device_kind}: mesh {_shape(mesh)}, "
        f"{config.gradient_accumulation_steps} micro-batches of {config.micro_batch_size} rows; a minute or more"
    )
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel has never run
        traced = trainer.train_step.trace(*abstract_arguments(trainer, phase))
    lowered = traced.lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile()
    except Exception as error:  # jax has no one class for it
        used, limit = _out_of_memory(str(error), sum(kinds.values()))
        if used is None:
            raise
        seconds = time.monotonic() - start
        say(f"  does not fit ({seconds:.0f} s)")
        return Outcome(False, used, limit, seconds, used - limit, kinds)
    memory: Any = compiled.memory_analysis()
    kinds |= {
        "batch": memory.argument_size_in_bytes - sum(kinds.values()),
        "activations and temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    used, seconds = sum(kinds.values()), time.monotonic() - start
    program = hlo.read(compiled.as_text() or "", mesh.size)
    missing = max(0.0, used - available)
    say(f"  {used / 2**30:.2f} GiB a device ({seconds:.0f} s)")
    return Outcome(not missing, used, available, seconds, missing, kinds, program)


def abstract_arguments(trainer: "Trainer", phase: "Phase") -> tuple[Any, ...]:
    """Shapes and shardings of train_step's arguments: state, batch and the two rates."""
    import jax
    import jax.numpy as jnp

    from ..common.optimizer import StableAdamWState
    from ..common.sharding import batch_sharding, padded_rows
    from ..pretrain.masking import predicted_positions
    from ..pretrain.step import TrainState

    config, mesh = trainer.config, trainer.mesh
    where = trainer.shardings.params
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[path])
        for path, leaf in trainer.shapes.items()
    }
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=trainer.replicated)
    state = TrainState(params, StableAdamWState(step, params, params))  # type: ignore[arg-type]
    slots = padded_rows(config.micro_batch_size, mesh)
    places = predicted_positions(config.sequence_length, phase.mlm_probability)
    widths = {"input_ids": config.sequence_length, "segment_ids": config.sequence_length}
    widths |= {"predict_positions": places, "labels": places}
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.gradient_accumulation_steps, slots, width),
            jnp.int32,
            sharding=batch_sharding(mesh),
        )
        for name, width in widths.items()
    }
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=trainer.replicated)
    return state, batch, rate, rate


def _state_bytes(trainer: "Trainer") -> dict[str, float]:
    """Bytes of parameters and of both moments on one device."""
    import math

    from ..common.sharding import param_shardings

    size, where = 0, param_shardings(trainer.shapes, trainer.mesh)
    for path, leaf in trainer.shapes.items():
        shard = where[path].shard_shape(tuple(leaf.shape))
        size += math.prod(shard) * leaf.dtype.itemsize
    return {"parameters": size, "moments": 2 * size}


def _available(device: Any) -> float:
    """Bytes that a program can have of a device's memory.

    A TPU's compiler keeps some for itself, and says how much it gives out when it refuses a
    program that no chip can hold.
    """
    import jax
    import jax.numpy as jnp

    from ..common.flops import PEAK

    if device.platform != "tpu":
        return PEAK[device.device_kind].hbm_bytes * GPU_SHARE
    where = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=where)
    try:
        jax.jit(lambda x: jnp.sin(x) @ x).trace(x).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # jax has no one class for it
        limit = _out_of_memory(str(error), 0)[1]
        if limit:
            return limit
    return PEAK[device.device_kind].hbm_bytes


def _out_of_memory(message: str, arguments: float) -> tuple[Any, Any]:
    """(bytes needed, bytes there are) of a TPU compiler's refusal, else (None, None).

    It names either all that is needed or the temporaries alone, which come on top of `arguments`.
    """
    size = r"([\d.]+)([KMGT])"
    whole = re.search(rf"Used {size} of {size} hbm", message)
    part = re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    found = whole or part
    if found is None:
        return None, None
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, there = (float(found[i]) * scale[found[i + 1]] for i in (1, 3))
    return needed + (0 if whole else arguments), there


# What comes of it.


def _report(
    config: "TrainConfig",
    phase: "Phase",
    topology: str,
    mesh: "Mesh",
    fill: Fill,
    outcome: Outcome,
    most: Fill | None,
    mfu: float,
    document_tokens: int,
) -> dict[str, Any]:
    from ..common.flops import PEAK

    devices = list(mesh.devices.flat)
    peak = PEAK[devices[0].device_kind]
    found: dict[str, Any] = {
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": absent.chips(devices),
        "mesh": {str(axis): size for axis, size in mesh.shape.items()},
        "rows": config.global_batch_size,
        "sequence_length": config.sequence_length,
        "gradient_accumulation_steps": fill.gradient_accumulation_steps,
        "micro_batch_slots": fill.slots,
        "device_rows": fill.device_rows,
        "waste": fill.waste,
        "compiled_phase": phase.name,
        "compile_seconds": outcome.seconds,
        "fits": outcome.fits,
        "used_bytes": outcome.used,
        "available_bytes": outcome.available,
        "bytes": outcome.kinds,
    }
    if not outcome.fits:
        found["missing_bytes"] = outcome.missing
        found["would_help"] = advice(config, mesh, fill)
    if most is not None:
        found["largest"] = {
            "gradient_accumulation_steps": most.gradient_accumulation_steps,
            "micro_batch_rows": most.rows // most.gradient_accumulation_steps,
            "device_rows": most.device_rows,
        }
    sent = 0.0
    if outcome.program is not None:
        found["collectives"] = _by_kind(outcome.program.collectives)
        sent = sum(entry["sent_bytes"] for entry in found["collectives"].values())
        found["copies"] = {
            "count": sum(times for _, times in outcome.program.copies),
            "bytes": sum(size * times for size, times in outcome.program.copies),
        }
        found["loops_of_unknown_length"] = outcome.program.unknown_loops
    document = document_tokens or config.sequence_length
    found["document_tokens"] = document
    found["phases"] = [
        phase_costs(config, p, fill, peak, len(devices), found["chips"], mfu, document, sent)
        for p in config.phases
    ]
    found["mfu"] = mfu
    return found


def phase_costs(
    config: "TrainConfig",
    phase: "Phase",
    fill: Fill,
    peak: Any,
    devices: int,
    chips: int,
    mfu: float,
    document: int,
    sent: float,
) -> dict[str, Any]:
    """FLOPs of a step, its floors in seconds, and the hours of a phase at a stated MFU.

    Empty rows cost as much as full ones: they lengthen the hours, and lower the MFU that is left.
    """
    import numpy as np

    from ..common.flops import hardware_flops, model_flops
    from ..pretrain.masking import predicted_positions

    tokens = config.global_batch_size * config.sequence_length
    lengths = np.full(max(1, tokens // document), document)
    model = model_flops(config.model, lengths, phase.mlm_probability * tokens).train
    hardware = hardware_flops(
        config.model,
        lengths,
        rows=fill.gradient_accumulation_steps * fill.slots,
        sequence_length=config.sequence_length,
        places=predicted_positions(config.sequence_length, phase.mlm_probability),
        remat=config.remat,
    )
    arithmetic = hardware / (devices * peak.flops)
    links = sent / (peak.link_bandwidth / 2)  # PEAK has both directions
    at_mfu = model / (devices * peak.flops * mfu) / (1.0 - fill.waste)
    hours = phase.tokens / tokens * at_mfu / 3600
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "steps": -(-phase.tokens // tokens),
        "model_flops": model,
        "hardware_flops": hardware,
        "arithmetic_floor_seconds": arithmetic,
        "link_floor_seconds": links,
        "highest_mfu": model / (devices * peak.flops * max(arithmetic, links)),
        "seconds_a_step": at_mfu,
        "hours": hours,
        "chip_hours": hours * chips,
    }


def _by_kind(collectives: list[Any]) -> dict[str, dict[str, float]]:
    """Counts, bytes of the whole arrays, and bytes that a device sends, in one step."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives:
        entry = found.setdefault(one.kind, {"count": 0, "bytes": 0, "sent_bytes": 0.0})
        entry["count"] += one.times
        entry["bytes"] += one.times * one.bytes
        entry["sent_bytes"] += one.sent
    return found


def advice(config: "TrainConfig", mesh: "Mesh", fill: Fill) -> list[str]:
    """What would make a step smaller, the cheapest first."""
    found = []
    if fill.device_rows > 1:
        smaller = [f for f in choices(fill.rows, fill.slots // fill.device_rows)]
        smaller = [f for f in smaller if f.device_rows < fill.device_rows]
        found.append(
            f"smaller micro-batches: --gradient-accumulation-steps {_better(smaller).gradient_accumulation_steps}"
        )
    if config.remat != "layers":
        found.append("computing layers again in the backward pass: --remat layers")
    width, left = config.model.hidden_size, mesh.shape["data"]
    wider = [n for n in range(2, left + 1) if left % n == width % (n * mesh.shape["fsdp"]) == 0]
    if wider:
        ways = mesh.shape["fsdp"] * wider[0]
        found.append(f"parameters and moments split more ways: --mesh.fsdp {ways}")
    if config.loss_chunk > 256:
        found.append(f"fewer logits at once: --loss-chunk {config.loss_chunk // 4}")
    return found or ["devices with more memory, or shorter rows: --sequence-length"]


# For reading.


def table(found: dict[str, Any]) -> str:
    """A plan as lines of text."""
    gib = 2.0**30
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    lines = [
        f"{found['topology']}: {found['devices']} {found['device']} ({found['chips']} chips)",
        f"  mesh            {mesh}",
        f"  step            {found['rows']} rows of {found['sequence_length']} tokens in "
        f"{found['gradient_accumulation_steps']} micro-batches of {found['micro_batch_slots']} slots, "
        f"{found['device_rows']} a device; {found['waste']:.1%} of the slots stay empty",
        f"  memory          {'fits' if found['fits'] else 'DOES NOT FIT'}: "
        f"{found['used_bytes'] / gib:.2f} of {found['available_bytes'] / gib:.2f} GiB a device, "
        + (
            f"{(found['available_bytes'] - found['used_bytes']) / gib:.2f} GiB left"
            if found["fits"]
            else f"{found['missing_bytes'] / gib:.2f} GiB too much"
        ),
    ]
    lines += [f"    {k:<28}{v / gib:9.3f} GiB" for k, v in found["bytes"].items()]
    lines += [f"  would help      {line}" for line in found.get("would_help", [])]
    if "largest" in found:
        most = found["largest"]
        lines.append(
            f"  largest fitting {most['micro_batch_rows']} rows a micro-batch "
            f"({most['device_rows']} a device): --gradient-accumulation-steps {most['gradient_accumulation_steps']}"
        )
    if "collectives" in found:
        lines.append("  exchanged in a step, by each device")
        for kind, entry in sorted(found["collectives"].items()):
            lines.append(
                f"    {kind:<20}{entry['count']:>7} times {entry['bytes'] / 1e9:9.3f} GB, "
                f"{entry['sent_bytes'] / 1e9:.3f} GB sent"
            )
        copies = found["copies"]
        lines.append(
            f"  copies          {copies['count']} of 1 MiB or more, {copies['bytes'] / 1e9:.1f} GB"
        )
    for phase in found["phases"]:
        lines += [
            f"  {phase['name']}: {phase['tokens']:,} tokens, {phase['steps']:,} steps",
            f"    FLOPs a step          {phase['model_flops']:.3e} of the model, "
            f"{phase['hardware_flops']:.3e} of the hardware "
            f"(documents of {found['document_tokens']} tokens)",
            f"    floor of a step       {phase['arithmetic_floor_seconds']:.3f} s of arithmetic, "
            f"{phase['link_floor_seconds']:.3f} s of links; at most {phase['highest_mfu']:.0%} MFU",
            f"    at {found['mfu']:.0%} MFU            {phase['seconds_a_step']:.2f} s a step, "
            f"{phase['hours']:,.1f} hours, {phase['chip_hours']:,.0f} chip-hours",
        ]
    lines.append(f"  compiled in {found['compile_seconds']:.0f} s ({found['compiled_phase']})")
    return "\n".join(lines)


def _shape(mesh: "Mesh") -> str:
    return " x ".join(str(size) for size in mesh.shape.values())
