"""CheXpert Plus: chest X-rays of Stanford with their reports, the sections and the whole.

Layout: `df_chexpert_plus_240401.csv`, a row an image, 223,462 rows of 27 columns, newlines in
quoted fields; some copies begin with an unnamed index column.

A document is the column `report`. A study with a frontal and a lateral image has its report twice.
The model card counts such repeats: 223,460 samples, against 187,711 reports in the paper, which is
about what is left without them.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a row: the whole report."""
    for at, (text, split) in rows(part, root, report, ("report", "split")):
        yield from example(at, text, report, split=split)


SOURCE = Source(
    name="chexpert_plus",
    title="CheXpert Plus",
    homepage="https://stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1",
    access="login",
    license="Stanford research use agreement",
    agreement="an account there and Stanford's research use agreement",
    citation="Chambon et al., CheXpert Plus: augmenting a large chest X-ray dataset with text "
    "radiology reports, patient demographics and additional image formats, arXiv 2405.19538, 2024",
    files=("df_chexpert_plus_*.csv", "df_chexpert_plus_*.csv.gz"),
    read=read,
    documents=223_460,
    tokens=60_600_000,
)
