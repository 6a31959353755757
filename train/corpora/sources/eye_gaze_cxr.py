"""Eye Gaze CXR: what a radiologist dictated while reading 1,083 chest X-rays from MIMIC-CXR.

Layout: `audio_segmentation_transcripts/<dicom_id>/transcript.json`, next to audio and masks: an
object with full_text (string) and time_stamped_text (list of phrases with times).

A document is full_text. The model card counts 892: many short dictations are identical.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import CREDENTIALED, example, place, string, whole_object
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the dictation in a transcript.json."""
    text = string(whole_object(part), "full_text")
    yield from example(place(part, root, 1), text, report, dicom=part.parent.name)


SOURCE = Source(
    name="eye_gaze_cxr",
    title="Eye Gaze CXR",
    homepage="https://physionet.org/content/egd-cxr/1.0.0/",
    access="credentialed",
    license="not stated",
    agreement=CREDENTIALED,
    citation="Karargyris et al., Creation and validation of a chest X-ray dataset with "
    "eye-tracking and report dictation for AI development, Scientific Data, 2021",
    files=("audio_segmentation_transcripts/*/transcript.json",),
    read=read,
    documents=892,
    tokens=30_000,
)
