"""The time of a compiled step and where it goes: the compiler's estimate, and a roofline.

The estimate adds up, over all operations of one device, the cycles that the TPU's compiler expects
times executions, over the clock. The roofline gives each operation the longer of its HBM bytes over
the bandwidth and its matrix products over the peak. It is one of the program as compiled: what
another program would not need is in it.

Both count a Pallas kernel with its schedule (kernels.py) or its HBM bytes, whichever takes longer,
and add the collectives that nothing overlaps, over the bandwidth of the links in one direction.
Asynchronous copies and overlapped collectives count as hidden. Nothing was measured.
"""

import dataclasses
import re
from collections.abc import Callable

from ..common.flops import Device
from .hlo import Operation, Program

CATEGORIES = (
    "matmul", "attention", "copies", "elementwise", "loss", "optimizer", "collectives",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step per device. estimated: None if the compiler gives no cycles."""

    estimated: float | None
    roofline: float
    hbm_bytes: float


def times(
    program: Program, device: Device, attention_cycles: Callable[[str], float]
) -> dict[str, Time]:
    """Returns the time of each of CATEGORIES.

    attention_cycles: the cycles of one call of the kernel with this name; see kernels.py. The
    device must have a clock.
    """
    hz = device.clock
    sums = {name: [0.0, 0.0, 0.0] for name in CATEGORIES}
    for one in program.operations:
        memory = one.bytes / device.hbm_bandwidth
        if one.kernel:
            estimated = roofline = max(attention_cycles(one.kernel) / hz, memory)
        else:
            estimated, roofline = one.cycles / hz, max(memory, one.flops / device.flops)
        for i, x in enumerate((estimated, roofline, one.bytes)):
            sums[category(one)][i] += one.count * x
    exposed = exposed_collectives(program, device)
    sums["collectives"][0] = sums["collectives"][1] = exposed
    return {name: Time(*parts) for name, parts in sums.items()}


def roofline_times(program: Program, device: Device, attention_flops: float) -> dict[str, Time]:
    """`times` for a device whose compiler estimates no cycles. attention_flops: of one device."""
    sums = {name: [0.0, 0.0] for name in CATEGORIES}
    for one in program.operations:
        seconds = max(one.bytes / device.hbm_bandwidth, one.flops / device.flops)
        for i, x in enumerate((seconds, one.bytes)):
            sums[category(one)][i] += one.count * x
    sums["attention"][0] = max(sums["attention"][0], attention_flops / device.flops)
    sums["collectives"][0] = exposed_collectives(program, device)
    return {name: Time(None, *parts) for name, parts in sums.items()}


def category(one: Operation) -> str:
    """Which of CATEGORIES an operation belongs to. The trainer names loss and optimizer."""
    if one.kernel:  # a fused local layer is mostly its products
        return "matmul" if one.kernel.startswith("local_layer") else "attention"
    for name in ("loss", "optimizer"):
        if re.search(rf"(^|[/(]){name}([)/]|$)", one.path):
            return name
    if one.flops:
        return "matmul"
    return "copies" if one.opcode in ("copy", "transpose") else "elementwise"


def exposed_collectives(program: Program, device: Device) -> float:
    """Seconds of the collectives during which nothing else can run."""
    total = sum(c.communication_bytes for c in program.collectives if not c.overlapped)
    return total / (device.link_bandwidth / 2)  # PEAK has both directions
