"""Brain MRI Stroke: reports of brain MRI, labeled acute ischemic stroke or not, from Korea.

Very likely the supplement of Kim et al. 2019. Its file name and columns are unknown: save it as CSV
or TSV, alone in a folder. A document is the text column: --text-column, or the first of
text, report, ... (TEXT_COLUMNS of text.py).

The paper has 3,204 reports, the model card 2,603, probably without repeats.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..readers.text import TEXT_COLUMNS
from ..source import Example, Report, Source


def read(
    part: pathlib.Path, root: pathlib.Path, report: Report, column: str = ""
) -> Iterator[Example]:
    """Yields the report of each row. column: the text column; "": the first of TEXT_COLUMNS."""
    delimiter = "\t" if ".tsv" in part.name.lower() else ","
    wanted = (column,) if column else TEXT_COLUMNS
    hint = "name the text column with --text-column"
    for at, (text,) in rows(part, root, report, (wanted,), delimiter, hint):
        yield from example(at, text, report)


def with_column(column: str) -> Source:
    """The source with another text column."""
    return dataclasses.replace(SOURCE, read=functools.partial(read, column=column))


SOURCE = Source(
    name="brain_mri_stroke",
    title="Brain MRI Stroke",
    homepage="https://doi.org/10.1371/journal.pone.0212778",
    access="open",
    license="not stated",
    citation="Kim et al., Natural language processing and machine learning algorithm to identify "
    "brain MRI reports with acute ischemic stroke, PLOS ONE, 2019",
    files=("*.csv", "*.csv.gz", "*.tsv", "*.tsv.gz"),
    read=read,
    documents=2_603,
    tokens=200_000,
)
