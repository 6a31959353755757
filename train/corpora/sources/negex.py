"""NegEx: de-identified sentences from hospital reports, marked for negation, time and experiencer.

Layout: `rsAnnotations-1-120-random.txt`, 2,376 rows of fields separated by tabs, in one of two
forms. One has a header and 6 fields: line number, condition, sentence, negation, temporality,
experiencer. The other (in `genConText`) has no header and 7 fields: a remark comes second.

A document is a sentence. One with several conditions has several rows; 2,056 are distinct. The
table `Annotations-1-120-random.txt` has the same sentences and is not read.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, place
from ..readers.text import read_lines
from ..source import Example, Report, Source

# No row of the released files is "possible".
NEGATIONS = ("affirmed", "negated", "possible")


def annotations(path: pathlib.Path) -> Iterator[tuple[int, str, str, str]]:
    """Yields (line number, condition, sentence, negation in lower case) of each row.

    Quotes are text. Raises ValueError with the line for a row in another form than the first.
    """
    width = 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\n").split("\t")
        header = not width and not fields[0].strip().isdecimal()
        width = width or len(fields)
        if width not in (6, 7) or len(fields) != width:
            expected = width if width in (6, 7) else "6 or 7"
            raise ValueError(
                f"{path}, line {number}: expected {expected} fields between tabs, got {len(fields)}"
            )
        condition, sentence, negation = fields[-5:-2]
        if negation.strip().lower() in NEGATIONS:
            yield number, condition, sentence, negation.strip().lower()
        elif not (header and sentence.strip().lower() == "sentence"):
            raise ValueError(
                f"{path}, line {number}: expected one of {', '.join(NEGATIONS)} as the third field "
                "from the end, got another"
            )


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the sentence of each row."""
    for row, (_, _, sentence, _) in enumerate(annotations(part), start=1):
        yield from example(place(part, root, row), sentence, report)


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
