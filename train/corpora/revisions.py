"""Which file holds the newest version of a record, for sources that revise and delete records.

PubMed and PMC are published as files that never change: later files hold revised records once more,
and lists of deleted ones. So before anything is read, a pass over ids and versions finds, for each
record, the one file that counts. In memory are four bytes for each possible id (170 MB for PubMed),
whatever the number of files and the length of the texts.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..common.parallel import run_all

LARGEST_ID = 10**8  # PMIDs and PMCIDs have up to eight digits
# A record in a file, or one that the file takes away.
RECORD = np.dtype([("id", "<u4"), ("version", "<u2"), ("deleted", "?")])


def records_of(rows: Iterable[tuple[int, int, bool]]) -> np.ndarray:
    """RECORDs from (id, version, deleted). Impossible ids and versions are left out."""
    possible = (row for row in rows if 0 < row[0] < LARGEST_ID and 0 < row[1] < 1 << 16)
    return np.fromiter(possible, RECORD)


@dataclasses.dataclass(frozen=True)
class Revisions:
    """How a source revises its records.

    age(part): what parts are sorted by, old before new. scan(part): its RECORDs, in the file's
    order, found without parsing more than must be. key(example id): (id, version).
    """

    age: Callable[[pathlib.Path], tuple]
    scan: Callable[[pathlib.Path], np.ndarray]
    key: Callable[[str], tuple[int, int]]

    def in_order(self, parts: Sequence[pathlib.Path]) -> list[pathlib.Path]:
        """The parts, old before new."""
        return sorted(parts, key=lambda part: (self.age(part), os.fspath(part)))

    def resolve(
        self,
        parts: Sequence[pathlib.Path],
        folder: pathlib.Path,
        workers: int = 1,
        beam: Sequence[str] = (),
    ) -> "Newest":
        """Finds the newest version of each record in `parts`; keeps the outcome in `folder`.

        A later part replaces the same version in an earlier one, a higher version replaces a lower
        one, a deletion takes its version away, until a later part has it again. Parts that were
        scanned before are not scanned again. workers, beam: see parallel.run_all. Raises ValueError
        that names a broken part and counts them.
        """
        ordered = self.in_order(parts)
        folder.mkdir(parents=True, exist_ok=True)
        scans = [folder / _scan_name(part) for part in ordered]
        todo = [both for both in zip(ordered, scans, strict=True) if not both[1].exists()]
        run_all(functools.partial(_scan_to_file, self.scan), todo, "scan", workers, beam)
        failed = [scan.with_suffix(".failed") for scan in scans if not scan.exists()]
        if failed:
            more = f" (and {len(failed) - 1} more like it)" if len(failed) > 1 else ""
            raise ValueError(f"{failed[0].read_text()}{more}; put it right, or move it away")
        _write(folder, ordered, *_merge(scans))
        return Newest(self, folder)


def _scan_name(part: pathlib.Path) -> str:
    stat = part.stat()
    facts = f"{part}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".npy"


def _scan_to_file(
    scan: Callable[[pathlib.Path], np.ndarray], both: tuple[pathlib.Path, pathlib.Path]
) -> None:
    part, path = both
    try:
        records = scan(part)
    except ValueError as error:
        path.with_suffix(".failed").write_text(str(error))
        return
    _save(path, records)


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    # At once, so that a killed run leaves no half of it.
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, array)
    temporary.replace(path)


def _merge(scans: Sequence[pathlib.Path]) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Version 1 of nearly all records in an array by id, other versions by (id, version).

    The values are a part's number from 1, or 0: deleted, or never there.
    """
    newest = np.zeros(LARGEST_ID, np.uint32)  # the system gives memory only to what is written
    others: dict[tuple[int, int], int] = {}
    highest = 0
    for number, scan in enumerate(scans, start=1):
        records = np.load(scan)
        highest = max(highest, int(records["id"].max(initial=0)))
        first = records["version"] == 1
        for deleted in (False, True):  # a file deletes at its end
            value = 0 if deleted else number
            chosen = records["deleted"] == deleted
            newest[records["id"][chosen & first]] = value
            for record in records[chosen & ~first]:
                others[int(record["id"]), int(record["version"])] = value
    return newest[: highest + 1], others


def _write(
    folder: pathlib.Path,
    ordered: Sequence[pathlib.Path],
    newest: np.ndarray,
    others: dict[tuple[int, int], int],
) -> None:
    rows = [(number, version, part) for (number, version), part in sorted(others.items())]
    versions = np.asarray(rows, np.int64).reshape(-1, 3)
    _save(folder / "newest.npy", newest)
    _save(folder / "versions.npy", versions)
    digest = hashlib.sha256(newest.data)
    digest.update(versions.tobytes())
    facts = {"sha256": digest.hexdigest(), "parts": [os.fspath(part) for part in ordered]}
    (folder / "newest.json").write_text(json.dumps(facts))


class Newest:
    """Says whether an example is the one that counts. A pickle of it holds the folder alone.

    fingerprint: sha256, of all that it says.
    """

    def __init__(self, revisions: Revisions, folder: pathlib.Path):
        self.revisions, self.folder = revisions, folder
        facts = json.loads((folder / "newest.json").read_text())
        self.fingerprint: str = facts["sha256"]
        self.numbers = {part: number for number, part in enumerate(facts["parts"], start=1)}
        self.newest = np.load(folder / "newest.npy", mmap_mode="r")
        self.others: dict[int, dict[int, int]] = {}
        for number, version, part in np.load(folder / "versions.npy").tolist():
            self.others.setdefault(number, {})[version] = part

    def __reduce__(self) -> Any:
        return Newest, (self.revisions, self.folder)

    def __call__(self, part: pathlib.Path, example_id: str) -> bool:
        """Whether the example of this id counts as it stands in this part."""
        number, version = self.revisions.key(example_id)
        first = int(self.newest[number]) if number < len(self.newest) else 0
        versions = {1: first} | self.others.get(number, {})
        alive = {version: part for version, part in versions.items() if part}
        if not alive or version != max(alive):
            return False
        return alive[version] == self.numbers[os.fspath(part)]
