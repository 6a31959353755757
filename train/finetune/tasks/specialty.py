"""Specialty: which medical specialty a transcribed note of MTSamples belongs to.

The site lists many notes under several specialties ("Surgery" and that of the organ). A text that
occurs in training and in test with different labels would make the scores meaningless. Each text is
therefore one example, labeled with its rarest specialty, which is the most specific. Specialties
with fewer than ten texts are skipped because they are too small to train and test on.
"""

import pathlib
from collections import Counter

from .files import find_file, read_table
from .task import Data, Example, Task, make_data, three_ways

LEAST = 10  # texts of a specialty
HOMEPAGE = "https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions"


def load(folder: pathlib.Path) -> Data:
    """mtsamples.csv, its distinct texts split 70/15/15; skipped texts are counted."""
    path = find_file(folder, ("mtsamples.csv",), "MTSamples", HOMEPAGE)
    skipped: Counter[str] = Counter()
    found: dict[str, set[str]] = {}
    for _, row in read_table(path, ("medical_specialty", "transcription")):
        text, specialty = row["transcription"].strip(), row["medical_specialty"].strip()
        if not text or not specialty:
            skipped["rows without a text or a specialty"] += 1
        else:
            skipped["rows with a text that came before"] += text in found
            found.setdefault(text, set()).add(specialty)
    sizes = Counter(specialty for names in found.values() for specialty in names)
    labels = tuple(sorted(name for name, size in sizes.items() if size >= LEAST))
    examples = []
    for text, names in found.items():
        common = [name for name in names if name in labels]
        if common:
            rarest = min(common, key=lambda name: (sizes[name], name))
            examples.append(Example(text, label=labels.index(rarest)))
        else:
            skipped[f"texts of specialties with fewer than {LEAST}"] += 1
    splits = ([examples[i] for i in rows] for rows in three_ways(len(examples)))
    return make_data(labels, splits, skipped, folder)


TASK = Task(
    name="specialty",
    title="Specialty: the medical specialty of a note",
    kind="classification",
    metric="weighted_f1",
    homepage=HOMEPAGE,
    load=load,
)
