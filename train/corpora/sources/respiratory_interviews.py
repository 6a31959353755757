"""Simulated interviews of patients by physicians in training, most on respiratory complaints.

Layout: `Data/Clean Transcripts/{RES,MSK,GAS,CAR,DER,GEN}NNNN.txt`, 213 + 46 + 6 + 5 + 1 + 1 files:
turns `D: ` and `P: ` between blank lines, some lines without that mark; CRLF and LF mixed in one
file; ASCII, UTF-8, and two files in UTF-16. It comes as a .zip: unpack it.

A document is an interview, unchanged.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, place, whole_text
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the interview in a file."""
    yield from example(place(part, root, 1), whole_text(part), report, specialty=part.name[:3])


SOURCE = Source(
    name="respiratory_interviews",
    title="Simulated respiratory interviews",
    homepage="https://doi.org/10.6084/m9.figshare.16550013",
    access="open",
    license="CC BY 4.0",
    citation="Fareez et al., A dataset of simulated patient-physician medical interviews with a "
    "focus on respiratory cases, Scientific Data, 2022",
    files=tuple(
        f"{specialty}[0-9][0-9][0-9][0-9].txt"
        for specialty in ("RES", "MSK", "GAS", "CAR", "DER", "GEN")
    ),
    read=read,
    documents=272,
    tokens=600_000,
)
