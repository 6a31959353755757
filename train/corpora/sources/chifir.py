"""CHIFIR: cytology and histopathology reports of Australia, annotated for fungal infections.

Layout: `chifir_metadata.csv` with 283 rows (patient_id, report_no, dataset, ...) and for each
`reports/pt{patient_id}_r{report_no}.txt`; the brat files in `annotations/` are not read.

A document is a report.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import CREDENTIALED, HEALTH_DATA_LICENSE, example, place, whole_text
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a file."""
    yield from example(place(part, root, 1), whole_text(part), report)


SOURCE = Source(
    name="chifir",
    title="CHIFIR",
    homepage="https://physionet.org/content/corpus-fungal-infections/",
    access="credentialed",
    license=HEALTH_DATA_LICENSE,
    agreement=CREDENTIALED,
    citation="Rozova et al., Detecting evidence of invasive fungal infections in cytology and "
    "histopathology reports enriched with concept-level annotations, Journal of Biomedical "
    "Informatics, 2023",
    files=("reports/pt*_r*.txt",),
    read=read,
    documents=283,
    tokens=100_000,
)
