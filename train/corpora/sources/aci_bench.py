"""ACI-BENCH: played visits to a doctor, as transcripts and the notes written from them.

Layout: `data/challenge_data/{train,valid,clinicalnlp_taskB_test1,clinicalnlp_taskC_test2,
clef_taskC_test3}.csv` with dataset, encounter_id, dialogue, note: 67 + 20 + 40 + 40 + 40 rows,
newlines in quoted fields. `*_metadata.csv`, JSON twins and `src_experiment_data` are not read.

A document is a note: 207 notes of 632 tokens make the 0.1M of the model card; with the dialogues it
would be 0.45M. DIALOGUE has the transcripts, as a source of its own.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the note."""
    return _read(part, root, report, "note")


def read_dialogue(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the transcript, its turns marked [doctor] and [patient]."""
    return _read(part, root, report, "dialogue")


def _read(part: pathlib.Path, root: pathlib.Path, report: Report, column: str) -> Iterator[Example]:
    for at, (encounter, text) in rows(part, root, report, ("encounter_id", column)):
        yield from example(at, text, report, encounter=encounter)


SOURCE = Source(
    name="aci_bench",
    title="ACI-BENCH",
    homepage="https://github.com/wyim/aci-bench",
    access="open",
    license="CC BY 4.0",
    citation="Yim et al., ACI-BENCH: a novel ambient clinical intelligence dataset for "
    "benchmarking automatic visit note generation, Scientific Data, 2023",
    files=tuple(
        f"challenge_data/{split}.csv"
        for split in (
            "train",
            "valid",
            "clinicalnlp_taskB_test1",
            "clinicalnlp_taskC_test2",
            "clef_taskC_test3",
        )
    ),
    read=read,
    documents=207,
    tokens=100_000,
)
DIALOGUE = dataclasses.replace(
    SOURCE,
    name="aci_bench_dialogue",
    title="ACI-BENCH, transcripts",
    read=read_dialogue,
    tokens=0,
)
