"""Tasks from your own files: classification (also of text pairs), multilabel, and tokens.

A folder holds train, validation (or valid, val, dev) and test; without validation, 15 % of train
is used for it. A single file, or a brat folder without these subfolders, is split 70/15/15.

- classification: .csv, .tsv, .jsonl or .parquet with a text column and a label column; with a
  second text column (text_pair, text2, sentence2, hypothesis) each example is a pair.
- multilabel: the same; the labels are a list, or text with "|" or ";" between them; an empty list,
  empty text or null is no label. Without a label column, every column that holds only 0 and 1 (or
  false and true) is a label.
- tokens: .conll, .bio, .iob, .txt or .tsv with a word and its tag per line, separated by tabs or
  spaces, and a blank line after each sentence; .jsonl or .parquet with words and labels; or a
  folder of brat's .txt and .ann.

CSV, TSV and JSONL are read by the readers of `prepare`, not by pandas: these name the record of an
error, keep every field as text ("NA" and "null" too), and never quote a row.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...common.names import listed, shown_columns
from ...corpora.readers.text import (
    TEXT_COLUMNS,
    find_column,
    parquet_rows,
    read_lines,
    read_objects,
    read_rows,
)
from ...corpora.source import files_below
from .brat import WORDS, documents, in_order, tag
from .task import USUAL, Columns, Data, Example, Task, hf_split, make_data, three_ways

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
TAGGED = (".conll", ".bio", ".iob", ".iob2", ".txt", ".tsv", ".jsonl", ".parquet")
FIRST = ("text", "sentence", "sentence1", "premise", *TEXT_COLUMNS[1:])
SECOND = ("text_pair", "text2", "sentence2", "hypothesis")
LABEL = ("label", "labels", "gold_label", "class", "category")

# Words and their tags.
Tagged = tuple[tuple[str, ...], tuple[str, ...]]


# Shared with the tasks of official files.


def find_file(
    folder: pathlib.Path, names: tuple[str, ...], what: str, homepage: str
) -> pathlib.Path:
    """The file with one of these names in a folder or below it; the first name, the nearest file.

    Raises FileNotFoundError that says where to get it.
    """
    for name in names:
        below = files_below(folder) if folder.is_dir() else ()
        found = [path for path in below if path.name == name]
        if found:
            return min(found, key=lambda path: (len(path.parts), path.as_posix()))
    raise FileNotFoundError(
        f"expected {' or '.join(names)} in {folder}, found none; {what}: {homepage}"
    )


def read_table(
    path: pathlib.Path, columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(record number from 1, these columns) of a .csv or .tsv table with a header.

    Column names ignore case. Raises ValueError for a missing column, and for a row with more or
    fewer fields than the header.
    """
    rows = _rows(path)
    _, header = next(rows, (0, []))
    found = {column: find_column(header, (column,)) for column in columns}
    for column, name in found.items():
        if name is None:
            raise ValueError(f"{path}: expected a column {column!r}; {listed(header)}")
    index = {column: header.index(name) for column, name in found.items() if name is not None}
    for number, row in rows:
        _same_length(path, number, row, header)
        yield number, {column: row[i] for column, i in index.items()}


def token_data(
    tagged: Sequence[Tagged | None],
    rows: Sequence[np.ndarray],
    skipped: Counter[str],
    where: pathlib.Path,
    labels: tuple[str, ...],
    kept: Mapping[str, int] | None = None,
) -> Data:
    """The Data of tagged texts. rows: the indices of train, validation and test.

    None and texts without a word are skipped after the split, which they therefore do not change.
    """
    ids = {label: i for i, label in enumerate(labels)}
    splits: list[list[Example]] = [[], [], []]
    for part, split in zip(rows, splits, strict=True):
        for one in (tagged[i] for i in part):
            if one is not None and one[0]:
                split.append(Example(words=one[0], label=tuple(ids[name] for name in one[1])))
            elif one is not None:
                skipped["texts without a word"] += 1
    return make_data(labels, splits, skipped, where, kept)


# Your own files.


def load_classification(path: pathlib.Path, columns: Columns = USUAL) -> Data:
    """One label per example; see the module."""
    skipped: Counter[str] = Counter()
    splits = read_splits(path, TABLES, lambda file: _classified(file, skipped, columns))
    labels = _sorted({name for split in splits for _, name in split})
    ids = {label: i for i, label in enumerate(labels)}
    examples = (
        [dataclasses.replace(example, label=ids[name]) for example, name in split]
        for split in splits
    )
    return make_data(labels, examples, skipped, path)


def load_multilabel(path: pathlib.Path, columns: Columns = USUAL) -> Data:
    """Any number of labels per example; see the module."""
    skipped: Counter[str] = Counter()
    splits = read_splits(path, TABLES, lambda file: _labelled(file, skipped, columns))
    flags = [names for split in splits for _, names in split if isinstance(names, dict)]
    if flags and len(flags) < sum(map(len, splits)):
        raise ValueError(f"{path}: expected a column {' or '.join(LABEL)} in each file, or in none")
    # Without a label column: the columns that hold 0 or 1 in every record.
    named = sorted({name for names in flags for name in names})
    common = {name for name in named if all(names.get(name) is not None for names in flags)}
    if others := [name for name in named if name not in common]:
        more = ", ..." * (len(others) > 5)
        listing = ", ".join(shown_columns(others)[:5]) + more
        skipped[f"columns with other values than 0 and 1, so no labels: {listing}"] = len(others)
    chosen = [
        [
            (example, {n for n in common if names[n]} if isinstance(names, dict) else names)
            for example, names in split
        ]
        for split in splits
    ]
    labels = _sorted(common.union(*(names for split in chosen for _, names in split)))
    if not labels:
        raise ValueError(
            f"{path}: expected a column {' or '.join(LABEL)}, or columns of 0 and 1; found neither"
        )
    examples = (
        [
            dataclasses.replace(example, label=tuple(int(name in names) for name in labels))
            for example, names in split
        ]
        for split in chosen
    )
    return make_data(labels, examples, skipped, path)


def load_tokens(path: pathlib.Path) -> Data:
    """One tag per word; see the module."""
    skipped: Counter[str] = Counter()
    if path.is_dir() and in_order(path, ".ann"):
        splits = read_splits(path, None, lambda folder: _brat(folder, skipped))
    else:
        splits = read_splits(path, TAGGED, _tagged)
    tagged = [one for split in splits for one in split]
    labels = tuple(sorted({name for _, tags in tagged for name in tags}))
    ends = np.cumsum([len(split) for split in splits])
    rows = np.split(np.arange(len(tagged)), ends[:-1])
    return token_data(tagged, rows, skipped, path, labels)


def read_splits(
    path: pathlib.Path,
    suffixes: tuple[str, ...] | None,
    read: Callable[[pathlib.Path], list[Any]],
) -> list[list[Any]]:
    """`read` of train, validation and test, which are subfolders if suffixes is None.

    A single file, also one in a folder, is split 70/15/15; without validation, 15 % of train is.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found = _parts(path, suffixes) if path.is_dir() else {}
    if not found:
        if path.is_dir() and suffixes:
            files = [file for file in sorted(path.iterdir()) if _suffix(file) in suffixes]
            if len(files) != 1:
                raise ValueError(
                    f"{path}: expected train, validation and test, or one file to split, each "
                    f"{', '.join(suffixes)}; found {len(files)} such files and no train"
                )
            path = files[0]
        elif suffixes and _suffix(path) not in suffixes:
            raise ValueError(f"{path}: expected a file of {', '.join(suffixes)}")
        return _divide(read(path), three_ways)
    if "train" not in found or "test" not in found:
        raise ValueError(
            f"{path}: expected train and test, and maybe validation; found {', '.join(found)}"
        )
    train, test = read(found["train"]), read(found["test"])
    if "validation" in found:
        return [train, read(found["validation"]), test]
    return [*_divide(train, lambda n: hf_split(n, 0.15)), test]


def _divide(examples: list[Any], split: Callable[[int], Sequence[np.ndarray]]) -> list[list[Any]]:
    return [[examples[i] for i in part] for part in split(len(examples))]


def _parts(folder: pathlib.Path, suffixes: tuple[str, ...] | None) -> dict[str, pathlib.Path]:
    """The file or subfolder of each split, by its name."""
    found = {}
    for split, names in SPLITS.items():
        paths = [
            path
            for path in sorted(folder.iterdir())
            if re.sub(r"-\d{5}-of-\d{5}$", "", path.name.split(".")[0].lower()) in names
            and (path.is_dir() if suffixes is None else _suffix(path) in suffixes)
        ]
        if len(paths) > 1:
            listing = ", ".join(path.name for path in paths)
            raise ValueError(f"{folder}: expected one {split}, found {listing}")
        if paths:
            found[split] = paths[0]
    return found


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def _rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    # Read to the end, so that no error in a row leaves the file open.
    return iter(list(read_rows(path, "\t" if _suffix(path) == ".tsv" else ",")))


def _same_length(path: pathlib.Path, number: int, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        raise ValueError(
            f"{path}, record {number}: expected {len(header)} fields, as in the header, got "
            f"{len(row)}; quote the fields that hold a separator"
        )


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, fields) of each record of a table, .jsonl or .parquet file.

    The columns of a .jsonl file are those of all its records; a record has None for those it lacks.
    """
    if _suffix(path) in (".jsonl", ".parquet"):
        objects = list(_objects(path))
        columns = dict.fromkeys(name for _, record in objects for name in record)
        for at, record in objects:
            yield at, {name: record.get(name) for name in columns}
        return
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        shown = dict(zip(header, shown_columns(header), strict=True))
        names = ", ".join(shown[name] for name in twice)
        raise ValueError(f"{path}: expected each column once, got {names} twice")
    for number, row in rows:
        _same_length(path, number, row, header)
        yield f"{path}, record {number}", dict(zip(header, row, strict=True))


def _objects(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, object) of each line of a .jsonl file or row of a .parquet file."""
    if _suffix(path) == ".jsonl":
        for number, record in read_objects(path):
            yield f"{path}, line {number}", record
        return
    for number, row in enumerate(parquet_rows(path), start=1):
        yield f"{path}, row {number}", row


def _column(
    at: str, found: list[str], flag: str, named: str | None, usual: tuple[str, ...]
) -> str | None:
    """The column that a flag names, or one of the usual names; None without either.

    Raises ValueError if the named one is missing.
    """
    column = find_column(found, usual if named is None else (named,))
    if column is None and named is not None:
        raise ValueError(f"{at}: expected the column of {flag}, {named}; {listed(found)}")
    return column


def _texts(
    path: pathlib.Path, skipped: Counter[str], columns: Columns
) -> Iterator[tuple[str, Example, dict]]:
    """(where it is, example without its label, the other fields); skips empty texts."""
    for at, record in _records(path):
        found = list(record)
        first = _column(at, found, "--text-column", columns.text, FIRST)
        second = _column(at, found, "--text-pair-column", columns.text_pair, SECOND)
        if first is None:
            raise ValueError(
                f"{at}: expected a column {' or '.join(FIRST)}; {listed(found)}; name it with "
                "--text-column"
            )
        text, pair = _text(record.pop(first), at), None
        if second is not None:
            pair = _text(record.pop(second), at)
        if not text.strip() or (pair is not None and not pair.strip()):
            skipped["empty texts"] += 1
        else:
            yield at, Example(text, pair), record


def _text(value: Any, at: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{at}: expected text, got {type(value).__name__}")
    return value or ""


def _classified(
    path: pathlib.Path, skipped: Counter[str], columns: Columns
) -> list[tuple[Example, str]]:
    found = []
    for at, example, record in _texts(path, skipped, columns):
        column = _column(at, list(record), "--label-column", columns.label, LABEL)
        if column is None:
            raise ValueError(
                f"{at}: expected a column {' or '.join(LABEL)}; {listed(list(record))}; name it "
                "with --label-column"
            )
        value = record[column]
        if isinstance(value, list | dict | float):
            raise ValueError(f"{at}: expected one label, got {type(value).__name__}")
        name = "" if value is None else str(value).strip()
        # pandas writes a missing label as NaN, SNLI and MedNLI as "-".
        if not name or name.lower() in ("nan", "-"):
            skipped["examples without a label"] += 1
        else:
            found.append((example, name))
    return found


def _labelled(
    path: pathlib.Path, skipped: Counter[str], columns: Columns
) -> list[tuple[Example, set[str] | dict[str, bool | None]]]:
    """(example, its labels or, of each column, whether it is 1, 0 or neither)."""
    found: list[tuple[Example, set[str] | dict[str, bool | None]]] = []
    ones = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
    for at, example, record in _texts(path, skipped, columns):
        column = _column(at, list(record), "--label-column", columns.label, LABEL)
        if column is None:
            flags = {k: ones.get(str(v).strip().lower()) for k, v in record.items()}
            found.append((example, flags))
            continue
        value = record[column]
        names = re.split(r"[|;]", value) if isinstance(value, str) else value
        names = [] if names is None else names
        if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
            raise ValueError(f"{at}: expected labels between '|', or a list of them")
        names = [str(name).strip() for name in names if str(name).strip()]
        labels = set(names)
        if labels <= {"0", "1"} and len(labels) < len(names):
            raise ValueError(
                f"{at}: expected the names or numbers of the example's labels, got a 0 or 1 for "
                "each label; use a column of 0 and 1 per label instead"
            )
        found.append((example, labels))
    return found


def _sorted(names: set[str]) -> tuple[str, ...]:
    """Sorted by name, or as numbers if all are numbers."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def _brat(folder: pathlib.Path, skipped: Counter[str]) -> list[Tagged]:
    return [
        tag(text, spans, WORDS, skipped, whole=False)
        for _, text, spans in documents(folder, skipped, join=True)
    ]


def _tagged(path: pathlib.Path) -> list[Tagged]:
    suffix = _suffix(path)
    sentences = _tagged_objects(path) if suffix in (".jsonl", ".parquet") else _conll(path)
    found = []
    for at, words, tags in sentences:
        if any(not re.fullmatch(r"O|[BIES]-\S+", one) for one in tags):
            raise ValueError(
                f"{at}: expected the tags O, B-type and I-type (or E-, S-), got another"
            )
        found.append((tuple(words), tuple(tags)))
    return found


def _conll(path: pathlib.Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(where it is, words, tags) of each sentence; a line has the word first and its tag last."""
    words: list[str] = []
    tags: list[str] = []
    number = 0
    for number, line in enumerate(list(read_lines(path)), start=1):
        # Not split() or strip(): a word may hold a no-break space, or a form feed.
        separator = "\t" if "\t" in line else " +"
        fields = [field.strip(" ") for field in re.split(separator, line.strip(" \n"))]
        if not any(fields):
            if words:
                yield f"{path}, the sentence before line {number}", words, tags
            words, tags = [], []
        elif fields[0] != "-DOCSTART-":
            if len(fields) < 2 or not (fields[0] and fields[-1]):
                raise ValueError(
                    f"{path}, line {number}: expected a word and its tag, got one field"
                )
            words.append(fields[0])
            tags.append(fields[-1])
    if words:
        yield f"{path}, the sentence up to line {number}", words, tags


def _tagged_objects(path: pathlib.Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for at, record in _objects(path):
        columns = list(record)
        words = record.get(find_column(columns, ("words", "tokens")) or "")
        tags = record.get(find_column(columns, ("labels", "tags", "ner_tags")) or "")
        for name, values in (("words", words), ("labels", tags)):
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise ValueError(f"{at}: {name}: expected a list of strings")
        assert isinstance(words, list) and isinstance(tags, list)
        if not all(words):
            raise ValueError(f"{at}: words: expected a character or more in each, got an empty one")
        if len(words) != len(tags):
            raise ValueError(
                f"{at}: expected one label per word, got {len(words)} words and {len(tags)} labels"
            )
        yield at, words, tags


CLASSIFICATION = Task(
    name="classification",
    title="Classification of your own texts or pairs",
    kind="classification",
    metric="weighted_f1",
    homepage="",
    load=load_classification,
    files=f"{' '.join(TABLES)}: columns text, maybe text_pair, and label",
    example='text,label / "No sign of fracture.",absent',
    takes_columns=True,
)
MULTILABEL = Task(
    name="multilabel",
    title="Multi-label classification of your own texts or pairs",
    kind="multilabel",
    metric="weighted_f1",
    homepage="",
    load=load_multilabel,
    files=f"{' '.join(TABLES)}: as above with several labels, or a column of 0 and 1 per label",
    example='text,label / "Cough and fever.",cough|fever',
    takes_columns=True,
)
TOKENS = Task(
    name="tokens",
    title="Token classification of your own texts",
    kind="tokens",
    metric="f1",
    homepage="",
    load=load_tokens,
    files="a word and its tag per line, a blank line between sentences; .jsonl; or brat's files",
    example="Fever B-SYMPTOM / since O / Monday B-DATE",
)
