"""What a compiled program says of itself: what its devices exchange and copy, and how often."""

import dataclasses
import re
from collections import defaultdict

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
LARGE_COPY = 2**20  # bytes; smaller ones are not activations

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
    """One exchange. bytes: of the whole array on each device, gathered or not yet scattered."""

    kind: str
    bytes: int
    group: int  # devices that take part
    times: int  # a run of the program

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a run, with the ring algorithms."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.times * self.bytes * share


@dataclasses.dataclass(frozen=True)
class Program:
    """copies: (bytes, times) of each copy or transpose of at least LARGE_COPY bytes that is an
    instruction of its own. unknown_loops: loops taken to run once, for want of their count."""

    collectives: list[Collective]
    copies: list[tuple[int, int]]
    unknown_loops: int


def read(text: str, devices: int) -> Program:
    """Reads a compiled module's text (`compiled.as_text()`) for a program on this many devices."""
    computations, entry = _computations(text)
    times, unknown = _times(computations, entry)
    collectives, copies = [], []
    for name, lines in computations.items():
        if not times[name]:
            continue
        for line in lines:
            opcode = _opcode(line)
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                group = _group(line, devices)
                size = _whole(line, opcode, kind, group)
                collectives.append(Collective(kind, size, group, times[name]))
            elif opcode in ("copy", "transpose"):
                size = _bytes(_result(line, opcode))
                if size >= LARGE_COPY:
                    copies.append((size, times[name]))
    return Program([c for c in collectives if c.group > 1], copies, unknown)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(name -> its instructions, the name of the entry)."""
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


def _times(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
    """(name -> how often a run executes it, loops whose count is unknown).

    A computation stands after those that it calls, so callers come first in reverse order.
    """
    times: dict[str, int] = defaultdict(int)
    times[entry] = 1
    unknown = 0
    for name in reversed(computations):
        for line in computations[name] if times[name] else ():
            trips = 1
            if " while(" in line:
                found = _trips(line, computations)
                unknown += found is None
                trips = found or 1
            called = [match[2] for match in _CALLED.finditer(line)]
            if branches := _BRANCHES.search(line):
                called += [part.strip(" %") for part in branches[1].split(",")]
            for callee in called:
                times[callee] += trips * times[name]
    return times, unknown


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop's body runs: as the compiler notes it, or the limit that its test names."""
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
    """The type of an instruction, as text."""
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


def _whole(line: str, opcode: str, kind: str, group: int) -> int:
    """Bytes of the whole array. A `-start` lists what goes in beside what comes out."""
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
    """How many devices exchange with each other."""
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
    return devices  # named by none: all of them; a permutation lists pairs
