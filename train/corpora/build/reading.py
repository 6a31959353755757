"""Reads a source's files into records on disk, part by part, so that a killed run can resume.

Small parts are joined into jobs. A job leaves a folder with `records.array_record` (JSON lists of
id, text and meta), `keys.npy` (dedupe.KEY, one for each record) and `job.json` (counts). The folder
is renamed when it is complete. A complete job is skipped as long as its files have not changed.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)
)

from ...common.parallel import run_all
from ...common.records import read_object
from ..source import Example, Report, Source
from .dedupe import KEY, key_of
from .revisions import Newest

JOB_BYTES = 64 << 20  # of files, after which the next job begins
_AT_ONCE = 1024  # records


@dataclasses.dataclass(frozen=True)
class Job:
    """Parts that one worker reads. fingerprint: of their names, sizes and times."""

    folder: pathlib.Path  # where the records go
    parts: tuple[pathlib.Path, ...]
    fingerprint: str

    @property
    def records(self) -> pathlib.Path:
        """The file of its documents."""
        return self.folder / "records.array_record"

    @property
    def keys(self) -> pathlib.Path:
        """The file of their keys."""
        return self.folder / "keys.npy"

    def facts(self) -> dict[str, Any]:
        """What was read; {} until the job is complete."""
        facts = read_object(self.folder / "job.json", "fingerprint")
        return facts if facts.get("fingerprint") == self.fingerprint else {}


def plan_jobs(
    source: Source,
    root: pathlib.Path,
    parts: Sequence[pathlib.Path],
    work: pathlib.Path,
    version: str,
) -> list[Job]:
    """Joins all parts, in order, into jobs of up to JOB_BYTES.

    version: a text that changes with everything else that determines the records.
    """
    groups: list[list[pathlib.Path]] = []
    room = 0
    for part in parts:
        size = _stat(part)[0]
        if room < size or not groups:
            groups.append([])
            room = JOB_BYTES
        groups[-1].append(part)
        room -= size
    jobs = []
    for number, parts in enumerate(groups):
        stats = [(str(part.relative_to(root)), *_stat(part)) for part in parts]
        fingerprint = hashlib.sha256(json.dumps([version, source.name, stats]).encode())
        jobs.append(Job(work / f"job-{number:05d}", tuple(parts), fingerprint.hexdigest()))
    return jobs


def files_of(parts: Sequence[pathlib.Path], root: pathlib.Path) -> str:
    """sha256 of the names and contents of a source's files. Reads them."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([str(part.relative_to(root)), content]).encode())
    return digest.hexdigest()


def times_of(parts: Sequence[pathlib.Path], root: pathlib.Path) -> str:
    """sha256 of the names, sizes and times of a source's files; if it is the same, so are they."""
    stats = [(str(part.relative_to(root)), *_stat(part)) for part in parts]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _stat(part: pathlib.Path) -> tuple[int, int]:
    # A data set of the hub is not a local file.
    stat = part.stat() if part.exists() else None
    return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


def read_all(
    source: Source,
    root: pathlib.Path,
    jobs: Sequence[Job],
    newest: Newest | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Reads the jobs that are not complete; returns counts: read, dropped, places, seconds, bytes.

    newest: decides which version of an example is kept, where later parts revise earlier ones.
    Raises ValueError that names a broken file; the other files need not be read again.
    """
    todo = [job for job in jobs if not job.facts()]
    read = functools.partial(read_job, source, root, newest)
    run_all(read, todo, f"read {source.name}", workers)
    failed = [job.folder.with_suffix(".failed") for job in jobs if not job.facts()]
    if failed:
        reason = failed[0].read_text("utf-8", "surrogateescape")
        more = f" (and {len(failed) - 1} more like it)" if len(failed) > 1 else ""
        raise ValueError(
            f"{reason}{more}; fix it and run the same command: files that were read are kept"
        )
    total: dict[str, Any] = {"read": 0, "seconds": 0.0, "bytes": 0, "dropped": {}, "places": {}}
    for job in jobs:
        facts = job.facts()
        for name in ("read", "seconds", "bytes"):
            total[name] += facts[name]
        for reason, count in facts["dropped"].items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + count
            places = total["places"].setdefault(reason, [])
            places += facts["places"][reason][: 5 - len(places)]
    return total


def read_job(source: Source, root: pathlib.Path, newest: Newest | None, job: Job) -> None:
    """Reads the parts of a job into its folder; if a file is broken, JOB.failed says why."""
    temporary = job.folder.with_name(f"{job.folder.name}.{uuid.uuid4().hex}.tmp")
    failed = job.folder.with_suffix(".failed")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    start = time.perf_counter()
    report = Report()
    try:
        count = _write(_examples(source, root, newest, job, report), temporary, report)
    except ValueError as error:
        shutil.rmtree(temporary)
        failed.write_text(str(error), "utf-8", "surrogateescape")  # it may name any file
        return
    facts = {
        "fingerprint": job.fingerprint,
        "read": count + sum(report.dropped.values()),
        "dropped": dict(sorted(report.dropped.items())),
        "places": report.places,
        "bytes": sum(_stat(part)[0] for part in job.parts),
        "seconds": time.perf_counter() - start,
    }
    (temporary / "job.json").write_text(json.dumps(facts))
    shutil.rmtree(job.folder, ignore_errors=True)
    temporary.rename(job.folder)
    failed.unlink(missing_ok=True)


def _examples(
    source: Source, root: pathlib.Path, newest: Newest | None, job: Job, report: Report
) -> Iterator[Example]:
    for part in job.parts:
        for example in source.read(part, root, report):
            if newest is None or newest(part, example.id):
                yield example
            else:
                report.drop("revised or deleted later", example.id)


def _write(examples: Iterable[Example], folder: pathlib.Path, report: Report) -> int:
    writer = array_record_module.ArrayRecordWriter(
        os.fspath(folder / "records.array_record"), "group_size:32,zstd:1"
    )
    keys = bytearray()
    count = 0
    try:
        for example in examples:
            if not example.text.strip():
                report.drop("empty text", example.id)
                continue
            meta = dict(sorted(example.meta.items()))
            try:
                key = key_of(example.text)
                record = json.dumps([example.id, example.text, meta], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                report.drop("not valid Unicode", example.id)
                continue
            writer.write(record)
            keys += np.array(key, KEY).tobytes()
            count += 1
    finally:
        writer.close()
    np.save(folder / "keys.npy", np.frombuffer(keys, KEY))
    return count


def read_records(path: pathlib.Path, positions: np.ndarray) -> Iterator[tuple[str, str, dict]]:
    """(id, text, meta) of the records of a job at these ascending positions."""
    reader = array_record_module.ArrayRecordReader(
        os.fspath(path), options="readahead_buffer_size:0,max_parallelism:0"
    )
    try:
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
            for first in range(0, len(run), _AT_ONCE):
                some = run[first : first + _AT_ONCE]
                for record in reader.read(int(some[0]), int(some[-1]) + 1):
                    yield tuple(json.loads(record))
    finally:
        reader.close()
