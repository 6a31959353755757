"""Gout Chief Complaints: what triage nurses of an emergency department wrote down.

Layout: `GOUT-CC-2019-CORPUS-REDACTED.csv` (300 rows) and `GOUT-CC-2020-CORPUS-REDACTED.csv` (8,037
rows), each with a `-SYNTHETIC` twin: Chief Complaint, Predict, Consensus; doubled quotes in the
texts. The redacted ones have tags such as `<<TIME>>`, their twins made-up values in those places.

A document is a complaint. All four files are read: 8,337 redacted rows cannot give the 8,429
documents of the model card, but with the twins of those that have a tag they may. A twin without a
tag is the same text, and goes with the repeats.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the chief complaint."""
    for at, (text,) in rows(part, root, report, ("Chief Complaint",)):
        yield from example(at, text, report)


SOURCE = Source(
    name="gout",
    title="Gout Emergency Department Chief Complaint Corpora",
    homepage="https://physionet.org/content/emer-complaint-gout/1.0/",
    access="restricted",
    license="not stated",
    agreement="a PhysioNet account and the signed data use agreement",
    citation="Osborne et al., Identification of gout flares in chief complaint text using natural "
    "language processing, AMIA Annual Symposium Proceedings, 2020",
    files=("GOUT-CC-*-CORPUS-REDACTED.csv", "GOUT-CC-*-CORPUS-SYNTHETIC.csv"),
    read=read,
    documents=8_429,
    tokens=200_000,
)
