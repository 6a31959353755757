"""Read documents from .txt, .jsonl, .csv, .tsv (each also as .gz) and .parquet files.

A .txt file is one document. In the other formats each record is one, and a column holds its text:
see `read_documents`. Errors name the file and the line or record, and never show text, which may be
clinical.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.lib import ArrowException
from pyarrow.parquet import ParquetFile

from ...common.names import listed
from ..source import files_below, name_of

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
# The usual names of the text column, in order of preference; case is ignored.
TEXT_COLUMNS = (
    "text",
    "notes",
    "note",
    "note_text",
    "transcription",
    "report",
    "full_text",
    "content",
)
# In characters. A longer field means an unclosed quote, or a file that is not text.
LONGEST_FIELD = 1 << 26
# A field in quotes that is not empty, with each quote within it doubled.
_CSV_FIELD = re.compile(r'"(?:[^"]|"")+"')
# Bytes at the start of a file that decide whether it is text.
HEAD = 1 << 16
# What `file` counts as text (bell, backspace, tab, line ends, form feed, escape), and the end mark
# of old DOS files.
HARMLESS_CONTROLS = frozenset("\a\b\t\n\v\f\r\x1a\x1b")
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NOT_TEXT = "save it as UTF-8 text, or move it out of the corpus"


@dataclass(frozen=True)
class Document:
    """A text and its origin: "path in the corpus:record", with records numbered from 1.

    The record number is the line in a .jsonl file, the row below the header in .csv and .tsv, and
    the row in .parquet.
    """

    id: str
    text: str


@dataclass(frozen=True)
class TextFile:
    """A file that holds documents."""

    path: Path
    name: str  # relative to the corpus, with "/" everywhere
    suffix: str
    column: str = ""  # as the file spells it; none in .txt


def read_documents(
    path: str | os.PathLike[str], *, text_column: str | None = None
) -> Iterator[Document]:
    """Reads the documents of a file, or of all files below a folder, sorted by relative path.

    The text is in `text_column` (ignoring case) or else in the first of TEXT_COLUMNS. If
    `text_column` is given, tables of a folder without it are left out, as long as one has it. Files
    with other suffixes, hidden files and empty texts are left out; links to folders are followed.
    Newlines become "\\n".

    Files are UTF-8, with or without a BOM, or UTF-16 with one; a line that is not UTF-8 is read as
    cp1252. All but .txt files are streamed. Files are found and headers read before this returns.

    Raises FileNotFoundError if `path` does not exist; ValueError if no file or no text is found,
    for a table without a text column, and, while reading, for a file that is not text, broken JSON,
    a row longer than the header, a quote that is never closed, or a damaged .gz.
    """
    return _read_all(Path(path), find_files(path, text_column))


# Files and columns


def find_files(
    path: str | os.PathLike[str],
    text_column: str | None = None,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> list[TextFile]:
    """Finds the files that `read_documents` reads, in order; leaves out empty tables."""
    found = [file for file in _find(Path(path)) if file.suffix in suffixes]
    return _with_columns(found, text_column)


def _find(path: Path) -> list[TextFile]:
    known = ", ".join(SUFFIXES) + " (all but the last also with .gz)"
    if path.is_file():
        suffix = _suffix(path)
        if suffix is None:
            raise ValueError(f"{path}: expected one of {known}")
        return [TextFile(path, name_of(Path(path.name)), suffix)]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    sources = []
    for file in files_below(path):
        suffix = _suffix(file)
        if suffix:
            sources.append(TextFile(file, name_of(file.relative_to(path)), suffix))
    if not sources:
        raise ValueError(f"no text in the folder {path}: expected files of {known}")
    return sorted(sources, key=lambda source: source.name)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    name = name if name.endswith(".parquet.gz") else name.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def not_read(path: Path, read: Collection[Path]) -> str:
    """Counts the files below a folder that are not among those read: "3 .docx, 1 .pdf"."""
    others = (file for file in files_below(path) if file not in read) if path.is_dir() else ()
    counts = Counter(file.suffix.lower() or "without a suffix" for file in others)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def _with_columns(sources: list[TextFile], text_column: str | None) -> list[TextFile]:
    chosen, left_out = [], []
    for source in sources:
        if source.suffix == ".txt":
            chosen.append(source)
            continue
        wanted = TEXT_COLUMNS if text_column is None else (text_column,)
        column, columns = _find_column(source, wanted)
        if columns is None:  # an empty file
            continue
        if column is not None:
            chosen.append(TextFile(source.path, source.name, source.suffix, column))
            continue
        problem = f"{source.path} has no column {' or '.join(wanted)}; {listed(columns)}"
        if text_column is None:
            raise ValueError(
                f"{problem}; name the text column with --text-column "
                "(tables without it are then left out)"
            )
        left_out.append(problem)
    if left_out and all(source.suffix == ".txt" for source in chosen):
        raise ValueError(f"{left_out[0]}; name the text column with --text-column")
    return chosen


def _find_column(source: TextFile, wanted: tuple[str, ...]) -> tuple[str | None, list[str] | None]:
    """The first wanted column, and the columns of the first record; None if there are none."""
    if source.suffix == ".parquet":
        with _parquet(source.path) as file:
            columns = file.schema_arrow.names
        return find_column(columns, wanted), columns
    if source.suffix != ".jsonl":
        _, columns = next(read_rows(source.path, _delimiter(source)), (0, None))
        return None if columns is None else find_column(columns, wanted), columns
    first = None
    for _, record in read_objects(source.path):  # the first ones may lack it
        first = list(record) if first is None else first
        column = find_column(list(record), wanted)
        if column is not None:
            return column, first
    return None, first


def find_column(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    """Finds the first wanted name among the columns, preferring an exact match to another case."""
    for name in wanted:
        if name in columns:
            return name
        for column in columns:
            if column.strip().lower() == name.strip().lower():
                return column
    return None


# Records


def read_file(file: TextFile) -> Iterator[tuple[int, str]]:
    """Yields (record number from 1, text, which may be empty) of a file from `find_files`."""
    readers: dict[str, Callable[[TextFile], Iterator[tuple[int, str]]]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".csv": _read_table,
        ".tsv": _read_table,
        ".parquet": _read_parquet,
    }
    return readers[file.suffix](file)


def _read_all(path: Path, sources: list[TextFile]) -> Iterator[Document]:
    empty = True
    for source in sources:
        for number, text in read_file(source):
            if text.strip():
                empty = False
                yield Document(f"{source.name}:{number}", text)
    if empty:
        raise ValueError(f"no text in {path}: every file or record there is empty")


def _read_txt(source: TextFile) -> Iterator[tuple[int, str]]:
    yield 1, "".join(read_lines(source.path))


def _read_jsonl(source: TextFile) -> Iterator[tuple[int, str]]:
    for number, record in read_objects(source.path):
        yield number, _string(record.get(source.column), source, f"line {number}")


def _read_parquet(source: TextFile) -> Iterator[tuple[int, str]]:
    for number, record in enumerate(parquet_rows(source.path, [source.column]), start=1):
        yield number, _string(record[source.column], source, f"row {number}")


def _string(value: Any, source: TextFile, place: str) -> str:
    """A text; null is an empty one. Raises ValueError for other types."""
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{source.path}, {place}: {source.column!r} must be a string, got "
            f"{type(value).__name__}"
        )
    return value or ""


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .parquet file with these columns (by default all), a few at a time.

    Raises ValueError for a file that is no complete Parquet file.
    """
    with _parquet(path) as file:
        for batch in file.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[ParquetFile]:
    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, UnicodeDecodeError):  # their messages may quote data
        raise ValueError(f"{path}: expected a complete Parquet file; get it again") from None


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a .jsonl file. Raises ValueError at the first broken line."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Parses a JSON object; a lone surrogate becomes U+FFFD.

    Raises ValueError that names the place and shows no text.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        # Not chained, since the error contains the text.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "bad number"
        raise ValueError(f"{place}: not valid JSON ({reason})") from None
    except RecursionError:
        raise ValueError(f"{place}: JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: expected a JSON object, got {type(record).__name__}; "
            "a .jsonl file has one object on each line"
        )
    return _without_lone_surrogates(record) if "\\ud" in text.lower() else record


def _without_lone_surrogates(value: Any) -> Any:
    """Replaces each lone surrogate in the strings of a JSON value by U+FFFD."""
    # JSON can contain "\ud800" alone, which no encoding and no tokenizer accepts.
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {_without_lone_surrogates(k): _without_lone_surrogates(v) for k, v in value.items()}
    return value


def _read_table(source: TextFile) -> Iterator[tuple[int, str]]:
    rows = read_rows(source.path, _delimiter(source))
    _, header = next(rows)
    index = header.index(source.column)
    for number, row in rows:
        if any(row[len(header) :]):
            raise ValueError(
                f"{source.path}, record {number}: {len(row)} fields under {len(header)} columns; "
                "quote the fields that hold a separator"
            )
        yield number, row[index] if index < len(row) else ""


def _delimiter(source: TextFile) -> str:
    return "\t" if source.suffix == ".tsv" else ","


def read_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yields (number, fields) of a table: 0 for the header; blank lines are not rows.

    Quotes around a field are removed, and doubled quotes within it become one. Between tabs they
    are text, as in the format, unless all quotes in the file are those of CSV, which Excel and
    pandas write. Raises ValueError for a file that is not text, a damaged .gz, and a quote that is
    not closed at the end of a field.
    """
    plain = delimiter == "\t" and not _quoted(path)
    lines = (line.rstrip("\n") for line in read_lines(path))
    rows = (line.split("\t") for line in lines if line) if plain else _quoted_rows(path, delimiter)
    yield from enumerate(rows)


def _quoted(path: Path) -> bool:
    """Whether the quotes in a file with tabs are those of CSV."""
    begins = doubled = False
    widths: Counter[int] = Counter()
    for line in read_lines(path):
        fields = line.rstrip("\n").split("\t")
        widths.update([len(fields)] if line != "\n" else [])
        if '"' in line:
            begins |= any(field.startswith('"') for field in fields)
            doubled |= any('""' in field and _CSV_FIELD.fullmatch(field) for field in fields)
    if not begins:
        return False
    try:
        rows = sum(1 for _ in _quoted_rows(path, "\t"))
    except ValueError:
        if doubled or len(widths) > 1:
            raise
        return False
    # If a row has several lines, but each line is also a complete row, quotes join what they should
    # not.
    return rows == widths.total() or len(widths) > 1 or 1 in widths


def _quoted_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    # Closed here, because csv's reader keeps the file open as long as an error's frames live.
    with contextlib.closing(read_lines(path)) as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 0
        while (row := _next_row(reader, path, number)) is not None:
            if row:
                yield row
                number += 1


def _next_row(reader: Any, path: Path, number: int) -> list[str] | None:
    # The limit is global, so it is restored before other code runs.
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(reader, None)
    except csv.Error as error:
        reason = f"{error}; is a quote left open?"
        if "unexpected end of data" in reason:
            reason = "a quote is opened and never closed"
        raise ValueError(f"{path}, record {number}: {reason}") from None
    finally:
        csv.field_size_limit(before)


# Bytes to lines


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def read_lines(path: Path) -> Generator[str, None, None]:
    """Yields lines with "\\n", whatever the file's encoding and line ends are; unpacks .gz.

    Raises ValueError for a file that is not text, or a damaged .gz.
    """
    try:
        with _open(path) as file:
            head = file.read(HEAD)
            file.seek(0)
            encoding = next((name for bom, name in BOMS if head.startswith(bom)), "utf-8")
            _refuse_binary(path, head, encoding)
            lines = (
                io.TextIOWrapper(file, encoding, newline=None)
                if encoding == "utf-16"
                else _utf8_lines(path, file, len(codecs.BOM_UTF8) * (encoding == "utf-8-sig"))
            )
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise ValueError(f"{path}, line {number}: not text (NUL bytes); {NOT_TEXT}")
                yield line
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text (broken UTF-16); {NOT_TEXT}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path}: damaged or incomplete .gz; download the file again") from None


def _refuse_binary(path: Path, head: bytes, encoding: str) -> None:
    text = head.decode(encoding if encoding == "utf-16" else "latin-1", "replace")
    if "\0" in text:
        raise ValueError(f"{path}: not text (NUL bytes); {NOT_TEXT}")
    controls = sum(c < " " and c not in HARMLESS_CONTROLS for c in text)
    if controls > max(1, len(text) / 1000):
        raise ValueError(f"{path}: not text (control characters); {NOT_TEXT}")


def _utf8_lines(path: Path, file: gzip.GzipFile | io.BufferedReader, skip: int) -> Iterator[str]:
    file.seek(skip)
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            # By line, so that one bad byte does not change the accents of the rest of the file.
            try:
                line = raw.decode("cp1252")
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path}, line {number}: not text (neither UTF-8 nor cp1252); {NOT_TEXT}"
                ) from None
        # Not splitlines(), which splits at a form feed and more.
        line = line.replace("\r\n", "\n")
        if "\r" in line:
            *whole, last = line.replace("\r", "\n").split("\n")
            yield from (part + "\n" for part in whole)
            line = last
        if line:
            yield line
