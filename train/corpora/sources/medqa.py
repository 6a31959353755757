"""MedQA: questions from the United States medical licensing examination, with five options each.

Layout: `data_clean/questions/US/US_qbank.jsonl` with 14,369 lines, 12,723 of which are also
split into train, dev and test.jsonl: question, answer, options {A to E}, meta_info, answer_idx. The
folder `4_options` repeats them and is not read.

A document is the question and its options, each on a line. The model card's 14,366 samples are the
complete bank without repeats. (Its 139 tokens per sample are closer to the question alone: 167
tokens in the test split, 211 with options.) Leave out test.jsonl and US_qbank.jsonl if a model will
be evaluated on this test split.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, objects, string
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the question on each line, then "A. ..." and the other options."""
    for at, record in objects(part, root, report):
        options = record.get("options")
        question = string(record, "question").strip()
        if not question or not isinstance(options, dict):
            report.drop("no question or no options", at)
            continue
        lines = [f"{letter}. {string(options, letter).strip()}" for letter in sorted(options)]
        yield from example(
            at, "\n".join([question, *lines]), report, step=string(record, "meta_info")
        )


SOURCE = Source(
    name="medqa",
    title="MedQA",
    homepage="https://github.com/jind11/MedQA",
    access="open",
    license="MIT",
    citation="Jin et al., What disease does this patient have? A large-scale open domain question "
    "answering dataset from medical exams, arXiv 2009.13081, 2020",
    files=("US/US_qbank.jsonl", "US/train.jsonl", "US/dev.jsonl", "US/test.jsonl"),
    read=read,
    documents=14_366,
    tokens=2_000_000,
)
