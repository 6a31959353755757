"""Q-Pain: vignettes of patients in pain, with a question on treatment, the answer and its reason.

Layout: `data_{acute_cancer,acute_non_cancer,chronic_cancer,chronic_non_cancer,post_op}.csv`, 11
rows each: Vignette, Question, Answer, Dosage, Explanation, with the placeholders [race], [gender],
[possessive] and [subject].

A document is the vignette, question, answer and explanation, each on a line, placeholders included:
55. The model card counts 51 for an unknown reason.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, rows
from ..source import Example, Report, Source

_COLUMNS = ("Vignette", "Question", "Answer", "Explanation")


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields each row; an empty field has no line."""
    for at, fields in rows(part, root, report, _COLUMNS):
        text = "\n".join(field.strip() for field in fields if field.strip())
        yield from example(at, text, report, context=part.stem.removeprefix("data_"))


SOURCE = Source(
    name="qpain",
    title="Q-Pain",
    homepage="https://physionet.org/content/q-pain/1.0.0/",
    access="open",
    license="CC BY-SA 4.0",
    citation="Logé et al., Q-Pain: a question answering dataset to measure social bias in pain "
    "management, arXiv 2108.01764, 2021",
    files=tuple(
        f"data_{context}.csv"
        for context in (
            "acute_cancer",
            "acute_non_cancer",
            "chronic_cancer",
            "chronic_non_cancer",
            "post_op",
        )
    ),
    read=read,
    documents=51,
    tokens=10_000,
)
