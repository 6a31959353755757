"""NegEx: de-identified sentences of hospital reports, marked for negation, time and experiencer.

Layout: `rsAnnotations-1-120-random.txt`, a header and 2,376 rows parted by tabs: line number,
Condition, sentence, negation, temporality, experiencer.

A document is a sentence. One with several conditions has several rows; 2,056 are distinct. The
table `Annotations-1-120-random.txt` has the same sentences and is not read.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the sentence."""
    for at, (text,) in rows(part, root, report, ("sentence",), delimiter="\t"):
        yield from example(at, text, report)


SOURCE = Source(
    name="negex",
    title="NegEx test set",
    homepage="https://github.com/chapmanbe/negex",
    access="open",
    license="Apache-2.0",
    citation="Chapman et al., A simple algorithm for identifying negated findings and diseases in "
    "discharge summaries, Journal of Biomedical Informatics, 2001",
    files=("rsAnnotations-1-120-random.txt",),
    read=read,
    documents=2_056,
    tokens=100_000,
)
