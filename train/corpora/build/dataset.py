"""Builds a source as a TFDS data set: read, deduplicated, split by hash, in ArrayRecord shards.

An example is {id, text, source, meta}, all text; meta is a JSON object of short facts whose names
differ from source to source. Neither building nor reading needs TensorFlow:

    builder = CorpusBuilder(source, data_dir="text")
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False),
    )
    tfds.builder_from_directory("text/mtsamples/1.0.1").as_data_source(split="train")

Each shard is written on its own (tfds.core.ShardBasedBuilder), which keeps memory constant: TFDS's
shuffling writer holds 1 GB and needs TensorFlow beyond that. Documents keep the order of the files;
training shuffles them. The folder `work` holds intermediate records, as large as the text.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from ...tokens.store import SPLITS
from ..source import Source
from .dedupe import first_of_each, is_eval
from .reading import Job, plan_jobs, read_all, read_records, times_of
from .revisions import resolve

SHARD_BYTES = 256 << 20  # of text
VERSION = "1.0.1"  # of the documents; changing it makes every corpus be read again
Shard = Callable[[], Iterator[tuple[str, dict[str, str]]]]


class SameBytes(writer.ExampleWriter):
    """Writes an example's features sorted by name; protobuf's own order changes between runs."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes a shard."""
        parse: Any = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
        return super().write(
            path, ((key, parse(one).SerializeToString(deterministic=True)) for key, one in examples)
        )


def info_of(builder: Any, source: Source, **more: Any) -> tfds.core.DatasetInfo:
    """TFDS's description of a source: terms, citation and the four text features."""
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
        builder=builder,
        description=source.title,
        homepage=source.homepage,
        citation=source.citation,
        license=source.license,
        features=tfds.features.FeaturesDict(
            {"id": text(), "text": text(), "source": text(), "meta": text()}
        ),
        **more,
    )


class CorpusBuilder(tfds.core.ShardBasedBuilder):
    """The TFDS builder for any source. The source's folder is `root`, or else TFDS's manual_dir.

    eval_fraction: share of documents in the evaluation split, by a hash of their text. work: folder
    that lets a killed run resume. workers: number of processes that read. After the build, `counts`
    holds what was read, dropped and kept.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos = None  # nothing is downloaded; without this TFDS looks for checksums

    def __init__(
        self,
        source: Source,
        data_dir: str | pathlib.Path,
        *,
        root: pathlib.Path | None = None,
        eval_fraction: float = 0.005,
        work: pathlib.Path | None = None,
        workers: int = 1,
    ):
        self.name = source.name  # pyright: ignore[reportAttributeAccessIssue]  (as TFDS does it)
        self.source, self.root, self.work = source, root, work
        self.eval_fraction, self.workers = eval_fraction, workers
        self.counts: dict[str, Any] = {}
        self.MANUAL_DOWNLOAD_INSTRUCTIONS = (
            f"{source.availability}; expected files: {' or '.join(source.files)}"
        )
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return info_of(self, self.source, disable_shuffling=True)

    def _example_writer(self) -> writer.ExampleWriter:
        assert self.info.file_format
        return SameBytes(self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Shard]]:
        root = self.root or pathlib.Path(dl_manager.manual_dir)
        if self.work is None:
            self.work = pathlib.Path(tempfile.mkdtemp(prefix="work-", dir=self.data_dir_root))
        parts, newest = self.source.parts(root), None
        version = VERSION + json.dumps(read_options(self.source))
        if self.source.revisions:
            newest = resolve(self.source.revisions, parts, self.work / "revisions", self.workers)
            version += newest.fingerprint
        if self.source.beside:
            version += times_of(self.source.files_read(root), root)
        jobs = plan_jobs(self.source, root, parts, self.work, version)
        self.counts = read_all(self.source, root, jobs, newest, self.workers)
        self.counts["read_seconds"] = round(self.counts.pop("seconds"), 2)
        shards, counts = plan_shards(self.name, jobs, self.eval_fraction)
        self.counts |= counts
        if not shards.get("train"):
            raise ValueError(
                f"{self.name}: expected documents to train on below {root}, found "
                f"{counts['documents']} in all; {self.counts['read']} were read, dropped: "
                f"{self.counts['dropped']}"
            )
        return shards


def read_options(source: Source) -> dict[str, str]:
    """The user's options for reading a source, such as its text_column."""
    return {name: str(value) for name, value in getattr(source.read, "keywords", {}).items()}


def plan_shards(
    name: str, jobs: Sequence[Job], eval_fraction: float
) -> tuple[dict[str, list[Shard]], dict[str, Any]]:
    """Assigns documents to shards after deduplication; returns their readers by split, and counts.

    A split without documents is left out. Writes `plan.npy` next to each job's records.
    """
    masks = first_of_each([job.keys for job in jobs])
    starts = dict.fromkeys(SPLITS, 0)  # bytes of text before the job
    found: dict[str, dict[int, list[Job]]] = {split: {} for split in SPLITS}
    counts: dict[str, Any] = {"documents": 0, "duplicates": 0, "text_bytes": 0}
    counts |= dict.fromkeys(SPLITS, 0)
    for job, first in zip(jobs, masks, strict=True):
        keys = np.load(job.keys)
        in_eval = is_eval(keys["high"], eval_fraction)
        plan = np.full(len(keys), -1, np.int32)
        for number, split in enumerate(SPLITS):
            positions = np.flatnonzero(first & (in_eval == (split == "eval")))
            sizes = keys["size"][positions].astype(np.int64)
            shard = (starts[split] + np.cumsum(sizes) - sizes) // SHARD_BYTES
            plan[positions] = len(SPLITS) * shard + number
            for shard_number in np.unique(shard).tolist():
                found[split].setdefault(shard_number, []).append(job)
            starts[split] += int(sizes.sum())
            counts[split] += len(positions)
        np.save(job.folder / "plan.npy", plan)
        counts["duplicates"] += int((~first).sum())
    counts["documents"] = sum(counts[split] for split in SPLITS)
    counts["text_bytes"] = sum(starts.values())
    shards: dict[str, list[Shard]] = {
        split: [
            functools.partial(_examples, name, tuple(of), len(SPLITS) * shard + number)
            for shard, of in sorted(found[split].items())
        ]
        for number, split in enumerate(SPLITS)
        if found[split]
    }
    return shards, counts


def _examples(name: str, jobs: tuple[Job, ...], code: int) -> Iterator[tuple[str, dict[str, str]]]:
    for job in jobs:
        positions = np.flatnonzero(np.load(job.folder / "plan.npy") == code)
        for key, text, meta in read_records(job.records, positions):
            fields = {"id": key, "text": text, "source": name}
            example = fields | {"meta": json.dumps(meta, ensure_ascii=False)}
            yield key, example
            # TFDS keeps a reference until the shard is done, but does not need the content.
            example.clear()


def build(
    source: Source,
    root: pathlib.Path,
    out: pathlib.Path,
    work: pathlib.Path,
    eval_fraction: float,
    workers: int = 1,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Builds the data set below `out`; returns its folder and counts."""
    builder = CorpusBuilder(
        source, out, root=root, eval_fraction=eval_fraction, work=work, workers=workers
    )
    builder.download_and_prepare(
        download_dir=work / "downloads",
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=root, try_download_gcs=False),
    )
    return pathlib.Path(builder.data_dir), builder.counts
