"""MIMIC-IV-Note 2.2: discharge summaries and radiology reports from one hospital.

Layout: `note/discharge.csv.gz` and `note/radiology.csv.gz` (or unpacked): note_id, subject_id,
hadm_id, note_type, note_seq, charttime, storetime, text; newlines in quoted fields; `___` replaces
what identified a person. The `*_detail.csv.gz` are not read.

A document is a note, masks included. meta has its note_id and type (DS, RR, ...).
"""

from ..readers.formats import CREDENTIALED, HEALTH_DATA_LICENSE, table
from ..source import Source

SOURCE = Source(
    name="mimic4_note",
    title="MIMIC-IV-Note",
    homepage="https://physionet.org/content/mimic-iv-note/2.2/",
    access="credentialed",
    license=HEALTH_DATA_LICENSE,
    agreement=CREDENTIALED,
    citation="Johnson et al., MIMIC-IV-Note: deidentified free-text clinical notes, PhysioNet, "
    "2023",
    files=tuple(
        f"{kind}.csv{packed}" for kind in ("discharge", "radiology") for packed in ("", ".gz")
    ),
    read=table("text", note="note_id", type="note_type"),
    documents=2_631_243,
    tokens=1_765_700_000,
)
