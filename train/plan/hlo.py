"""Reads the collectives and copies of a compiled program, and how often they run, from its text."""

import dataclasses
import re
from collections import defaultdict

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
LARGE_COPY = 2**20  # bytes; activations are larger

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"[})\]] ([a-z][a-z\-]*)\(")
_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+)\[([\d,]*)\]")
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

    @property
    def communication_bytes(self) -> float:
        """Bytes that each device sends in one run, with ring algorithms."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.count * self.bytes * share


@dataclasses.dataclass(frozen=True)
class Program:
    """copies: (bytes, count) of each unfused copy or transpose of at least LARGE_COPY bytes.
    unknown_loops: the number of loops whose trip count is unknown; they are counted once."""

    collectives: list[Collective]
    copies: list[tuple[int, int]]
    unknown_loops: int


def read(text: str, devices: int) -> Program:
    """Reads the text of a compiled module (`compiled.as_text()`) for a number of devices."""
    computations, entry = _computations(text)
    counts, unknown = _counts(computations, entry)
    collectives, copies = [], []
    for name, lines in computations.items():
        if not counts[name]:
            continue
        for line in lines:
            opcode = _opcode(line)
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                group = _group(line, devices)
                size = _array_bytes(line, opcode, kind, group)
                collectives.append(Collective(kind, size, group, counts[name]))
            elif opcode in ("copy", "transpose"):
                size = _bytes(_result(line, opcode))
                if size >= LARGE_COPY:
                    copies.append((size, counts[name]))
    return Program([c for c in collectives if c.group > 1], copies, unknown)


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
