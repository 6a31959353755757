"""MedNLI: a sentence from a MIMIC-III note, and one by a physician that may follow from it.

Layout: `mli_{train,dev,test}_v1.jsonl`, 11,232 + 1,395 + 1,422 lines with pairID, gold_label,
sentence1 and sentence2 (and their parses). It comes as a .zip: unpack it.

A document is a pair, one sentence on each line. Each sentence1 occurs in three pairs, so there are
about 4,700 of those; the model card's 14,047 samples of 36 tokens can only be pairs.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import CREDENTIALED, example, objects, string
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the pair on each line: sentence1, newline, sentence2."""
    for at, record in objects(part, root, report):
        sentences = [string(record, name).strip() for name in ("sentence1", "sentence2")]
        if not all(sentences):
            report.drop("a sentence is missing", at)
            continue
        yield from example(at, "\n".join(sentences), report, pair=string(record, "pairID"))


SOURCE = Source(
    name="mednli",
    title="MedNLI",
    homepage="https://physionet.org/content/mednli/1.0.0/",
    access="credentialed",
    license="not stated",
    agreement=CREDENTIALED,
    citation="Romanov and Shivade, Lessons from natural language inference in the clinical domain, "
    "EMNLP, 2018",
    files=("mli_train_v1.jsonl", "mli_dev_v1.jsonl", "mli_test_v1.jsonl"),
    read=read,
    documents=14_047,
    tokens=500_000,
)
