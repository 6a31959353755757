"""The files of a retrieval task, in BEIR's layout.

train.jsonl has lines of {"query", "positive"} and optionally "negative". For scores, queries.jsonl
and corpus.jsonl have lines of {"_id", "text"} and optionally "title", and qrels.tsv lines of
query-id, corpus-id and score, separated by tabs, with a header or without one.
"""

import pathlib
import re
from typing import Any

from ...corpora.readers.text import read_lines, read_objects


def read_records(path: pathlib.Path, *fields: str, optional: str = "") -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with text in these fields; an optional one may be empty.

    Raises FileNotFoundError, or ValueError with the number of the line and nothing of its text.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected lines of JSON with {', '.join(fields)}")
    records = []
    for number, record in read_objects(path):
        if optional and record.get(optional) is None:
            record[optional] = ""
        for field in (*fields, optional) if optional else fields:
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"{path}, line {number}: expected JSON with {', '.join(fields)}, each text; "
                    f"{field} is {'not text' if field in record else 'missing'}"
                )
        records.append(record)
    return records


def read_judged(folder: pathlib.Path) -> tuple[list[str], list[str], list[dict[int, float]]]:
    """(queries, documents, {document: gain} of the relevant documents per query).

    Raises FileNotFoundError or ValueError with one line.
    """
    documents = read_records(folder / "corpus.jsonl", "_id", "text", optional="title")
    asked = read_records(folder / "queries.jsonl", "_id", "text")
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
    texts = [" ".join(t for t in (d["title"], d["text"]) if t) for d in documents]
    return [queries[q] for q in judged], texts, list(judged.values())
