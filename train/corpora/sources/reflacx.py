"""REFLACX: what five radiologists dictated on chest X-rays from MIMIC-CXR, with their gaze.

Layout: `main_data/metadata_phase_{1,2,3}.csv` (id, eye_tracking_data_discarded, dicom_id, ...) and
for each case `main_data/<id>/transcription.txt` next to its other files; a discarded case has no
transcription.

A document is a transcription. The tables lead to the files, so that missing ones are counted.
"""

import pathlib
import re
from collections.abc import Iterator

from ..readers.formats import example, rows, whole_text
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the transcription of each row of the metadata."""
    for at, (case,) in rows(part, root, report, ("id",)):
        case = case.strip()
        # The id becomes part of a path, so it must be a plain name.
        path = part.parent / case / "transcription.txt"
        if not re.fullmatch(r"\w+", case) or not path.is_file():
            report.drop("no transcription", at)
            continue
        try:
            text = whole_text(path)
        except ValueError:
            report.drop("broken transcription", at)
            continue
        yield from example(at, text, report, case=case)


SOURCE = Source(
    name="reflacx",
    title="REFLACX",
    homepage="https://physionet.org/content/reflacx-xray-localization/1.0.0/",
    access="restricted",
    license="not stated",
    agreement="a PhysioNet account and the signed data use agreement",
    citation="Bigolin Lanfredi et al., REFLACX, a dataset of reports and eye-tracking data for "
    "localization of abnormalities in chest x-rays, Scientific Data, 2022",
    files=tuple(f"metadata_phase_{phase}.csv" for phase in (1, 2, 3)),
    read=read,
    beside=("transcription.txt",),
    documents=2_543,
    tokens=100_000,
)
