"""What every corpus module provides: a Source, what it is and how its files become texts."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from .revisions import Revisions

Name = TypeVar("Name", bound=pathlib.PurePath)
ACCESS = Literal["open", "login", "restricted", "credentialed"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A document. id: unique in its source and the same in every run. meta: few, short facts."""

    id: str
    text: str
    meta: dict[str, str] = dataclasses.field(default_factory=dict)


class Report:
    """What was left out, and why: counts by reason and the first places, never a text."""

    def __init__(self) -> None:
        self.dropped: collections.Counter[str] = collections.Counter()
        self.places: dict[str, list[str]] = {}

    def drop(self, reason: str, place: str) -> None:
        """Counts a record that is left out. place: file and record number."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < 5:
            places.append(place)


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus as its owners distribute it.

    files: patterns of what lies in the folder that a person downloaded or unpacked, at any depth
    ("notes/*.json" is a .json file in any folder "notes"; * does not cross "/"); each match is a
    part, and parts are read on their own, in any order and on any machine. read(part, root, report)
    gives a part's documents; a record that cannot be used goes to report.drop, a broken file raises
    ValueError with one line. documents and tokens: of the whole distribution (model card), 0 where
    unknown.
    """

    name: str  # of --corpus
    title: str
    homepage: str
    access: ACCESS
    licence: str
    citation: str
    files: tuple[str, ...]
    read: Callable[[pathlib.Path, pathlib.Path, Report], Iterator[Example]]
    agreement: str = ""  # what one must sign or pass to get it
    documents: int = 0
    tokens: int = 0
    kind: Literal["clinical", "biomedical", "generic"] = "clinical"
    revisions: Revisions | None = None  # where later parts revise or delete records of others

    def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
        """The files to read below `root`, sorted by relative path; hidden ones are left out.

        Raises FileNotFoundError that says where the corpus is to be had, and under what terms.
        """
        names = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        # With the folders above, for who names the folder "notes" itself.
        return [root / name for name in self.choose(names, root.resolve())]

    def choose(self, names: list[Name], root: pathlib.PurePath) -> list[Name]:
        """Which of these paths, relative to `root`, are parts, sorted. Raises as `parts` does."""
        found = [
            name
            for name in names
            if any((root / name).match(glob) for glob in self.files)
            and not any(folder.startswith(".") for folder in name.parts)
            # "x.gz" beside "x" is the same once more.
            and not (name.suffix == ".gz" and name.with_suffix("") in names)
        ]
        if not found:
            terms = f" ({self.agreement})" if self.agreement else ""
            packed = [name.name for name in names if name.name.endswith((".zip", ".tar.gz"))]
            unpack = f"; unpack {' and '.join(sorted(packed)[:3])} first" if packed else ""
            raise FileNotFoundError(
                f"{self.name}: expected {' or '.join(self.files)} below {root}, found none; "
                f"{self.title} is to be had at {self.homepage}, access {self.access}{terms}"
                f"{unpack}"
            )
        return sorted(found, key=pathlib.PurePath.as_posix)
