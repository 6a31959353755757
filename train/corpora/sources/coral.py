"""CORAL: progress notes on breast and pancreatic cancer.

Layout: `annotated/{breastca,pdac}/*.txt`, 20 + 20 notes, each with a brat `.ann` file, which is
not read; `unannotated/data/{breastca,pdac}_unannotated.csv`, 100 + 100 rows, with coral_idx and
note_text.

A document is a note.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import CREDENTIALED, HEALTH_DATA_LICENSE, example, place, rows, whole_text
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the text of a .txt file, or of each row of a .csv file."""
    if part.suffix == ".txt":
        yield from example(place(part, root, 1), whole_text(part), report)
        return
    for at, (text,) in rows(part, root, report, ("note_text",)):
        yield from example(at, text, report)


SOURCE = Source(
    name="coral",
    title="CORAL",
    homepage="https://physionet.org/content/curated-oncology-reports/1.0/",
    access="credentialed",
    license=HEALTH_DATA_LICENSE,
    agreement=CREDENTIALED,
    citation="Sushil et al., Extracting detailed oncologic history and treatment plan from medical "
    "oncology notes with large language models, arXiv 2308.03853, 2023",
    files=(
        "annotated/breastca/*.txt",
        "annotated/pdac/*.txt",
        "breastca_unannotated.csv",
        "pdac_unannotated.csv",
    ),
    read=read,
    documents=240,
    tokens=700_000,
)
