"""MTSamples: sample reports of a transcription service, all specialties.

Layout: `mtsamples.csv`, 4,999 rows: an unnamed index, description, medical_specialty, sample_name,
transcription, keywords. Newlines were flattened to ",", and values keep blanks at both ends.

A document is the transcription. Many stand under two specialties: 2,357 are distinct and not empty
(the model card's 2,358 has one more, the empty one perhaps).
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the transcription."""
    for at, (specialty, text) in rows(part, root, report, ("medical_specialty", "transcription")):
        yield from example(at, text, report, specialty=specialty.strip())


SOURCE = Source(
    name="mtsamples",
    title="MTSamples",
    homepage="https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions",
    access="open",
    license="CC0",
    citation="mtsamples.com, collected by T. Boyle on Kaggle",
    files=("mtsamples.csv",),
    read=read,
    documents=2_358,
    tokens=1_700_000,
)
