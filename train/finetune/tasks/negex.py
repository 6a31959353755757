"""NegEx: whether a condition named in a sentence of a report is affirmed, negated or possible.

An example is a pair of sentence and condition; a sentence may occur with several conditions.
"""

import pathlib
from collections import Counter

import numpy as np

from ...corpora.sources.negex import NEGATIONS, annotations
from .files import find_file
from .task import Data, Example, Task, make_data, three_ways

HOMEPAGE = "https://github.com/chapmanbe/negex"


def load(folder: pathlib.Path) -> Data:
    """rsAnnotations-1-120-random.txt in either form, 70/15/15, with no sentence in two splits.

    Case and whitespace are ignored in comparisons. A repeated pair is skipped and counted; a pair
    with two different labels raises ValueError.
    """
    path = find_file(folder, ("rsAnnotations-1-120-random.txt",), "NegEx", HOMEPAGE)
    skipped: Counter[str] = Counter()
    groups: dict[str, dict[str, Example]] = {}  # by sentence and condition
    for number, condition, sentence, negation in annotations(path):
        label = NEGATIONS.index(negation)
        example = Example(sentence.strip(), condition.strip(), label=label)
        known = groups.setdefault(_plain(sentence), {}).setdefault(_plain(condition), example)
        if known.label != label:
            raise ValueError(
                f"{path}, line {number}: the same pair occurs before with another label"
            )
        skipped["pairs that came before"] += known is not example
    sentences = list(groups.values())

    def examples(rows: np.ndarray) -> list[Example]:
        return [example for row in rows for example in sentences[row].values()]

    splits = (examples(rows) for rows in three_ways(len(sentences)))
    return make_data(NEGATIONS, splits, skipped, folder)


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


TASK = Task(
    name="negex",
    title="NegEx: negation in clinical sentences",
    kind="classification",
    metric="weighted_f1",
    homepage=HOMEPAGE,
    load=load,
)
