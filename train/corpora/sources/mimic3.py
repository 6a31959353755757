"""MIMIC-III 1.4: notes of all kinds from the intensive care units of one hospital.

Layout: `NOTEEVENTS.csv.gz` (or unpacked), about 2.08 million rows with ROW_ID, SUBJECT_ID, HADM_ID,
CHARTDATE, CHARTTIME, STORETIME, CATEGORY, DESCRIPTION, CGID, ISERROR, TEXT; each text is quoted and
has newlines; `[**...**]` replaces what identified a person.

A document is TEXT, masks included, of each note that its author did not mark as an error
(ISERROR 1).
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import CREDENTIALED, HEALTH_DATA_LICENSE, example, rows
from ..source import Example, Report, Source

_COLUMNS = ("ROW_ID", "CATEGORY", "ISERROR", "TEXT")


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields each note. meta: its ROW_ID and category."""
    for at, (row, category, error, text) in rows(part, root, report, _COLUMNS):
        # pandas writes "1.0".
        if error.strip() in ("1", "1.0"):
            report.drop("marked as an error (ISERROR)", at)
            continue
        yield from example(at, text, report, row=row, category=category.strip())


SOURCE = Source(
    name="mimic3",
    title="MIMIC-III",
    homepage="https://physionet.org/content/mimiciii/1.4/",
    access="credentialed",
    license=HEALTH_DATA_LICENSE,
    agreement=CREDENTIALED,
    citation="Johnson et al., MIMIC-III, a freely accessible critical care database, Scientific "
    "Data, 2016",
    files=("NOTEEVENTS.csv", "NOTEEVENTS.csv.gz"),
    read=read,
    documents=2_021_411,
    tokens=1_047_700_000,
)
