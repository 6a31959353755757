"""PriMock57: 57 mock primary care consultations, as transcripts and the notes written from them.

Layout: `notes/dayN_consultationNN.json` (day, consultation, presenting_complaint, note,
highlights); `transcripts/dayN_consultationNN_{doctor,patient}.TextGrid`, one tier each, where an
interval without text is silence and `<UNSURE>..</UNSURE>`, `<UNIN/>` and `<INAUDIBLE_SPEECH/>` mark
what was hard to hear.

A document is a note: 57 notes of 229 tokens make the 0.01M of the model card. DIALOGUE is a
separate source of the transcripts: both speakers by time, without the marks.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

from ..readers.formats import example, intervals, place, string, whole_object
from ..source import Example, Report, Source

# A mark for missing words is removed with the space before it: ", <UNIN/>," leaves no " ,".
_MARK = re.compile(r"</?[A-Z_]+>|\s*<[A-Z_]+/>")


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the note in a file."""
    text = string(whole_object(part), "note")
    yield from example(place(part, root, 1), text, report, consultation=part.stem)


def read_dialogue(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the lines "Doctor: ..." and "Patient: ..." of a doctor's TextGrid, in order."""
    consultation = part.stem.removesuffix("_doctor")
    patient = part.with_name(f"{consultation}_patient.TextGrid")
    at = place(part, root, 1)
    if not patient.is_file():
        report.drop("no transcript of the patient", at)
        return
    turns = [
        (start, speaker, " ".join(_MARK.sub("", text).split()).lstrip(" ,.?"))
        for speaker, path in (("Doctor", part), ("Patient", patient))
        for start, text in intervals(path)
    ]
    lines = [f"{speaker}: {said}" for _, speaker, said in sorted(turns) if said]
    yield from example(at, "\n".join(lines), report, consultation=consultation)


SOURCE = Source(
    name="primock57",
    title="PriMock57",
    homepage="https://github.com/babylonhealth/primock57",
    access="open",
    license="CC BY 4.0",
    citation="Papadopoulos Korfiatis et al., PriMock57: a dataset of primary care mock "
    "consultations, ACL, 2022",
    files=("notes/day*_consultation*.json",),
    read=read,
    documents=57,
    tokens=10_000,
)
DIALOGUE = dataclasses.replace(
    SOURCE,
    name="primock57_dialogue",
    title="PriMock57, transcripts",
    files=("transcripts/day*_consultation*_doctor.TextGrid",),
    read=read_dialogue,
    beside=("transcripts/day*_consultation*_patient.TextGrid",),
    tokens=0,
)
