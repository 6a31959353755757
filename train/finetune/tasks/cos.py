"""Change of State: what changed, where, how and since which report, in chest X-ray reports."""

import dataclasses
import pathlib
from collections import Counter

from ...corpora.source import name_of
from .brat import DIFFERENT, WORDS, Span, agreeing, in_order, locate, name_files, read_spans, tag
from .files import token_data
from .task import Data, Task, published, three_ways

TYPES = ("Attr", "Cos", "Loc", "Ref", "Val")
LABELS = (*(f"B-{t}" for t in TYPES), *(f"I-{t}" for t in TYPES), "O")
HOMEPAGE = "https://depts.washington.edu/bionlp/data/corpora/files/events-COS-corpus.zip"


def load(folder: pathlib.Path) -> Data:
    """One example per Snippet of the .ann files (the .txt files are not needed); split 70/15/15.

    An entity belongs to the snippet that contains all of it; entities in no snippet are counted,
    and so are those with another text at their offsets.
    """
    files = in_order(folder, ".ann")
    if not files:
        raise FileNotFoundError(
            f"expected the .ann files of Change of State below {folder}, found none; get "
            f"them from {HOMEPAGE}"
        )
    skipped: Counter[str] = Counter()
    tagged, different = [], Counter[str]()
    for file in files:
        tagged += _snippets(file, skipped)
        different[name_of(file.relative_to(folder))] = skipped.pop(DIFFERENT, 0)
    name_files(different, skipped)
    if not tagged:
        raise ValueError(f"{folder}: expected Snippet spans in the .ann files, found none")
    return token_data(tagged, three_ways(len(tagged)), skipped, folder, LABELS)


def _snippets(
    file: pathlib.Path, skipped: Counter[str]
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    spans = read_spans(file, skipped)
    entities = [span for span in spans if span.type in TYPES]
    homeless = set(entities)
    tagged = []
    for snippet in (span for span in spans if span.type == "Snippet"):
        inside = [e for e in entities if snippet.start <= e.start and e.end <= snippet.end]
        homeless -= set(inside)
        text, located = locate(snippet.text, [_moved(e, snippet) for e in inside])
        tagged.append(tag(text, agreeing(text, located, skipped), WORDS, skipped))
    if homeless:
        skipped["entities in no snippet"] += len(homeless)
    return tagged


def _moved(entity: Span, snippet: Span) -> Span:
    return dataclasses.replace(
        entity, start=entity.start - snippet.start, end=entity.end - snippet.start
    )


TASK = Task(
    name="cos",
    title="Change of State: events in chest X-ray reports",
    kind="tokens",
    metric="f1",
    homepage=HOMEPAGE,
    load=load,
    published=published(95.1, 95.1, 94.0, 94.4, 95.0, 94.9, 94.9, 95.2, 94.0, 93.7),
)
