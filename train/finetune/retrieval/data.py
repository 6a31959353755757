"""The files of a retrieval task: examples to train on, in a form for each loss, and to score with.

The files for scores are optional: queries.jsonl, corpus.jsonl and qrels.tsv are in BEIR's layout,
pairs.jsonl has pairs of texts with a score.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from ...corpora.readers.text import read_lines, read_objects

# The columns of train.jsonl by loss; in the losses of PASSAGES, more may begin with "negative".
COLUMNS = {
    "mnrl": ("query", "positive"),
    "cosent": ("sentence1", "sentence2"),
    "mse": ("text",),
    "margin-mse": ("query", "positive"),
    "kl": ("query", "positive"),
}
PASSAGES = ("mnrl", "margin-mse", "kl")
RANKED = ("margin-mse", "kl")  # by a teacher, so that each line needs as many documents
# For --help: what a loss learns from, and a line of train.jsonl.
TRAINING = {
    "mnrl": (
        "queries with their documents; negatives are optional",
        '{"query": "chest pain", "positive": "The chest hurts.", "negative": "No fever."}',
    ),
    "cosent": (
        "pairs with a score, of which the order counts",
        '{"sentence1": "No fever.", "sentence2": "Afebrile.", "score": 0.9}',
    ),
    "mse": (
        "texts, whose vectors --teacher gives",
        '{"text": "The patient denies fever."}',
    ),
    "margin-mse": (
        "queries with as many negatives in each line; --teacher scores them",
        '{"query": "fever", "positive": "38.9 C.", "negative": "Calm.", "negative_1": "A cast."}',
    ),
    "kl": (
        "the same",
        '{"query": "fever", "positive": "38.9 C.", "negative": "Calm.", "negative_1": "A cast."}',
    ),
}
# What is scored, and the files for it with a line of each.
SCORING = {
    "nDCG, recall and MRR of a search": {
        "corpus.jsonl": '{"_id": "d1", "text": "Afebrile."}',
        "queries.jsonl": '{"_id": "q1", "text": "Is there fever?"}',
        "qrels.tsv": "q1\td1\t1",
    },
    "Spearman's and Pearson's correlation of scores and cosines": {
        "pairs.jsonl": '{"sentence1": "No fever.", "sentence2": "Afebrile.", "score": 0.9}',
    },
}


def described() -> str:
    """The files in lines for --help, each with a line of it."""
    out = ["--data is a folder with train.jsonl, whose lines depend on --loss:"]
    for loss, (use, line) in TRAINING.items():
        out += ["", f"  {loss:<12}{use}", f"    {line}"]
    out += ["", "To score the model before and after training, it also has:"]
    for use, files in SCORING.items():
        out += ["", f"  {use}", *(f"    {file:<15}{line}" for file, line in files.items())]
    return "\n".join(out)


@dataclasses.dataclass(frozen=True)
class Examples:
    """texts: of each example, in the order of its columns. targets: [examples, ...], or None."""

    texts: list[list[str]]
    targets: np.ndarray | None = None


def read_examples(path: pathlib.Path, loss: str) -> Examples:
    """Reads train.jsonl in the form that a loss takes.

    Raises FileNotFoundError, or ValueError with the number of the line and nothing of its text.
    """
    if loss == "cosent":
        return read_scored(path)
    fields = COLUMNS[loss]
    further = r"negative\w{0,20}" if loss in PASSAGES else ""
    texts = []
    for number, record in read_records(path, *fields, optional=further):
        names = [name for name in record if re.fullmatch(further, name) and record[name]]
        texts.append([record[name] for name in (*fields, *sorted(names, key=_position))])
        if loss in RANKED and not len(texts[-1]) == max(len(texts[0]), 3):
            expected = max(len(texts[0]) - 2, 1)
            raise ValueError(
                f"{path}, line {number}: expected {expected} in columns negative, negative_1, ..., "
                f"{'as in the first line' if number > 1 else 'or more'}, got {len(names)}"
            )
    _check_count(path, texts)
    return Examples(texts)


def read_scored(path: pathlib.Path) -> Examples:
    """Reads pairs with scores. Raises as `read_examples` does, also if all scores are equal."""
    texts, scores = [], []
    for number, record in read_records(path, *COLUMNS["cosent"]):
        score: Any = record.get("score")
        if type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"{path}, line {number}: score: expected a number")
        texts.append([record[name] for name in COLUMNS["cosent"]])
        scores.append(score)
    _check_count(path, texts)
    if len(set(scores)) < 2:
        raise ValueError(f"{path}: score: expected different scores, got the same in all lines")
    return Examples(texts, np.asarray(scores, np.float32))


def read_records(
    path: pathlib.Path, *fields: str, optional: str = ""
) -> list[tuple[int, dict[str, Any]]]:
    """The (line number, object) of each line of a .jsonl file, with text in these fields.

    optional: a pattern of further fields, which must be text or null. Raises FileNotFoundError, or
    ValueError with the number of the line and nothing of its text.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected lines of JSON with {', '.join(fields)}")
    records = []
    for number, record in read_objects(path):
        further = [k for k in record if re.fullmatch(optional, k) and record[k] is not None]
        for field in (*fields, *further):
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"{path}, line {number}: expected JSON with {', '.join(fields)}, each text; "
                    f"{field} is {'not text' if field in record else 'missing'}"
                )
        records.append((number, record))
    return records


def read_judged(folder: pathlib.Path) -> tuple[list[str], list[str], list[dict[int, float]]]:
    """(queries, documents, {document: gain} of the relevant documents per query).

    Raises FileNotFoundError or ValueError with one line.
    """
    documents = [
        d for _, d in read_records(folder / "corpus.jsonl", "_id", "text", optional="title")
    ]
    asked = [q for _, q in read_records(folder / "queries.jsonl", "_id", "text")]
    for name, records in (("corpus", documents), ("queries", asked)):
        if len({record["_id"] for record in records}) < len(records):
            raise ValueError(f"{folder / name}.jsonl: expected each _id once, got one twice")
    queries = {q["_id"]: q["text"] for q in asked}
    number = {d["_id"]: i for i, d in enumerate(documents)}
    judged: dict[str, dict[int, float]] = {}
    path = folder / "qrels.tsv"
    for n, line in enumerate(read_lines(path), start=1):
        parts = line.rstrip("\n").split("\t")
        if not line.strip() or (n == 1 and not re.fullmatch(r"-?[\d.]+", parts[-1].strip())):
            continue  # the header
        try:
            query, document, gain = parts[0], number[parts[1]], float(parts[2])
            queries[query]
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                f"{path}, line {n}: expected query-id, corpus-id and score of queries.jsonl and "
                "corpus.jsonl"
            ) from None
        if gain > 0:
            judged.setdefault(query, {})[document] = gain
    texts = [" ".join(t for t in (d.get("title"), d["text"]) if t) for d in documents]
    return [queries[q] for q in judged], texts, list(judged.values())


def _check_count(path: pathlib.Path, examples: list[Any]) -> None:
    if len(examples) < 2:
        raise ValueError(f"{path}: expected at least 2 examples, got {len(examples)}")


def _position(column: str) -> tuple[int, str]:
    """Orders negative, negative_1, ..., negative_10."""
    return int("0" + "".join(re.findall(r"\d", column))), column
