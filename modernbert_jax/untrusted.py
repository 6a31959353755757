"""Reads files that anyone may have written: bounded, and with errors of one printable line."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

MAX_JSON = 64 * 1024**2  # bytes; the largest tokenizer.json in wide use has 33 MB
MAX_DEPTH = 32  # of a JSON file; tokenizer.json has about 8
MAX_VALUES = 2_000_000  # commas in a JSON file; that tokenizer has 1.4 million
MAX_MODEL_JSON = 16 * 1024**2  # bytes of config.json or an index; names of 100,000 labels fit
MAX_HEADER = 4 * 1024**2  # bytes of a safetensors header; 1,000 layers fit

_POINTER = b"version https://git-lfs.github.com/spec/"


def printable(text: Any, limit: int = 200) -> str:
    """Returns one line of at most about `limit` characters, with control characters escaped.

    A terminal would obey an escape sequence in the name of a tensor, a label or a file.
    """
    text = str(text)
    cut = text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} characters)"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut
    )


def shown(value: Any, limit: int = 80) -> str:
    """Returns repr(value) for an error: one line of at most about `limit` characters."""
    # repr of an integer above 4,300 digits raises ValueError, of a deep list RecursionError.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value):,}" if value else repr(value)
    return printable(repr(value), limit)


def parse_json(text: bytes) -> Any:
    """Parses JSON. Raises ValueError for what JSON forbids, a key set twice, and a bomb.

    A list takes 3 bytes of a file and 64 of memory, so values are counted before they are made.
    """
    if (values := text.count(b",")) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES:,} values, got about {values:,}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise ValueError(f"expected each key once, got {shown(twice)} twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"expected JSON, got {name}, which is no number there")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"expected finite numbers, got {printable(digits, 80)}")
        return value

    deep = f"expected at most {MAX_DEPTH} levels of nesting, got more"
    try:
        data = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        )
    except RecursionError:
        raise ValueError(deep) from None
    level = [data]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                inner += value.values() if isinstance(value, dict) else value
        level = inner
    if level:
        raise ValueError(deep)
    return data


def read_json(path: Any, limit: int = MAX_JSON) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises ValueError that names the file, OSError."""
    return _read_json(path, limit, dict, "a JSON object")


def read_json_list(path: Any, limit: int = MAX_JSON) -> list[Any]:
    """Reads the JSON array in a file. Raises as `read_json` does."""
    return _read_json(path, limit, list, "a JSON array")


def _read_json(path: Any, limit: int, kind: type, expected: str) -> Any:
    refuse_pointer(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    try:
        if len(content) > limit:
            raise ValueError(f"expected at most {limit:,} bytes, got more")
        data = parse_json(content)
        if not isinstance(data, kind):
            raise ValueError(f"expected {expected}, got {type(data).__name__}")
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error)}") from None
    return data


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises ValueError for a panic of a library in Rust, which `except Exception` does not catch.

    pyo3 derives its PanicException from BaseException and does not export it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the reader gave up: {printable(error)}") from None


def refuse_pointer(path: Any) -> None:
    """Raises ValueError if a file is a Git LFS pointer: a clone without Git LFS has those."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path}: expected the file, found a Git LFS pointer to it; `git lfs pull` in its "
                "folder downloads the file"
            )
