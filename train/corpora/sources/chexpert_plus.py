"""CheXpert Plus: chest X-rays from Stanford with their reports, complete and by section.

Layout: `df_chexpert_plus_240401.csv`, one row for each image, 223,462 rows of 27 columns, newlines
in quoted fields; some copies begin with an unnamed index column.

A document is the column `report`. A study with a frontal and a lateral image has its report twice.
The model card counts such repeats: 223,460 samples, against 187,711 reports in the paper, which is
about what remains without them.
"""

from ..readers.formats import table
from ..source import Source

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
    read=table("report", split="split"),
    documents=223_460,
    tokens=60_600_000,
)
