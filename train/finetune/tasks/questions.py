"""Extractive question answering from your own files, in SQuAD's form.

A folder holds train.json, validation.json (or dev.json) and test.json, or one file is split
70/15/15: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text",
"answer_start"}]}]}]}]}, or as .jsonl lines of {"question", "context", "answer", "answer_start"}. A
question without an answer is skipped and counted, and so is an answer that is not at its
answer_start.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...corpora.readers.text import read_objects
from .task import Data, Example, Task, three_ways

NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",)}


def load(path: pathlib.Path) -> Data:
    """The questions of a folder or file. Raises FileNotFoundError or ValueError with one line."""
    skipped: Counter[str] = Counter()
    if path.is_file():
        examples = _read(path, skipped)
        splits = [[examples[i] for i in rows] for rows in three_ways(len(examples))]
    else:
        files = {
            split: next(
                (f for n in names for s in (".json", ".jsonl") if (f := path / (n + s)).is_file()),
                None,
            )
            for split, names in NAMES.items()
        }
        missing = [split for split, file in files.items() if file is None]
        if missing:
            raise FileNotFoundError(
                f"{path}: expected {', '.join(f'{m}.json' for m in missing)} in SQuAD's "
                "form, found none; a single file is split 70/15/15"
            )
        splits = [_read(file, skipped) for file in files.values() if file]
    for name, examples in zip(NAMES, splits, strict=True):
        if not examples:
            raise ValueError(f"{path}: no question with an answer in {name}")
    return Data((), *splits, skipped=dict(skipped))


def _read(path: pathlib.Path, skipped: Counter[str]) -> list[Example]:
    out = []
    for place, question, context, answer, start in _records(path):
        if not all(isinstance(x, str) for x in (question, context)):
            raise ValueError(f"{place}: expected question and context, both text")
        if not isinstance(answer, str) or not answer:
            skipped["questions without an answer"] += 1
        elif not isinstance(start, int) or context[start : start + len(answer)] != answer:
            skipped["answers that are not at answer_start"] += 1
        else:
            out.append(Example(question, context, label=(start, start + len(answer))))
    return out


def _records(path: pathlib.Path) -> Iterator[tuple[str, Any, Any, Any, Any]]:
    """(where it is, question, context, answer, offset of the answer)."""
    if path.suffix == ".jsonl":
        for number, r in read_objects(path):
            keys = ("question", "context", "answer", "answer_start")
            yield f"{path}, line {number}", *(r.get(k) for k in keys)  # type: ignore[misc]
        return
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for a, article in enumerate(articles):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q in paragraph["qas"]:
                    first = (q.get("answers") or [{}])[0]
                    yield (
                        f"{path}, article {a}, paragraph {p}", q["question"],
                        paragraph["context"], first.get("text"), first.get("answer_start"),
                    )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: expected JSON in SQuAD's form (data, paragraphs, qas)") from None


TASK = Task("qa", "Extractive questions", "qa", "f1", "", load)
