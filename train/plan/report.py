"""A plan as a dictionary for JSON and as text.

FLOPs are counted (train/common/flops.py), memory and collectives are the compiler's, and the time
of a step lies between the roofline and the estimate (estimate.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from modernbert_jax.attention import check

from ..common.flops import PEAK, hardware_flops, model_flops, segment_lengths
from ..pretrain.config import Phase, TrainConfig
from ..pretrain.masking import predicted_positions
from . import kernels, topologies
from .compile import Compiled
from .estimate import Time, roofline_times, times
from .hlo import Program
from .search import MAX_EMPTY, BatchSplit, fuller, suggestions

SAMPLE = 64  # sequences of which the attention's work is averaged


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of which sequences are packed: see `kernels.packed_documents`."""

    tokens: int
    lengths: str = "equal"

    def packed(self, sequences: int, sequence_length: int) -> np.ndarray:
        """Returns segment ids [sequences, sequence_length]."""
        return kernels.packed_documents(sequences, sequence_length, self.tokens, self.lengths)


def _default_attention(config: TrainConfig, device: Any) -> str:
    """The implementation that was compiled for an absent device, and why."""
    model = config.model
    return check(device, dtype=model.dtype, head_dim=model.head_dim, log=lambda line: None).reason


def report(
    config: TrainConfig,
    phase: Phase,
    topology: str,
    mesh: Mesh,
    split: BatchSplit,
    compiled: Compiled,
    documents: Documents,
    mfu: float | None = None,
) -> dict[str, Any]:
    """The plan as a dictionary. Sizes are bytes per device; FLOPs and times are per step.

    phase: the one that was compiled. mfu: also report hours at this model FLOPs utilization.
    """
    devices = list(mesh.devices.flat)
    found: dict[str, Any] = {
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "chips": topologies.chips(devices),
        "mesh": {str(axis): size for axis, size in mesh.shape.items()},
        "attention": config.attention or _default_attention(config, devices[0]),
        "remat": config.remat,
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
        "document_tokens": documents.tokens,
        "document_lengths": documents.lengths,
    }
    if not compiled.fits:
        found["missing_bytes"] = compiled.used - compiled.available
        found["suggestions"] = suggestions(config, mesh, split)
    if split.padding > MAX_EMPTY:
        found["fuller"] = fuller(config, found["mesh"])
    spent: Mapping[str, Time] = {}
    if compiled.program:
        found |= _communication(compiled.program)
        spent, found["no_estimate"] = step_times(
            config, phase, mesh, split, compiled.program, documents
        )
        found["time"] = {name: _time(one) for name, one in spent.items()}
    collectives = found.get("collectives", {})
    communication = sum(entry["communication_bytes"] for entry in collectives.values())
    found["phases"] = []
    for p in config.phases:
        costs = flops_and_bounds(
            config, p, split, found["device"], len(devices), documents, communication
        )
        predictions, compiled_predictions = (
            predicted_positions(config.sequence_length, x.mlm_probability) for x in (p, phase)
        )
        costs |= _hours(found, costs, spent, predictions / compiled_predictions, mfu)
        found["phases"].append(costs)
        if p is phase:
            found |= {k: costs[k] for k in ("estimated_mfu", "roofline_mfu") if k in costs}
    if mfu is not None:
        found["assumed_mfu"] = mfu
    return found


def flops_and_bounds(
    config: TrainConfig,
    phase: Phase,
    split: BatchSplit,
    device_kind: str,
    devices: int,
    documents: Documents,
    communication_bytes: float,
) -> dict[str, Any]:
    """FLOPs of a step, and lower bounds on its seconds that no program can beat.

    communication_bytes: sent by each device in a step. Padding costs as much as other sequences.
    """
    peak = PEAK[device_kind]
    tokens = config.global_batch_size * config.sequence_length
    model, hardware = step_flops(config, phase, split, documents)
    compute = hardware / (devices * peak.flops)
    communication = communication_bytes / (peak.link_bandwidth / 2)  # PEAK has both directions
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "steps": -(-phase.tokens // tokens),
        "model_flops": model,
        "hardware_flops": hardware,
        "compute_lower_bound_seconds": compute,
        "communication_lower_bound_seconds": communication,
        "mfu_upper_bound": model / (devices * peak.flops * max(compute, communication)),
    }


def step_flops(
    config: TrainConfig,
    phase: Phase,
    split: BatchSplit,
    documents: Documents,
    attention: bool = True,
) -> tuple[float, float]:
    """(model FLOPs, hardware FLOPs) of a step, of all devices; without attention's if not wanted.

    The lengths are those of a sample of sequences, taken as often as the step has sequences.
    """
    tokens = config.global_batch_size * config.sequence_length
    sequences = min(SAMPLE, config.global_batch_size)
    lengths = segment_lengths(documents.packed(sequences, config.sequence_length))
    repeats = config.global_batch_size / sequences
    predicted = phase.mlm_probability * tokens / repeats
    model = repeats * model_flops(config.model, lengths, predicted).train
    hardware = repeats * hardware_flops(
        config.model,
        lengths if attention else lengths[:0],
        sequences=split.gradient_accumulation_steps * split.padded_micro_batch_size / repeats,  # type: ignore[arg-type]
        sequence_length=config.sequence_length,
        predictions=predicted_positions(config.sequence_length, phase.mlm_probability),
        remat=config.remat,
    )
    return model, hardware


def step_times(
    config: TrainConfig,
    phase: Phase,
    mesh: Mesh,
    split: BatchSplit,
    program: Program,
    documents: Documents,
) -> tuple[dict[str, Time], str]:
    """(the time of a step by category, why there is no estimate or an empty string)."""
    kind = mesh.devices.flat[0].device_kind
    device = PEAK[kind]
    rows = split.per_device_batch_size
    sample = documents.packed(rows * -(-SAMPLE // rows), config.sequence_length)
    model = config.model
    heads = -(-model.num_attention_heads // mesh.shape["tensor"])
    blocks = -(-heads * model.head_dim // kernels.LANES)
    shares = device.cores * mesh.shape.get("sequence", 1)

    def attention_cycles(kernel: str) -> float:
        if kernel.startswith("local_layer"):
            tokens = rows * config.sequence_length
            return kernels.local_layer_cycles(kind, kernel, model, tokens)
        costs = kernels.costs(kind, kernel)
        return kernels.call_cycles(costs, sample, rows, blocks) / shares

    problem = ""
    if not device.flops_per_cycle:
        problem = f"the compiler estimates no cycles for {kind}"
    elif program.unknown_loops:
        problem = f"the trip count of {program.unknown_loops} loops is unknown"
    else:
        try:
            return times(program, device, attention_cycles), ""
        except ValueError as error:
            problem = str(error)
    (_, whole), (_, rest) = (
        step_flops(config, phase, split, documents, attention) for attention in (True, False)
    )
    return roofline_times(program, device, (whole - rest) / mesh.size), problem


def _time(one: Time) -> dict[str, Any]:
    return {
        "estimated_seconds": one.estimated,
        "roofline_seconds": one.roofline,
        "hbm_bytes": one.hbm_bytes,
    }


def _hours(
    found: dict[str, Any],
    costs: dict[str, Any],
    spent: Mapping[str, Time],
    loss: float,
    mfu: float | None,
) -> dict[str, float]:
    """Seconds per step, MFU, hours and chip-hours of a phase by the roofline, by the estimate and
    at an assumed MFU, each if there is one.

    loss: predictions per step, relative to the phase that was compiled. The loss takes time in
    proportion to them.
    """
    share = {name: loss if name == "loss" else 1.0 for name in spent}
    at_peak = costs["model_flops"] / (found["devices"] * PEAK[found["device"]].flops)
    seconds = {}
    if spent:
        seconds["roofline"] = sum(share[name] * one.roofline for name, one in spent.items())
    if spent and not found["no_estimate"]:
        seconds["estimated"] = sum(
            share[name] * (one.estimated or 0) for name, one in spent.items()
        )
    if mfu is not None:
        seconds["assumed"] = at_peak / mfu / (1.0 - found["batch_padding"])
    steps = costs["tokens"] / (found["global_batch_size"] * found["sequence_length"])
    result = {}
    for name, one in seconds.items():
        hours = steps * one / 3600
        result |= {
            f"{name}_seconds_per_step": one,
            f"{name}_mfu": at_peak / one,
            f"{name}_hours": hours,
            f"{name}_chip_hours": hours * found["chips"],
        }
    return result


def _communication(program: Program) -> dict[str, Any]:
    """Collectives by kind and large copies in one step, with their counts and bytes."""
    collectives: dict[str, dict[str, float]] = {}
    for one in program.collectives:
        empty = {"count": 0, "bytes": 0, "communication_bytes": 0.0, "overlapped_bytes": 0.0}
        entry = collectives.setdefault(one.kind, empty)
        entry["count"] += one.count
        entry["bytes"] += one.count * one.bytes
        entry["communication_bytes"] += one.communication_bytes
        entry["overlapped_bytes"] += one.communication_bytes if one.overlapped else 0.0
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
        f"  attention       {found['attention']}",
        f"  step            {found['global_batch_size']} sequences of {found['sequence_length']} "
        f"tokens: {found['gradient_accumulation_steps']} micro-batches of "
        f"{found['padded_micro_batch_size']}, {found['per_device_batch_size']} per device, "
        f"{found['batch_padding']:.1%} padding; remat {found['remat']}",
        f"  memory          {fits}: {found['used_bytes'] / gib:.2f} of "
        f"{found['available_bytes'] / gib:.2f} GiB per device",
    ]
    lines += [f"    {k:<28}{v / gib:9.3f} GiB" for k, v in found["memory_bytes"].items()]
    lines += [f"  try             {line}" for line in found.get("suggestions", [])]
    lines += [f"  less padding    {line}" for line in found.get("fuller", [])]
    if searched := found.get("search"):
        lines.append(f"  search          {searched['reason']}")
    if "collectives" in found:
        lines.append("  collectives per step and device")
        lines += [
            f"    {kind:<20}{entry['count']:>7} times {entry['bytes'] / 1e9:9.3f} GB, "
            f"{entry['communication_bytes'] / 1e9:.3f} GB of communication, "
            f"{entry['overlapped_bytes'] / 1e9:.3f} GB overlapped"
            for kind, entry in sorted(found["collectives"].items())
        ]
        copies = found["copies"]
        lines.append(
            f"  copies          {copies['count']} of 1 MiB or more, {copies['bytes'] / 1e9:.1f} GB"
        )
    lines += _time_lines(found)
    for phase in found["phases"]:
        lines += _phase_lines(found, phase)
    lines.append(f"  compiled {found['compiled_phase']} in {found['compile_seconds']:.0f} s")
    return "\n".join(lines)


def _time_lines(found: dict[str, Any]) -> list[str]:
    """Where the time of a step goes."""
    if "time" not in found:
        return []
    spent = found["time"]
    lines = [f"  time of a step, in {found['compiled_phase']}"]
    if found["no_estimate"]:
        lines[0] += f"; no estimate: {found['no_estimate']}"
    lines.append(f"    {'':<14}{'estimated':>12}{'':>7}{'roofline':>12}{'HBM':>12}")
    total = sum(one["estimated_seconds"] or 0.0 for one in spent.values())
    for name, one in spent.items():
        estimated = f"{'':>19}"
        if one["estimated_seconds"] is not None:
            seconds = one["estimated_seconds"]
            estimated = f"{seconds:>10.3f} s{seconds / total:>7.1%}"
        lines.append(
            f"    {name:<14}{estimated}{one['roofline_seconds']:>10.3f} s"
            f"{one['hbm_bytes'] / 1e9:>9.1f} GB"
        )
    return lines


def _phase_lines(found: dict[str, Any], phase: dict[str, Any]) -> list[str]:
    documents = f"documents of {found['document_tokens']} tokens"
    if found["document_lengths"] != "equal":
        documents += f", {found['document_lengths']}"
    lines = [
        f"  {phase['name']}: {phase['tokens']:,} tokens, {phase['steps']:,} steps",
        f"    FLOPs per step        {phase['model_flops']:.3e} of the model, "
        f"{phase['hardware_flops']:.3e} of the hardware ({documents})",
        f"    lower bound per step  {phase['compute_lower_bound_seconds']:.3f} s of compute, "
        f"{phase['communication_lower_bound_seconds']:.3f} s of communication; at most "
        f"{phase['mfu_upper_bound']:.0%} MFU",
    ]
    for name in ("roofline", "estimated", "assumed"):
        if f"{name}_mfu" in phase:
            lines.append(
                f"    {name:<22}{phase[f'{name}_seconds_per_step']:.3f} s per step, "
                f"{phase[f'{name}_mfu']:.1%} MFU, {phase[f'{name}_hours']:,.1f} hours, "
                f"{phase[f'{name}_chip_hours']:,.0f} chip-hours"
            )
    return lines
