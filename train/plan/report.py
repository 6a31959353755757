"""A plan as a dictionary for JSON and as text. FLOPs are counted (train/common/flops.py); times are
lower bounds, from peak FLOP/s and bandwidths; hours assume a stated model FLOPs utilization (MFU).
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from ..common.flops import PEAK, hardware_flops, model_flops
from ..pretrain.config import Phase, TrainConfig
from ..pretrain.masking import predicted_positions
from . import topologies
from .compile import Compiled
from .hlo import Program
from .search import BatchSplit, suggestions


def report(
    config: TrainConfig,
    phase: Phase,
    topology: str,
    mesh: Mesh,
    split: BatchSplit,
    compiled: Compiled,
    largest: BatchSplit | None,
    mfu: float,
    document_tokens: int,
) -> dict[str, Any]:
    """The plan as a dictionary. Sizes are bytes per device; FLOPs and times are per step.

    phase: the one that was compiled. largest: the largest micro-batch that fits, if it was sought.
    mfu and document_tokens: as for `phase_costs`.
    """
    devices = list(mesh.devices.flat)
    found: dict[str, Any] = {
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": topologies.chips(devices),
        "mesh": {str(axis): size for axis, size in mesh.shape.items()},
        "global_batch_size": config.global_batch_size,
        "sequence_length": config.sequence_length,
        "gradient_accumulation_steps": split.gradient_accumulation_steps,
        "padded_micro_batch_size": split.padded_micro_batch_size,
        "per_device_batch_size": split.per_device_batch_size,
        "batch_padding": split.padding,
        "compiled_phase": phase.name,
        "compile_seconds": compiled.seconds,
        "fits": compiled.fits,
        "used_bytes": compiled.used,
        "available_bytes": compiled.available,
        "memory_bytes": compiled.memory,
    }
    if not compiled.fits:
        found["missing_bytes"] = compiled.used - compiled.available
        found["suggestions"] = suggestions(config, mesh, split)
    if largest is not None:
        found["largest_micro_batch"] = {
            "gradient_accumulation_steps": largest.gradient_accumulation_steps,
            "micro_batch_size": largest.global_batch_size // largest.gradient_accumulation_steps,
            "per_device_batch_size": largest.per_device_batch_size,
        }
    found |= _communication(compiled.program) if compiled.program else {}
    collectives = found.get("collectives", {})
    communication = sum(entry["communication_bytes"] for entry in collectives.values())
    found["document_tokens"] = document_tokens or config.sequence_length
    found["phases"] = [
        phase_costs(
            config, p, split, devices[0].device_kind, len(devices), found["chips"], mfu,
            found["document_tokens"], communication,
        )
        for p in config.phases
    ]  # fmt: skip
    found["mfu"] = mfu
    return found


def phase_costs(
    config: TrainConfig,
    phase: Phase,
    split: BatchSplit,
    device_kind: str,
    devices: int,
    chips: int,
    mfu: float,
    document_tokens: int,
    communication_bytes: float,
) -> dict[str, Any]:
    """FLOPs of a step, lower bounds on its seconds, and the hours of a phase at a stated MFU.

    document_tokens: the length of each document. communication_bytes: sent by each device in a
    step. Padding costs as much as other sequences: it adds hours and lowers the possible MFU.
    """
    peak = PEAK[device_kind]
    tokens = config.global_batch_size * config.sequence_length
    lengths = np.full(max(1, tokens // document_tokens), document_tokens)
    model = model_flops(config.model, lengths, phase.mlm_probability * tokens).train
    hardware = hardware_flops(
        config.model,
        lengths,
        sequences=split.gradient_accumulation_steps * split.padded_micro_batch_size,
        sequence_length=config.sequence_length,
        predictions=predicted_positions(config.sequence_length, phase.mlm_probability),
        remat=config.remat,
    )
    compute = hardware / (devices * peak.flops)
    communication = communication_bytes / (peak.link_bandwidth / 2)  # PEAK has both directions
    seconds = model / (devices * peak.flops * mfu) / (1.0 - split.padding)
    hours = phase.tokens / tokens * seconds / 3600
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "steps": -(-phase.tokens // tokens),
        "model_flops": model,
        "hardware_flops": hardware,
        "compute_lower_bound_seconds": compute,
        "communication_lower_bound_seconds": communication,
        "mfu_upper_bound": model / (devices * peak.flops * max(compute, communication)),
        "seconds_per_step": seconds,
        "hours": hours,
        "chip_hours": hours * chips,
    }


def _communication(program: Program) -> dict[str, Any]:
    """Collectives by kind and large copies in one step, with their counts and bytes."""
    collectives: dict[str, dict[str, float]] = {}
    for one in program.collectives:
        empty = {"count": 0, "bytes": 0, "communication_bytes": 0.0}
        entry = collectives.setdefault(one.kind, empty)
        entry["count"] += one.count
        entry["bytes"] += one.count * one.bytes
        entry["communication_bytes"] += one.communication_bytes
    return {
        "collectives": collectives,
        "copies": {
            "count": sum(count for _, count in program.copies),
            "bytes": sum(size * count for size, count in program.copies),
        },
        "loops_with_unknown_trip_count": program.unknown_loops,
    }


def table(found: dict[str, Any]) -> str:
    """The plan as lines of text."""
    gib = 2.0**30
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    spare = (found["available_bytes"] - found["used_bytes"]) / gib
    fits = f"fits, {spare:.2f} GiB spare" if found["fits"] else f"DOES NOT FIT by {-spare:.2f} GiB"
    lines = [
        f"{found['topology']}: {found['devices']} {found['device']} ({found['chips']} chips)",
        f"  mesh            {mesh}",
        f"  step            {found['global_batch_size']} sequences of {found['sequence_length']} "
        f"tokens: {found['gradient_accumulation_steps']} micro-batches of "
        f"{found['padded_micro_batch_size']}, {found['per_device_batch_size']} per device, "
        f"{found['batch_padding']:.1%} padding",
        f"  memory          {fits}: {found['used_bytes'] / gib:.2f} of "
        f"{found['available_bytes'] / gib:.2f} GiB per device",
    ]
    lines += [f"    {k:<28}{v / gib:9.3f} GiB" for k, v in found["memory_bytes"].items()]
    lines += [f"  try             {line}" for line in found.get("suggestions", [])]
    if most := found.get("largest_micro_batch"):
        lines.append(
            f"  largest         {most['micro_batch_size']} sequences per micro-batch fit "
            f"({most['per_device_batch_size']} per device): "
            f"--gradient-accumulation-steps {most['gradient_accumulation_steps']}"
        )
    if "collectives" in found:
        lines.append("  collectives per step and device")
        lines += [
            f"    {kind:<20}{entry['count']:>7} times {entry['bytes'] / 1e9:9.3f} GB, "
            f"{entry['communication_bytes'] / 1e9:.3f} GB of communication"
            for kind, entry in sorted(found["collectives"].items())
        ]
        copies = found["copies"]
        lines.append(
            f"  copies          {copies['count']} of 1 MiB or more, {copies['bytes'] / 1e9:.1f} GB"
        )
    for phase in found["phases"]:
        lines += [
            f"  {phase['name']}: {phase['tokens']:,} tokens, {phase['steps']:,} steps",
            f"    FLOPs per step        {phase['model_flops']:.3e} of the model, "
            f"{phase['hardware_flops']:.3e} of the hardware "
            f"(documents of {found['document_tokens']} tokens)",
            f"    lower bound per step  {phase['compute_lower_bound_seconds']:.3f} s of compute, "
            f"{phase['communication_lower_bound_seconds']:.3f} s of communication; at most "
            f"{phase['mfu_upper_bound']:.0%} MFU",
            f"    at {found['mfu']:.0%} MFU            {phase['seconds_per_step']:.2f} s per step, "
            f"{phase['hours']:,.1f} hours, {phase['chip_hours']:,.0f} chip-hours",
        ]
    lines.append(f"  compiled {found['compiled_phase']} in {found['compile_seconds']:.0f} s")
    return "\n".join(lines)
