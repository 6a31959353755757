"""NegEx: whether a condition named in a sentence of a report is affirmed, negated or possible.

An example is a pair of sentence and condition; a sentence may occur with several conditions.
"""

import pathlib
from collections import Counter

import numpy as np

from ...corpora.readers.text import read_lines
from .files import find_file
from .task import Data, Example, Task, make_data, three_ways

# The labels in the file's header; no row of its released version is labeled Possible.
LABELS = ("affirmed", "negated", "possible")
HOMEPAGE = "https://github.com/chapmanbe/negex"


def load(folder: pathlib.Path) -> Data:
    """rsAnnotations-1-120-random.txt, split 70/15/15 so that no sentence is in two splits.

    Case and whitespace are ignored in comparisons. A repeated pair is skipped and counted; a pair
    with two different labels raises ValueError.
    """
    path = find_file(folder, ("rsAnnotations-1-120-random.txt",), "NegEx", HOMEPAGE)
    skipped: Counter[str] = Counter()
    groups: dict[str, list[Example]] = {}
    answers: dict[tuple[str, str], int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.rstrip("\n").split("\t")
        if not line.strip() or (number == 1 and not fields[0].isdecimal()):
            continue  # the header
        status = fields[3].strip().lower() if len(fields) == 6 else ""
        if status not in LABELS:
            raise ValueError(
                f"{path}, line {number}: expected 6 fields between tabs, the fourth one of "
                f"{', '.join(LABELS)}; got something else"
            )
        label = LABELS.index(status)
        sentence, condition = (" ".join(fields[i].split()).lower() for i in (2, 1))
        before = answers.setdefault((sentence, condition), label)
        if before != label:
            raise ValueError(
                f"{path}, line {number}: the same pair occurs before with another label"
            )
        group = groups.setdefault(sentence, [])
        if any(
            " ".join((example.text_pair or "").lower().split()) == condition for example in group
        ):
            skipped["pairs that came before"] += 1
        else:
            group.append(Example(fields[2].strip(), fields[1].strip(), label=label))
    sentences = list(groups.values())

    def examples(rows: np.ndarray) -> list[Example]:
        return [example for row in rows for example in sentences[row]]

    splits = (examples(rows) for rows in three_ways(len(sentences)))
    return make_data(LABELS, splits, skipped, folder)


TASK = Task(
    name="negex",
    title="NegEx: negation in clinical sentences",
    kind="classification",
    metric="weighted_f1",
    homepage=HOMEPAGE,
    load=load,
)
