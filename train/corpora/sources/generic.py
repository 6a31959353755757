"""Local files of text, jsonl and csv, and anything that `datasets` reads.

    text         a file or folder of .txt (one document), .jsonl, .csv and .tsv, also as .gz
    jsonl        .jsonl only
    csv          .csv and .tsv only
    huggingface  a folder or file of .parquet, .arrow, .json, .jsonl or .csv, or a data set of the
                 hub (NAME or NAME:CONFIGURATION, its split "train"), streamed by `datasets`

The text is --text-column, or the first of text.TEXT_COLUMNS.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from ..readers.text import SUFFIXES, TEXT_COLUMNS, find_column, find_files, listed, read_file
from ..source import Example, Report, Source, name_of

_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}


@dataclasses.dataclass(frozen=True)
class FilesSource(Source):
    """Files of text, found and read by readers/text.py."""

    text_column: str = ""
    suffixes: tuple[str, ...] = SUFFIXES

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files; with text_column, tables without it are left out as long as one has it."""
        files = find_files(root, self.text_column or None, suffixes=self.suffixes)
        if not files:
            raise ValueError(f"{root}: expected files of {', '.join(self.suffixes)} with text")
        return [file.path for file in files]


@dataclasses.dataclass(frozen=True)
class HubSource(Source):
    """What `datasets` reads: local files, or a data set on the hub."""

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files below a folder, a file, or the name on the hub."""
        if root.is_dir():
            return super().parts(root)
        return [root]


def generic(name: str, text_column: str = "") -> Source:
    """The source text, jsonl, csv or huggingface."""
    suffixes = {"text": SUFFIXES, "jsonl": (".jsonl",), "csv": (".csv", ".tsv")}.get(name, ())
    about: dict[str, Any] = {
        "name": name,
        "homepage": "",
        "access": "open",
        "license": "set by their owner",
        "citation": "",
        "kind": "generic",
    }
    if name == "huggingface":
        return HubSource(
            title="a data set on the Hugging Face hub, or files that `datasets` reads",
            files=tuple(f"*{suffix}" for suffix in _KINDS),
            read=functools.partial(_read_datasets, text_column=text_column),
            **about,
        )
    return FilesSource(
        title=f"files of {', '.join(suffixes)}",
        files=tuple(f"*{suffix}" for suffix in suffixes),
        read=functools.partial(_read_files, text_column=text_column),
        text_column=text_column,
        suffixes=suffixes,
        **about,
    )


def _read_files(
    part: pathlib.Path, root: pathlib.Path, report: Report, text_column: str
) -> Iterator[Example]:
    name = name_of(pathlib.Path(part.name) if part == root else part.relative_to(root))
    for file in find_files(part, text_column or None):
        for number, text in read_file(file):
            if text.strip():
                yield Example(f"{name}:{number}", text)
            else:
                report.drop("empty text", f"{name}:{number}")


def _read_datasets(
    part: pathlib.Path, root: pathlib.Path, report: Report, text_column: str
) -> Iterator[Example]:
    name = name_of(pathlib.Path(part.name) if part == root else part.relative_to(root))
    rows = _stream(part)
    column = ""
    for number, row in enumerate(rows, start=1):
        if not column:
            wanted = (text_column,) if text_column else TEXT_COLUMNS
            found = find_column(list(row), wanted)
            if found is None:
                raise ValueError(
                    f"{part}: expected a column {' or '.join(wanted)}; {listed(list(row))}; name "
                    "the text column with --text-column"
                )
            column = found
        text = row[column]
        if isinstance(text, str) and text.strip():
            yield Example(f"{name}:{number}", text)
        else:
            report.drop("empty text", f"{name}:{number}")


def _stream(part: pathlib.Path) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise ValueError("--corpus huggingface needs `datasets`: pip install datasets") from None
    try:
        if part.exists():
            yield from datasets.load_dataset(
                _KINDS[part.suffix], data_files=str(part), split="train", streaming=True
            )
        else:
            name, _, config = part.as_posix().partition(":")
            yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:  # any error; its message may contain text
        raise ValueError(f"{part}: `datasets` cannot read it ({type(error).__name__})") from None
