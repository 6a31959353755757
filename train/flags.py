"""How the flags of every command are read and shown: numbers as people write them, short help."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

_NUMBER = re.compile(r"([-+]?[\d_.]+(?:[eE][-+]?\d+)?)([kKMBT]?)")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
ALL = "--help-all"


def whole_number(text: str) -> int:
    """Reads 160000000000, 160_000_000_000, 1.6e11 and 160B (k, M, B, T).

    Raises ValueError for anything else and for numbers with a fraction.
    """
    try:
        return int(text)
    except ValueError:
        pass
    found = _NUMBER.fullmatch(text)
    if found and any(c.isdigit() for c in found[1]):
        value = float(found[1]) * _FACTORS[found[2]]
        if value.is_integer():  # inf is not
            return int(value)
    raise ValueError(f"expected a whole number (2000, 1e6, 160B), got {text!r}")


def registry(
    args: Sequence[str], frequent: Mapping[type, tuple[str, ...]] | None = None
) -> ConstructorRegistry:
    """Returns tyro's rules for a command line.

    frequent: the fields of a dataclass that --help shows, in this order; --help-all shows all.
    """
    rules = ConstructorRegistry()
    rules.primitive_rule(_whole_numbers)
    if {"-h", "--help", ALL} & set(args):
        shown = {} if ALL in args else frequent or {}
        rules.struct_rule(lambda info: _help(info, shown))
    return rules


def without_all(args: Sequence[str]) -> list[str]:
    """Returns the arguments with --help for --help-all."""
    return ["--help" if arg == ALL else arg for arg in args]


def _whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda given: whole_number(given[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


_asked: list[Any] = []  # types whose default rule is being asked


def _help(
    info: StructTypeInfo, frequent: Mapping[type, tuple[str, ...]]
) -> StructConstructorSpec | None:
    """The fields of a dataclass as help shows them, from tyro's own rule."""
    if not dataclasses.is_dataclass(info.type) or info.type in _asked:
        return None
    _asked.append(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    names = frequent.get(info.type, tuple(field.name for field in spec.fields))
    order = {name: index for index, name in enumerate(names)}

    def shown(field: StructFieldSpec) -> StructFieldSpec:
        if field.name not in order:
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.Suppress])
        return dataclasses.replace(field, helptext=lambda: _one_paragraph(field.helptext))

    fields = sorted(spec.fields, key=lambda field: order.get(field.name, len(order)))
    return dataclasses.replace(spec, fields=tuple(shown(field) for field in fields))


def _one_paragraph(text: Any) -> str | None:
    """Joins the lines of a field's docstring, which tyro would keep as they are in the source."""
    text = text() if callable(text) else text
    return " ".join(text.split()) if text else None
