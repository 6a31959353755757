"""Extractive question answering from your own files, in SQuAD's form.

Files are named and split as those of `files`. A .json file holds {"data": [{"paragraphs":
[{"context", "qas": [{"question", "answers": [{"text", "answer_start"}]}]}]}]}, a .jsonl file lines
of {"question", "context", "answer", "answer_start"}. The first answer of a question is the target,
and all count as correct. A question without an answer is skipped and counted, and so is an answer
that is not at its answer_start. Offsets count characters, or UTF-16 units if more answers of a file
are there.
"""

import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...corpora.readers.formats import whole_object
from ...corpora.readers.text import read_objects
from ...corpora.source import name_of
from .files import read_splits
from .task import Data, Example, Task


def load(path: pathlib.Path) -> Data:
    """The questions of a folder or file. Raises FileNotFoundError or ValueError with one line."""
    skipped: Counter[str] = Counter()
    splits = read_splits(path, (".json", ".jsonl"), lambda file: _read(file, skipped))
    for name, examples in zip(("train", "validation", "test"), splits, strict=True):
        if not examples:
            raise ValueError(f"{path}: no question with an answer in {name}")
    return Data((), *splits, skipped=dict(skipped))


def _read(path: pathlib.Path, skipped: Counter[str]) -> list[Example]:
    answered = []
    for place, question, context, answer, start, others in _records(path):
        if not all(isinstance(x, str) for x in (question, context)):
            raise ValueError(f"{place}: expected question and context, both text")
        if not isinstance(answer, str) or not answer:
            skipped["questions without an answer"] += 1
        elif type(start) is not int or start < 0:
            raise ValueError(f"{place}: expected answer_start, a number from 0 on")
        else:
            answered.append((question, context, answer, start, others))

    def located(units: bool) -> list[Example]:
        found = []
        for question, context, answer, start, others in answered:
            if units:  # as JavaScript counts: a character beyond U+FFFF, such as an emoji, is two
                before = context.encode("utf-16-le")[: 2 * start]
                start = len(before.decode("utf-16-le", "replace"))
            end = start + len(answer)
            if context[start:end] == answer:
                label = start, end
                found.append(Example(question, context, label=label, other_answers=others))
        return found

    found = max(located(units=False), located(units=True), key=len)
    if len(found) < len(answered):
        reason = f"answers that are not at answer_start, in {name_of(pathlib.Path(path.name))}"
        skipped[reason] += len(answered) - len(found)
    return found


def _records(path: pathlib.Path) -> Iterator[tuple[str, Any, Any, Any, Any, tuple[str, ...]]]:
    """(where it is, question, context, answer, offset of the answer, other answers)."""
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        for number, r in read_objects(path):
            place = f"{path}, line {number}"
            if "answer" not in r and "answers" in r:
                raise ValueError(f"{place}: expected answer and answer_start, got answers")
            question, context, answer = (r.get(k) for k in ("question", "context", "answer"))
            yield place, question, context, answer, r.get("answer_start"), ()
        return
    content = whole_object(path)
    try:
        for a, article in enumerate(content["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q in paragraph["qas"]:
                    first, *others = q.get("answers") or [{}]
                    yield (
                        f"{path}, article {a}, paragraph {p}", q["question"],
                        paragraph["context"], first.get("text"), first.get("answer_start"),
                        tuple(str(other["text"]) for other in others),
                    )  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: expected JSON in SQuAD's form (data, paragraphs, qas)") from None


TASK = Task(
    "qa", "Extractive questions", "qa", "f1", "", load,
    files="SQuAD's .json, or .jsonl lines",
    example='{"question": "Who?", "context": "Mary ran.", "answer": "Mary", "answer_start": 0}',
)  # fmt: skip
