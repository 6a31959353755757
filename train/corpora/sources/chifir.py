"""CHIFIR: cytology and histopathology reports from Australia, annotated for fungal infections.

Layout: `chifir_metadata.csv` with 283 rows (patient_id, report_no, dataset, ...), and
`reports/pt{patient_id}_r{report_no}.txt` for each; the brat files in `annotations/` are not read.

A document is a report.
"""

from ..readers.formats import CREDENTIALED, HEALTH_DATA_LICENSE, text_file
from ..source import Source

SOURCE = Source(
    name="chifir",
    title="CHIFIR",
    homepage="https://physionet.org/content/corpus-fungal-infections/",
    access="credentialed",
    license=HEALTH_DATA_LICENSE,
    agreement=CREDENTIALED,
    citation="Rozova et al., Detecting evidence of invasive fungal infections in cytology and "
    "histopathology reports enriched with concept-level annotations, Journal of Biomedical "
    "Informatics, 2023",
    files=("reports/pt*_r*.txt",),
    read=text_file,
    documents=283,
    tokens=100_000,
)
