"""Local files of text, jsonl and csv, and anything that `datasets` reads.

    text         a file or folder of .txt (one document), .jsonl, .csv, .tsv (all also as .gz) and
                 .parquet
    jsonl        .jsonl only
    csv          .csv and .tsv only
    huggingface  a data set as a clone of its repository or from `save_to_disk`, a folder or file of
                 .parquet, .arrow, .json, .jsonl, .csv or .tsv, or the name of a data set of the
                 hub (NAME or NAME:CONFIGURATION)

The text is --text-column, or the first of text.TEXT_COLUMNS.

Of a data set with splits, only train is read. The splits of a folder are found as `datasets` does,
by names such as data/test-00000-of-00001.parquet and test/part.jsonl. Other files are then left
out, with a warning.
"""

import collections
import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ...common.names import listed
from ..readers.text import (
    SUFFIXES,
    TEXT_COLUMNS,
    find_column,
    find_files,
    not_read,
    parse_object,
    read_file,
)
from ..source import Example, Name, Report, Source, files_below, name_of

# Read by `datasets`. It reads .jsonl and .csv, too, but fails on what our own reader accepts, and
# takes the text "NA" for none.
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".json.gz": "json"}
_TABLES = tuple(suffix + gz for suffix in (".jsonl", ".csv", ".tsv") for gz in ("", ".gz"))
# About a data set, and no part of it.
_FACTS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")
_SPLIT = re.compile(
    r"(?:^|[-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
    r"(?=$|[-._ 0-9])"
)


@dataclasses.dataclass(frozen=True)
class FilesSource(Source):
    """Files of text, found and read by readers/text.py."""

    text_column: str | None = None
    suffixes: tuple[str, ...] = SUFFIXES

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files; with text_column, tables without it are left out as long as one has it."""
        files = find_files(root, self.text_column, suffixes=self.suffixes)
        if not files:
            raise ValueError(f"{root}: expected files of {', '.join(self.suffixes)} with text")
        return [file.path for file in files]

    def remark(self, root: pathlib.Path) -> str:
        """Counts the files that are not read."""
        parts = set(self.parts(root))
        others = not_read(root, parts)
        return f"{self.name}: {len(parts)} files are read; left out: {others}" if others else ""


@dataclasses.dataclass(frozen=True)
class HubSource(Source):
    """What `datasets` reads: local files, or a data set on the hub."""

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files of the split train below a folder, a file, or the name on the hub."""
        if root.is_dir():
            return [part for part in super().parts(root) if not _is_cache(part)]
        if root.exists() and not root.name.endswith((*_KINDS, *_TABLES)):
            known = ", ".join((*_KINDS, *_TABLES))
            raise ValueError(f"{root}: expected a folder, or a file of {known}")
        return [root]

    def choose(self, names: list[Name], root: pathlib.PurePath) -> list[Name]:
        """The paths that are parts, sorted. Raises ValueError for splits without train."""
        found = super().choose([name for name in names if name.name not in _FACTS], root)
        splits = {_split_of(name) for name in found} - {""}
        if splits and "train" not in splits:
            raise ValueError(
                f"{root}: expected a split train, found {', '.join(sorted(splits))}; pass a file, "
                "or a folder whose files are not named for a split"
            )
        return [name for name in found if not splits or _split_of(name) == "train"]

    def remark(self, root: pathlib.Path) -> str:
        """Counts the files that belong to other splits or to none."""
        paths = list(files_below(root)) if root.is_dir() else []
        parts, names = set(self.parts(root)), set(paths)
        left = collections.Counter(
            _split_of(path.relative_to(root)) or "no split"
            for path in names - parts
            if path.name.endswith((*_KINDS, *_TABLES)) and path.name not in _FACTS
            if not _is_cache(path)
        )
        if not left:
            return ""
        counts = ", ".join(f"{count} of {split}" for split, count in sorted(left.items()))
        return f"{self.name}: {len(parts)} files of the split train are read; left out: {counts}"


def _split_of(name: pathlib.PurePath) -> str:
    """The split that a path within a data set names; "" if none."""
    shard = _SHARD.fullmatch(name.name)
    if shard and shard[1] != "data":  # what save_to_disk calls each file
        return shard[1]
    for part in name.parts:  # folders come before the file
        if found := _SPLIT.search(part.lower()):
            return "train" if found[1] == "training" else found[1]
    return ""


def _is_cache(part: pathlib.Path) -> bool:
    """Whether an .arrow file in a folder of save_to_disk is not in its list of files."""
    state = part.with_name("state.json")
    if part.suffix != ".arrow" or not state.is_file():
        return False
    files = parse_object(state.read_text("utf-8"), str(state)).get("_data_files", [])
    return part.name not in [file["filename"] for file in files]


def generic(name: str, text_column: str | None = None) -> Source:
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
            files=tuple(f"*{suffix}" for suffix in (*_KINDS, *_TABLES)),
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
    part: pathlib.Path, root: pathlib.Path, report: Report, text_column: str | None
) -> Iterator[Example]:
    name = name_of(pathlib.Path(part.name) if part == root else part.relative_to(root))
    for file in find_files(part, text_column):
        for number, text in read_file(file):
            if text.strip():
                yield Example(f"{name}:{number}", text)
            else:
                report.drop("empty text", f"{name}:{number}")


def _read_datasets(
    part: pathlib.Path, root: pathlib.Path, report: Report, text_column: str | None
) -> Iterator[Example]:
    if part.exists() and part.name.endswith(_TABLES):
        yield from _read_files(part, root, report, text_column)
        return
    name = name_of(pathlib.Path(part.name) if part == root else part.relative_to(root))
    rows = _stream(part)
    column = ""
    for number, row in enumerate(rows, start=1):
        if not column:
            wanted = TEXT_COLUMNS if text_column is None else (text_column,)
            found = find_column(list(row), wanted)
            if found is None:
                raise ValueError(
                    f"{part}: expected a column {' or '.join(wanted)}; {listed(list(row))}; name "
                    "the text column with --text-column"
                )
            column = found
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            yield Example(f"{name}:{number}", text)
        else:
            report.drop("empty text", f"{name}:{number}")


def _stream(part: pathlib.Path) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise ValueError("--corpus huggingface needs `datasets`: pip install datasets") from None
    # Before it raises an error, it logs what pyarrow says, which may contain text.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        if part.exists():
            kind = next(kind for suffix, kind in _KINDS.items() if part.name.endswith(suffix))
            yield from datasets.load_dataset(
                kind, data_files=str(part), split="train", streaming=True
            )
        else:
            name, _, config = part.as_posix().partition(":")
            yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:  # any error; its message may contain text
        raise ValueError(f"{part}: `datasets` cannot read it ({type(error).__name__})") from None
