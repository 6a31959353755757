"""What every corpus module provides: a Source, which describes a corpus and reads its files."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

LARGEST_ID = 10**8  # PMIDs and PMCIDs have up to eight digits
# A record in a file, or one that the file deletes.
RECORD = np.dtype([("id", "<u4"), ("version", "<u2"), ("deleted", "?")])
Name = TypeVar("Name", bound=pathlib.PurePath)
ACCESS = Literal["open", "login", "restricted", "credentialed"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A document. id: unique in its source and the same in every run. meta: a few short facts."""

    id: str
    text: str
    meta: dict[str, str] = dataclasses.field(default_factory=dict)


class Report:
    """Why records were dropped: counts by reason and the first places, never any text."""

    def __init__(self) -> None:
        self.dropped: collections.Counter[str] = collections.Counter()
        self.places: dict[str, list[str]] = {}

    def drop(self, reason: str, place: str) -> None:
        """Counts a dropped record. place: file and record number."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < 5:
            places.append(place)


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files below a folder, in no order; follows links, and leaves out hidden names.

    Raises ValueError for a link to a folder that the link is in, and OSError for a folder that
    cannot be read. A link to nothing is yielded, so that reading it fails with its name.
    """
    return _files_below(folder, frozenset())


def _files_below(folder: pathlib.Path, above: frozenset) -> Iterator[pathlib.Path]:
    stat = folder.stat()
    this = stat.st_dev, stat.st_ino
    if this in above:
        raise ValueError(f"{folder}: expected no link to a folder that it is in; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files_below(folder / entry.name, above | {this})
            elif entry.is_file() or entry.is_symlink():
                yield folder / entry.name


def name_of(path: pathlib.PurePath) -> str:
    """The path with "/" everywhere; a byte that is not UTF-8 is escaped ("caf\\xe9")."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def records_of(rows: Iterable[tuple[int, int, bool]]) -> np.ndarray:
    """RECORDs from (id, version, deleted). Impossible ids and versions are left out."""
    possible = (row for row in rows if 0 < row[0] < LARGEST_ID and 0 < row[1] < 1 << 16)
    return np.fromiter(possible, RECORD)


@dataclasses.dataclass(frozen=True)
class Revisions:
    """How a source revises its records; build/revisions.py finds the newest version of each.

    age(part): sort key of the parts, old before new. scan(part): its RECORDs, in the order of the
    file, found with as little parsing as possible. key(example id): (id, version).
    """

    age: Callable[[pathlib.Path], tuple]
    scan: Callable[[pathlib.Path], np.ndarray]
    key: Callable[[str], tuple[int, int]]

    def in_order(self, parts: Sequence[pathlib.Path]) -> list[pathlib.Path]:
        """The parts, old before new."""
        return sorted(parts, key=lambda part: (self.age(part), os.fspath(part)))


Reader = Callable[[pathlib.Path, pathlib.Path, Report], Iterator[Example]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus as its owners distribute it.

    files: patterns of the files that a person downloaded or unpacked, at any depth ("notes/*.json"
    is a .json file in any folder "notes"; * does not cross "/"). Each match is a part; parts are
    read independently, in any order and on any machine. read(part, root, report) yields a part's
    documents, passes unusable records to report.drop, and raises ValueError with one line for a
    broken file. beside: patterns of further files that it opens. documents and tokens: size of the
    complete distribution (model card), 0 if unknown.
    """

    name: str  # the value of --corpus
    title: str
    homepage: str
    access: ACCESS
    license: str
    citation: str
    files: tuple[str, ...]
    read: Reader
    beside: tuple[str, ...] = ()
    agreement: str = ""  # what a user must sign or complete to get access
    documents: int = 0
    tokens: int = 0
    kind: Literal["clinical", "biomedical", "generic"] = "clinical"
    revisions: Revisions | None = None  # if later parts revise or delete records of earlier ones

    @property
    def availability(self) -> str:
        """Where the corpus is available and under what terms, for errors."""
        terms = f" ({self.agreement})" if self.agreement else ""
        return f"{self.title} is available at {self.homepage}, access {self.access}{terms}"

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files to read below `root`, sorted by relative path; see `files_below`.

        Raises FileNotFoundError that says where the corpus is available and under what terms.
        """
        names = [path.relative_to(root) for path in files_below(root)] if root.is_dir() else []
        # The absolute path, so that a pattern can match the name of `root` itself.
        return [root / name for name in self.choose(names, root.resolve())]

    def files_read(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The parts, and then the files beside them."""
        found = sorted(files_below(root)) if self.beside else []
        beside = [path for path in found if any(path.match(glob) for glob in self.beside)]
        return self.parts(root) + beside

    def remark(self, root: pathlib.Path) -> str:
        """What the files below `root` hold that is not read, for a warning; "" if nothing."""
        del root
        return ""

    def choose(self, names: list[Name], root: pathlib.PurePath) -> list[Name]:
        """The paths, relative to `root`, that are parts, sorted. Raises as `parts` does."""
        found = [
            name
            for name in names
            if any((root / name).match(glob) for glob in self.files)
            and not any(folder.startswith(".") for folder in name.parts)
            # "x.gz" next to "x" is a second copy.
            and not (name.suffix == ".gz" and name.with_suffix("") in names)
        ]
        if not found:
            packed = [name.name for name in names if name.name.endswith((".zip", ".tar.gz"))]
            unpack = f"; unpack {' and '.join(sorted(packed)[:3])} first" if packed else ""
            raise FileNotFoundError(
                f"{self.name}: expected {' or '.join(self.files)} below {root}, found none; "
                f"{self.availability}{unpack}"
            )
        return sorted(found, key=pathlib.PurePath.as_posix)
