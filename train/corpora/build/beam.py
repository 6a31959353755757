"""Builds a source with TFDS on an Apache Beam runner, on any number of machines.

It uses the same Source.read as CorpusBuilder. What needs all documents at once (revisions,
duplicates) is a GroupByKey here. The documents and splits are those of CorpusBuilder; their order
differs, since TFDS orders the output of Beam by a hash of the key.

    python -m train prepare --corpus pubmed --source ROOT --out OUT --tokenizer T --beam OPTIONS

The machines share nothing: ROOT and OUT may be buckets (gs://...; `pip install apache-beam[gcp]
gcsfs`), and a part is copied to the worker that reads it. Each machine needs this package in its
image. Beam's options are given without their leading dashes. On Dataflow:

    python -m train prepare --corpus pubmed --source gs://B/pubmed --out gs://B/out --tokenizer T \\
        --beam runner=DataflowRunner project=P region=us-central1 temp_location=gs://B/tmp \\
        sdk_container_image=REGION-docker.pkg.dev/P/R/modernbert_jax max_num_workers=100

On Spark, through its job server, with folders that all machines see (Flink: runner=FlinkRunner
flink_master=HOST:8081):

    docker run --net=host apache/beam_spark3_job_server --spark-master-url=spark://HOST:7077
    python -m train prepare --corpus pmc --source /shared/pmc --out /shared/out --tokenizer T \\
        --beam runner=PortableRunner job_endpoint=HOST:8099 environment_type=DOCKER \\
        environment_config=REGISTRY/modernbert_jax

In two local processes: runner=DirectRunner direct_num_workers=2
direct_running_mode=multi_processing.
"""

import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.pvalue import TaggedOutput

from ...tokens.store import SPLITS
from ..source import Report, Source
from .dataset import VERSION, info_of
from .dedupe import is_eval, key_of

_SUPERSEDED = "revised or deleted later"


class Part(NamedTuple):
    """A file of a source. place: its rank by name, which decides between duplicates. age: its rank
    among revisions, old before new."""

    place: int
    age: int
    name: str


class Document(NamedTuple):
    """An example and its origin. The smallest Document is the first of those with equal text."""

    place: int
    number: int
    age: int
    id: str
    text: str
    meta: str  # JSON


def parts_of(source: Source, root: str) -> list[Part]:
    """The parts below a folder or bucket. Raises FileNotFoundError as Source.parts does."""
    if _is_remote(root):
        pattern = FileSystems.join(root, "**")
        found = FileSystems.match([pattern])[0].metadata_list
        paths = [pathlib.PurePosixPath(file.path[len(root) :].lstrip("/")) for file in found]
        names = [name.as_posix() for name in source.choose(paths, pathlib.PurePosixPath(root))]
    else:
        folder = pathlib.Path(root)
        names = [part.relative_to(folder).as_posix() for part in source.parts(folder)]
    ages = {name: 0 for name in names}
    if source.revisions:
        ordered = source.revisions.in_order([pathlib.Path(name) for name in names])
        ages = {part.as_posix(): number for number, part in enumerate(ordered)}
    return [Part(place, ages[name], name) for place, name in enumerate(names)]


def _is_remote(root: str) -> bool:
    return "://" in root


class _Local:
    """A part as a local file while it is read."""

    def __init__(self, root: str, name: str, copy: bool):
        self.root, self.name, self.folder = root, name, tempfile.mkdtemp() if copy else ""

    def __enter__(self) -> tuple[pathlib.Path, pathlib.Path]:
        if not self.folder:
            return pathlib.Path(self.root, self.name), pathlib.Path(self.root)
        for suffix in ("", ".md5"):
            remote = FileSystems.join(self.root, *f"{self.name}{suffix}".split("/"))
            if suffix and not FileSystems.exists(remote):
                continue
            local = pathlib.Path(self.folder, self.name + suffix)
            local.parent.mkdir(parents=True, exist_ok=True)
            packed = "application/octet-stream"
            with (
                FileSystems.open(remote, packed, "uncompressed") as source,
                local.open("wb") as file,
            ):
                shutil.copyfileobj(source, file, 1 << 20)
        return pathlib.Path(self.folder, self.name), pathlib.Path(self.folder)

    def __exit__(self, *_: object) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def read_part(source: Source, root: str, copy: bool, part: Part) -> Iterator[Any]:
    """Yields the Documents of a part; counts go to the output "counts"."""
    report = Report()
    number = 0
    with _Local(root, part.name, copy) as (path, folder):
        for number, example in enumerate(source.read(path, folder, report), start=1):
            meta = json.dumps(dict(sorted(example.meta.items())), ensure_ascii=False)
            yield Document(part.place, number, part.age, example.id, example.text, meta)
    yield TaggedOutput("counts", ("read", number + sum(report.dropped.values())))
    for reason, count in report.dropped.items():
        yield TaggedOutput("counts", (f"dropped: {reason}", count))


def scan_part(
    source: Source, root: str, copy: bool, part: Part
) -> Iterator[tuple[int, tuple[int, bool, int]]]:
    """Yields (id, (age, deleted, version)) for the records of a part."""
    assert source.revisions
    with _Local(root, part.name, copy) as (path, _):
        for number, version, deleted in source.revisions.scan(path).tolist():
            yield number, (part.age, deleted, version)


def newest(keyed: tuple[int, dict[str, Iterable[Any]]], source: Source) -> Iterator[Any]:
    """Yields the newest Document of an id, unless it was deleted."""
    assert source.revisions
    _, known = keyed
    alive: dict[int, int] = {}
    for age, deleted, version in sorted(known["scans"]):
        if deleted:
            alive.pop(version, None)
        else:
            alive[version] = age
    for document in known["documents"]:
        _, version = source.revisions.key(document.id)
        if alive and version == max(alive) and alive[version] == document.age:
            yield document
        else:
            yield TaggedOutput("counts", (f"dropped: {_SUPERSEDED}", 1))


def _fields(name: str, keyed: tuple[Any, Document]) -> tuple[str, dict[str, str]]:
    document = Document(*keyed[1])
    fields = {"id": document.id, "text": document.text, "source": name, "meta": document.meta}
    return document.id, fields


def _write_counts(path: str, counts: Sequence[tuple[str, int]]) -> None:
    with FileSystems.create(path) as file:
        file.write(json.dumps(dict(sorted(counts)), indent=2).encode() + b"\n")


class BeamCorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The TFDS builder for any source on Beam. It writes counts to `data_dir`/NAME.counts.json.

    eval_fraction: share of documents in the evaluation split, by a hash of their text. Parts are
    copied to the worker when `root` is a bucket. A broken file stops the pipeline, and so does a
    split without documents.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos = None

    def __init__(self, source: Source, root: str, data_dir: str, eval_fraction: float = 0.005):
        self.name = source.name  # pyright: ignore[reportAttributeAccessIssue]  (as TFDS does it)
        self.source, self.root, self.eval_fraction = source, root, eval_fraction
        self.counts_path = FileSystems.join(data_dir, f"{source.name}.counts.json")
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return info_of(self, self.source)

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        documents = self._documents(pipeline)
        return {split: self._generate_examples(documents, split) for split in SPLITS}

    def _documents(self, pipeline: Any) -> Any:
        """(dedupe.KEY, Document) for each distinct text."""
        source = self.source
        at = (source, self.root, _is_remote(self.root))
        parts = (
            pipeline
            | "parts" >> beam.Create(parts_of(source, self.root))
            | "spread" >> beam.Reshuffle()
        )
        read = parts | "read" >> beam.FlatMap(functools.partial(read_part, *at)).with_outputs(
            "counts", main="documents"
        )
        documents, counts = read.documents, [read.counts]
        if source.revisions:
            key = source.revisions.key
            known = {
                "scans": parts | "scan" >> beam.FlatMap(functools.partial(scan_part, *at)),
                "documents": documents | "by id" >> beam.Map(lambda d: (key(d.id)[0], d)),
            }
            chosen = (
                known
                | "known of an id" >> beam.CoGroupByKey()
                | "newest" >> beam.FlatMap(newest, source).with_outputs("counts", main="documents")
            )
            documents = chosen.documents
            counts.append(chosen.counts)
        distinct = (
            documents
            | "by text" >> beam.Map(lambda document: (key_of(document.text), document))
            | "first of equal texts" >> beam.CombinePerKey(min)
        )
        counts.append(distinct | "count documents" >> beam.Map(lambda _: ("documents", 1)))
        _ = (
            counts
            | "all counts" >> beam.Flatten()
            | "sums" >> beam.CombinePerKey(sum)
            | "list" >> beam.combiners.ToList()
            | "write counts" >> beam.Map(functools.partial(_write_counts, self.counts_path))
        )
        return distinct

    def _generate_examples(self, documents: Any, split: str) -> Any:
        fraction, wanted = self.eval_fraction, split == "eval"
        return (
            documents
            | f"{split} only" >> beam.Filter(lambda d: is_eval(d[0][0], fraction) == wanted)
            | f"{split} fields" >> beam.Map(functools.partial(_fields, self.name))
        )


def build(
    source: Source, root: str, out: str, options: Sequence[str], eval_fraction: float = 0.005
) -> tuple[str, dict[str, int]]:
    """Builds the data set below `out` on Beam; returns its folder, and counts by what they count.

    options: of the pipeline, ["--runner=DirectRunner"]. Raises FileNotFoundError if no part is
    found.
    """
    parts_of(source, root)  # reports missing files before a pipeline is made
    builder = BeamCorpusBuilder(source, root, out, eval_fraction)
    beam_options = PipelineOptions(list(options))
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(
            beam_runner=beam_options.view_as(StandardOptions).runner or "DirectRunner",
            beam_options=beam_options,
            try_download_gcs=False,
        ),
    )
    with FileSystems.open(builder.counts_path) as file:
        return str(builder.data_dir), json.loads(file.read())
