"""Reads a compiled program's operations and collectives, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections import defaultdict

import numpy as np

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
LARGE_COPY = 2**20  # bytes; activations are larger

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"[})\]] ([a-z][a-z\-]*)\(")
_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+)\[([\d,]*)\]")
_LAID_OUT = re.compile(_SHAPE.pattern + r"(\{[^}]*\})?")
_NAME = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PATH = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"[su]\d+\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective. bytes: the array on each device after gathering or before scattering."""

    kind: str
    bytes: int
    group: int  # number of devices that communicate with each other
    count: int  # executions in one run of the program
    overlapped: bool = False  # has a start and an end, between which other operations run

    @property
    def communication_bytes(self) -> float:
        """Bytes that each device sends in one run, with ring algorithms."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.count * self.bytes * share


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that runs by itself, and the cost of one execution.

    path: the names of the JAX functions that it comes from. kernel: the name of a Pallas kernel,
    else empty. bytes: read from and written to HBM. flops: of matrix products. cycles: the
    compiler's estimate; 0 if it gives none.
    """

    opcode: str
    path: str
    kernel: str
    count: int  # executions in one run of the program
    bytes: int
    flops: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Program:
    """operations: without collectives and without asynchronous copies, which run beside others.
    copies: (bytes, count) of each unfused copy or transpose of at least LARGE_COPY bytes.
    unknown_loops: the number of loops whose trip count is unknown; they are counted once."""

    operations: list[Operation]
    collectives: list[Collective]
    copies: list[tuple[int, int]]
    unknown_loops: int


def read(text: str, devices: int) -> Program:
    """Reads the text of a compiled module (`compiled.as_text()`) for a number of devices."""
    computations, entry = _computations(text)
    counts, unknown = _counts(computations, entry)
    parsed = {name: _instructions(lines) for name, lines in computations.items()}
    inner, background = _inner_computations(parsed)
    operations, collectives, copies = [], [], []
    for name, instructions in parsed.items():
        if not counts[name]:
            continue
        for one in instructions.values():
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                group = _group(one.line, devices)
                size = _array_bytes(one.line, one.opcode, kind, group)
                overlapped = kind != one.opcode or name in background
                collectives.append(Collective(kind, size, group, counts[name], overlapped))
                continue
            if one.opcode in ("copy", "transpose"):
                size = _bytes(one.type)
                if size >= LARGE_COPY:
                    copies.append((size, counts[name]))
            if name not in inner and name not in background and _takes_time(one, parsed):
                operations.append(_operation(one, instructions, parsed, counts[name]))
    return Program(operations, [c for c in collectives if c.group > 1], copies, unknown)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    line: str
    root: bool

    @property
    def called(self) -> str:
        """The computation of a fusion."""
        match = re.search(r"calls=%?([\w.\-]+)", self.line)
        return match[1] if match else ""


_Computation = dict[str, _Instruction]
# What computes and moves nothing, or whose computations are counted by themselves.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "",
)  # fmt: skip
_ASYNCHRONOUS = ("-start", "-update", "-done")


def _instructions(lines: list[str]) -> _Computation:
    found = {}
    for line in lines:
        name = _NAME.match(line)
        if name is None:
            continue
        opcode = _opcode(line)
        inside = line.partition(f" {opcode}(")[2]
        # Operands are names, in older texts with their types; the attributes follow them.
        end = inside.find(")")
        operands = re.findall(r"%([\w.\-]+)", inside[: end if end >= 0 else None])
        one = _Instruction(name[2], _result(line, opcode), opcode, operands, line, bool(name[1]))
        found[one.name] = one
    return found


def _inner_computations(parsed: dict[str, _Computation]) -> tuple[set[str], set[str]]:
    """The computations that are part of one operation, and those that run in the background."""
    inner, background = set(), set()
    for one in (one for computation in parsed.values() for one in computation.values()):
        called = {match[2] for match in _CALLED.finditer(one.line)}
        if one.opcode.endswith(_ASYNCHRONOUS):
            background |= called
        elif one.opcode not in ("while", "conditional", "call"):
            inner |= called
    return inner, background


def _takes_time(one: _Instruction, parsed: dict[str, _Computation]) -> bool:
    if one.opcode in _FREE or one.opcode.endswith(_ASYNCHRONOUS):
        return False
    inside = parsed.get(one.called, {}).values()
    return not any(part.opcode in KINDS for part in inside)


def _operation(
    one: _Instruction, around: _Computation, parsed: dict[str, _Computation], count: int
) -> Operation:
    path = _PATH.search(one.line)
    cycles = _CYCLES.search(one.line)
    kernel = ""
    if one.opcode == "custom-call" and "tpu_custom_call" in one.line:
        named = re.search(r"(\w+)\)*/pallas_call", path[1]) if path else None
        kernel = named[1] if named else re.sub(r"\.\d+$", "", one.name)
    return Operation(
        one.opcode,
        path[1] if path else "",
        kernel,
        count,
        _hbm_traffic(one, around, parsed),
        _flops(one, around, parsed),
        int(cycles[1]) if cycles else 0,
    )


def _hbm_traffic(one: _Instruction, around: _Computation, parsed: dict[str, _Computation]) -> int:
    """Bytes that an operation reads and writes. An array of which a fusion takes or replaces a
    slice counts with that slice."""
    types = [around[name].type if name in around else "" for name in one.operands]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _hbm_bytes(one.type)
    if one.opcode == "dynamic-update-slice":
        return 2 * _hbm_bytes(types[1])
    inside = parsed.get(one.called) if one.opcode == "fusion" else None
    if inside is None:
        return _hbm_bytes(one.type) + sum(_hbm_bytes(t) for t in types)
    total = 0
    for index, type_ in enumerate(types):
        if size := _hbm_bytes(type_):
            total += min(size, _read_bytes(inside, index, parsed))
    written = _written_bytes(next(x for x in inside.values() if x.root), inside, parsed)
    results = [_hbm_bytes(match[0]) for match in _LAID_OUT.finditer(one.type)]
    if len(written) != len(results):
        return total + sum(results)
    return total + sum(min(pair) for pair in zip(results, written, strict=True))


def _read_bytes(inside: _Computation, index: int, parsed: dict[str, _Computation]) -> int:
    """Bytes that a fusion reads of its parameter with this index, wherever it lies."""
    (start,) = (
        one for one in inside.values()
        if one.opcode == "parameter" and f"parameter({index})" in one.line
    )  # fmt: skip
    return _uses(start, inside, parsed)


def _uses(one: _Instruction, inside: _Computation, parsed: dict[str, _Computation]) -> int:
    total = 0
    for user in inside.values():
        for position, operand in enumerate(user.operands):
            if operand != one.name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _bytes(user.type) if position == 0 else 0
            elif user.opcode == "dynamic-update-slice" and position == 0:
                total += 0  # replaced in place
            elif user.opcode == "bitcast":
                total += _uses(user, inside, parsed)
            elif user.opcode == "fusion" and user.called in parsed:
                total += _read_bytes(parsed[user.called], position, parsed)
            else:
                return _bytes(one.type)
    return total


def _written_bytes(
    one: _Instruction, inside: _Computation, parsed: dict[str, _Computation]
) -> list[int]:
    """Bytes that a fusion writes of each of its results."""
    if one.opcode == "tuple":
        parts = [_written_bytes(inside[name], inside, parsed) for name in one.operands]
        return [size for part in parts for size in part]
    if one.opcode == "bitcast" and one.operands and one.operands[0] in inside:
        return _written_bytes(inside[one.operands[0]], inside, parsed)
    if one.opcode == "dynamic-update-slice":
        return [_bytes(inside[one.operands[1]].type)]
    if one.opcode == "fusion" and one.called in parsed:
        nested = parsed[one.called]
        return _written_bytes(next(x for x in nested.values() if x.root), nested, parsed)
    return [_bytes(match[0]) for match in _SHAPE.finditer(one.type)]


def _flops(one: _Instruction, around: _Computation, parsed: dict[str, _Computation]) -> int:
    """FLOPs of the matrix products in an operation; a multiply-add counts as two."""
    if one.opcode == "fusion" and one.called in parsed:
        inside = parsed[one.called]
        return sum(_flops(part, inside, parsed) for part in inside.values())
    if one.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    types = [around[name].type if name in around else "" for name in one.operands]
    out = _dims(one.type)
    if one.opcode == "convolution":
        return 2 * _convolution_macs(one.line, out, _dims(types[0]), _dims(types[1]))
    # cuBLAS's products are custom calls that keep the dimensions of the dot.
    contracting = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"\s]*)[}\]]', one.line)
    if contracting is None:
        return 0
    left = _dims(types[0])
    return 2 * math.prod(out) * math.prod(left[int(n)] for n in re.findall(r"\d+", contracting[1]))


def _convolution_macs(line: str, out: list[int], left: list[int], right: list[int]) -> int:
    """Multiply-adds of a convolution, which is how a TPU's compiler writes a matrix product. Taps
    that fall on padding, or between the elements of a dilated input, cost none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    window = re.search(r"window=\{([^}]*)\}", line)
    if labels is None:
        raise ValueError(f"convolution without dim_labels: {line.strip()[:200]}")
    pairs = (part.split("=") for part in window[1].split()) if window else ()
    options = {name: value.split("x") for name, value in pairs}
    macs = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for axis in range(len(options.get("size", ()))):
        digit = str(axis)
        at = {name: values[axis] for name, values in options.items()}
        macs *= _taps(
            out[labels[3].index(digit)],
            left[labels[1].index(digit)],
            right[labels[2].index(digit)],
            stride=int(at.get("stride", 1)),
            low=int(at.get("pad", "0_0").split("_")[0]),
            left_dilation=int(at.get("lhs_dilate", 1)),
            right_dilation=int(at.get("rhs_dilate", 1)),
        )
    return macs


@functools.cache
def _taps(
    out: int, left: int, right: int, *, stride: int, low: int, left_dilation: int,
    right_dilation: int,
) -> int:  # fmt: skip
    """The pairs of output and kernel positions along one axis that meet an element of the input."""
    total = 0
    for tap in range(right):
        at = np.arange(out, dtype=np.int64) * stride + tap * right_dilation - low
        inside = (at >= 0) & (at <= (left - 1) * left_dilation) & (at % left_dilation == 0)
        total += int(inside.sum())
    return total


def _dims(types: str) -> list[int]:
    """The shape of the first array of a type."""
    match = _SHAPE.search(types)
    return [int(n) for n in filter(None, match[2].split(","))] if match else []


def _hbm_bytes(types: str) -> int:
    """Bytes of the arrays in a type that are in HBM; a layout with S(n) names another memory."""
    found = _LAID_OUT.finditer(types)
    return sum(_bytes(match[0]) for match in found if "S(" not in (match[3] or ""))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns (instructions by computation, the name of the entry computation)."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            found[name] = []
            entry = name if match[1] else entry
        elif name and " = " in line:
            found[name].append(line)
    return found, entry


def _counts(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
    """Returns (executions per run by computation, the number of loops with unknown trip count).

    A computation is printed after those that it calls, so reverse order visits callers first.
    """
    counts: dict[str, int] = defaultdict(int)
    counts[entry] = 1
    unknown = 0
    for name in reversed(computations):
        for line in computations[name] if counts[name] else ():
            trips = 1
            if " while(" in line:
                found = _trips(line, computations)
                unknown += found is None
                trips = found or 1
            called = [match[2] for match in _CALLED.finditer(line)]
            if branches := _BRANCHES.search(line):
                called += [part.strip(" %") for part in branches[1].split(",")]
            for callee in called:
                counts[callee] += trips * counts[name]
    return counts, unknown


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """The trip count of a loop: the compiler's annotation, or the constant in its condition."""
    if noted := _TRIPS.search(line):
        return int(noted[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    limits = {int(match[1]) for line in lines for match in _CONSTANT.finditer(line)}
    return limits.pop() if len(limits) == 1 else None


def _opcode(line: str) -> str:
    match = _OPCODE.search(line.partition(" = ")[2])
    return match[1] if match else ""


def _result(line: str, opcode: str) -> str:
    """The text of an instruction's result type."""
    return line.partition(" = ")[2].partition(f" {opcode}(")[0]


def _bytes(types: str) -> int:
    total = 0
    for dtype, shape in _SHAPE.findall(types):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        size = 1
        for length in filter(None, shape.split(",")):
            size *= int(length)
        total += size * bits // 8
    return total


def _array_bytes(line: str, opcode: str, kind: str, group: int) -> int:
    """Bytes of the complete array. The type of a `-start` has the operand beside the result."""
    types = _result(line, opcode)
    if kind == "collective-permute":
        first = _SHAPE.search(types)
        return _bytes(first[0] if first else "")
    size = _bytes(types)
    both = opcode.endswith("-start")
    if kind == "all-gather":
        return size * group // (group + 1) if both else size
    if kind == "reduce-scatter":
        return size * group // (group + 1) if both else size * group
    return size


def _group(line: str, devices: int) -> int:
    """The number of devices that communicate with each other."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(part.strip().split("=") for part in match[1].split(","))
        group = 1
        for axis in match[2].split(","):
            group *= int(sizes[axis.strip()])
        return group
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([^}]*)\}", line):
        return len(match[1].split(","))
    return devices  # no groups means all devices; a permutation lists pairs
