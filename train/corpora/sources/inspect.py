"""INSPECT: the impressions of CT reports on pulmonary embolism; no other section is public.

Layout: `Final_Impressions.csv` with impression_id and impressions, de-identified with tags such as
`<date>` and `<time>`; other tables have labels, splits and images.

A document is an impression.
"""

from ..readers.formats import table
from ..source import Source

SOURCE = Source(
    name="inspect",
    title="INSPECT",
    homepage="https://inspect.stanford.edu",
    access="login",
    license="not stated; non-commercial use under a data use agreement",
    agreement="an account there and Stanford's data use agreement",
    citation="Huang et al., INSPECT: a multimodal dataset for pulmonary embolism diagnosis and "
    "prognosis, arXiv 2311.10798, 2023",
    files=("Final_Impressions.csv", "Final_Impressions.csv.gz"),
    read=table("impressions", impression="impression_id"),
    documents=22_259,
    tokens=2_800_000,
)
