"""What the corpus modules share: tables, JSON, text files and TextGrids, built on text.py.

A document's id is its place, "path in the corpus:record", as in text.py: it is unique, the same in
every run, and reveals nothing about a person. Official ids go to meta.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from ...common.names import listed
from ..source import Example, Reader, Report, name_of
from .text import find_column, parse_object, read_lines, read_rows

EMPTY = "empty text"
# What PhysioNet requires for a credentialed download, and the license of most of these corpora.
CREDENTIALED = "a credentialed PhysioNet account and the data use agreement"
HEALTH_DATA_LICENSE = "PhysioNet Credentialed Health Data License 1.5.0"


def place(part: pathlib.Path, root: pathlib.Path, record: int) -> str:
    """The place of a record: its path relative to `root`, and its number from 1."""
    return f"{name_of(part.relative_to(root))}:{record}"


def clean(text: str) -> str:
    """Turns line ends into "\\n" and removes spaces before them and at the end; nothing else."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join([line.rstrip(" \t") for line in text.split("\n")]).rstrip()


def example(at: str, text: str, report: Report, **meta: str) -> Iterator[Example]:
    """Yields the document of a place, cleaned, or reports it as empty. Empty meta is left out."""
    text = clean(text)
    if text:
        yield Example(at, text, {name: value for name, value in meta.items() if value})
    else:
        report.drop(EMPTY, at)


def whole_text(part: pathlib.Path) -> str:
    """Reads a text file: UTF-8, UTF-16 with a BOM, cp1252 for lines that are not UTF-8."""
    return "".join(read_lines(part))


def rows(
    part: pathlib.Path,
    root: pathlib.Path,
    report: Report,
    columns: tuple[str | tuple[str, ...], ...],
    delimiter: str = ",",
    hint: str = "is this the file of the distribution?",
) -> Iterator[tuple[str, list[str]]]:
    """Yields (place, values of these columns) for each row of a table with a header.

    A column may have several names; the first that is found is used, ignoring case. A field that is
    missing at the end of a row is empty; a row longer than the header is dropped. Raises ValueError
    for a missing column (hint: what to do then), and for a broken file.
    """
    table = read_rows(part, delimiter)
    _, header = next(table, (0, []))
    indices = []
    for column in columns:
        names = column if isinstance(column, tuple) else (column,)
        found = find_column(header, names)
        if found is None:
            raise ValueError(
                f"{part}: expected a column {' or '.join(names)}; {listed(header)}; {hint}"
            )
        indices.append(header.index(found))
    for number, row in table:
        at = place(part, root, number)
        if any(row[len(header) :]):
            report.drop("more fields than columns", at)
            continue
        row += [""] * (len(header) - len(row))
        yield at, [row[index] for index in indices]


def table(text: str, delimiter: str = ",", **meta: str) -> Reader:
    """A Source.read for tables: each row is a document.

    text: its column. meta: columns of further facts, by the name of the fact.
    """
    return functools.partial(_read_table, text=text, delimiter=delimiter, meta=meta)


def _read_table(
    part: pathlib.Path,
    root: pathlib.Path,
    report: Report,
    text: str,
    delimiter: str,
    meta: dict[str, str],
) -> Iterator[Example]:
    for at, (content, *values) in rows(part, root, report, (text, *meta.values()), delimiter):
        facts = {name: value.strip() for name, value in zip(meta, values, strict=True)}
        yield from example(at, content, report, **facts)


def text_file(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A Source.read for text files: each file is a document."""
    yield from example(place(part, root, 1), whole_text(part), report)


def objects(
    part: pathlib.Path, root: pathlib.Path, report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) for each line of a .jsonl file; a broken line is dropped.

    Raises ValueError if every line is broken, and for a file that is not text.
    """
    good = bad = 0
    for number, line in enumerate(read_lines(part), start=1):
        if not line.strip():
            continue
        at = place(part, root, number)
        try:
            record = parse_object(line, at)
        except ValueError:
            report.drop("broken JSON", at)
            bad += 1
        else:
            good += 1
            yield at, record
    if bad and not good:
        raise ValueError(f"{part}: expected a JSON object on each line, found none")


def whole_object(part: pathlib.Path) -> dict[str, Any]:
    """Reads the object in a .json file. Raises ValueError with one line."""
    return parse_object(whole_text(part), str(part))


def string(record: dict[str, Any], field: str) -> str:
    """A field of a JSON object; "" if it is missing or not a string."""
    value = record.get(field)
    return value if isinstance(value, str) else ""


def intervals(part: pathlib.Path) -> list[tuple[float, str]]:
    """Reads (start in seconds, text) of the intervals with text in a Praat TextGrid.

    All tiers of intervals are read; those of points mark events and are left out.

    Raises ValueError with one line for a file that is not a TextGrid.
    """
    from praatio.utilities.textgrid_io import parseTextgridStr

    grid = whole_text(part)
    try:
        tiers = parseTextgridStr(grid)["tiers"]
        spoken = [tier["entries"] for tier in tiers if tier["class"] == "IntervalTier"]
        return [(float(start), text) for entries in spoken for start, _, text in entries]
    except Exception:  # the library's errors contain the text
        raise ValueError(f"{part}: expected a Praat TextGrid with intervals") from None
