"""Gout Chief Complaints: what triage nurses in an emergency department wrote down.

Layout: `GOUT-CC-2019-CORPUS-REDACTED.csv` (300 rows) and `GOUT-CC-2020-CORPUS-REDACTED.csv` (8,037
rows), each with a `-SYNTHETIC` twin: Chief Complaint, Predict, Consensus; doubled quotes in the
texts. The redacted files have tags such as `<<TIME>>`, their twins synthetic values instead.

A document is a complaint. All four files are read: 8,337 redacted rows are fewer than the 8,429
documents in the model card, but adding the twins of rows with a tag may explain them. A twin
without a tag is the same text and is removed as a duplicate.
"""

from ..readers.formats import table
from ..source import Source

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
    read=table("Chief Complaint"),
    documents=8_429,
    tokens=200_000,
)
