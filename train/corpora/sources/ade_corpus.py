"""ADE Corpus V2: sentences from MEDLINE case reports, with and without an adverse drug effect.

Layout: `DRUG-AE.rel`, 6,821 lines, 8 fields divided by `|` (PMID, sentence, effect, its start and
end, drug, its start and end); `ADE-NEG.txt`, 16,695 lines `PMID NEG sentence`.

A document is a sentence. DRUG-AE.rel has a line for each of its relations; without repeats there
are 4,271 + 16,625 = 20,896, as in the model card. That sum includes no sentence of `DRUG-DOSE.rel`
(279 lines), which is not read.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, place
from ..readers.text import read_lines
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the sentence of each line."""
    split = _related if part.suffix == ".rel" else _negative
    for number, line in enumerate(read_lines(part), start=1):
        if not line.strip():
            continue
        at = place(part, root, number)
        fields = split(line)
        if fields is None:
            report.drop("unexpected fields", at)
        else:
            yield from example(at, fields[1], report, pmid=fields[0])


def _related(line: str) -> tuple[str, str] | None:
    # Split from both ends, since the sentence may contain "|".
    fields = line.split("|")
    return (fields[0], "|".join(fields[1:-6])) if len(fields) >= 8 else None


def _negative(line: str) -> tuple[str, str] | None:
    fields = line.split(" ", 2)
    return (fields[0], fields[2]) if len(fields) == 3 and fields[1] == "NEG" else None


SOURCE = Source(
    name="ade_corpus",
    title="ADE Corpus V2",
    homepage="https://doi.org/10.1016/j.jbi.2012.04.008",
    access="open",
    license="not stated",
    citation="Gurulingappa et al., Development of a benchmark corpus to support the automatic "
    "extraction of drug-related adverse effects from medical case reports, Journal of Biomedical "
    "Informatics, 2012",
    files=("DRUG-AE.rel", "ADE-NEG.txt"),
    read=read,
    documents=20_896,
    tokens=500_000,
)
