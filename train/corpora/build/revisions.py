"""Finds which file holds the newest version of each record, for sources that revise and delete.

PubMed and PMC are published as files that never change: later files repeat revised records and list
deleted ones. Before anything is read, a pass over ids and versions finds the one file that counts
for each record. Memory holds four bytes for each possible id (170 MB for PubMed), independent of
the number of files and the length of the texts.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...common.parallel import run_all
from ...common.records import read_object, write_object
from ..source import LARGEST_ID, Revisions


def resolve(
    revisions: Revisions, parts: Sequence[pathlib.Path], folder: pathlib.Path, workers: int = 1
) -> "Newest":
    """Finds the newest version of each record in `parts` and keeps the result in `folder`.

    A later part replaces the same version in an earlier one, a higher version replaces a lower one,
    and a deletion removes its version until a later part has it again. Parts that were scanned
    before are not scanned again. Raises ValueError that names a broken part and counts them.
    """
    ordered = revisions.in_order(parts)
    folder.mkdir(parents=True, exist_ok=True)
    scans = [folder / _scan_name(part) for part in ordered]
    todo = [both for both in zip(ordered, scans, strict=True) if not both[1].exists()]
    run_all(functools.partial(_scan_to_file, revisions.scan), todo, "scan", workers)
    failed = [scan.with_suffix(".failed") for scan in scans if not scan.exists()]
    if failed:
        more = f" (and {len(failed) - 1} more like it)" if len(failed) > 1 else ""
        reason = failed[0].read_text("utf-8", "surrogateescape")
        raise ValueError(f"{reason}{more}; fix it, or move it out of the folder")
    _write(folder, ordered, *_merge(scans))
    return Newest(revisions, folder)


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
        path.with_suffix(".failed").write_text(str(error), "utf-8", "surrogateescape")
        return
    _save(path, records)


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    # A killed run must not leave half a file under this name.
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, array)
    temporary.replace(path)


def _merge(scans: Sequence[pathlib.Path]) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Returns version 1 of nearly all records, by id, and other versions, by (id, version).

    A value is a part's number from 1, or 0 for a version that is deleted or absent.
    """
    newest = np.zeros(LARGEST_ID, np.uint32)  # the system allocates only the pages written to
    others: dict[tuple[int, int], int] = {}
    highest = 0
    for number, scan in enumerate(scans, start=1):
        records = np.load(scan)
        highest = max(highest, int(records["id"].max(initial=0)))
        first = records["version"] == 1
        for deleted in (False, True):  # a file's deletions come after its records
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
    write_object(folder / "newest.json", facts)


class Newest:
    """Decides whether an example is the newest version. Its pickle holds only the folder's name.

    fingerprint: sha256 of all decisions.
    """

    def __init__(self, revisions: Revisions, folder: pathlib.Path):
        self.revisions, self.folder = revisions, folder
        facts = read_object(folder / "newest.json", "sha256", "parts")
        self.fingerprint: str = facts["sha256"]
        self.numbers = {part: number for number, part in enumerate(facts["parts"], start=1)}
        self.newest = np.load(folder / "newest.npy", mmap_mode="r")
        self.others: dict[int, dict[int, int]] = {}
        for number, version, part in np.load(folder / "versions.npy").tolist():
            self.others.setdefault(number, {})[version] = part

    def __reduce__(self) -> Any:
        return Newest, (self.revisions, self.folder)

    def __call__(self, part: pathlib.Path, example_id: str) -> bool:
        """Whether the example with this id in this part is the newest version."""
        number, version = self.revisions.key(example_id)
        first = int(self.newest[number]) if number < len(self.newest) else 0
        versions = {1: first} | self.others.get(number, {})
        alive = {version: part for version, part in versions.items() if part}
        if not alive or version != max(alive):
            return False
        return alive[version] == self.numbers[os.fspath(part)]
