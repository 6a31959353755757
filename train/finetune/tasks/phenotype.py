"""Phenotypes of patients in notes of MIMIC-III: 13 and "unsure", any number per note."""

import pathlib
from collections import Counter

from .files import find_file, read_table
from .task import Data, Example, Task, hf_split, make_data, published

LABELS = (
    "ADVANCED.CANCER",
    "ADVANCED.HEART.DISEASE",
    "ADVANCED.LUNG.DISEASE",
    "ALCOHOL.ABUSE",
    "CHRONIC.NEUROLOGICAL.DYSTROPHIES",
    "CHRONIC.PAIN.FIBROMYALGIA",
    "DEMENTIA",
    "DEPRESSION",
    "DEVELOPMENTAL.DELAY.RETARDATION",
    "NON.ADHERENCE",
    "OBESITY",
    "OTHER.SUBSTANCE.ABUSE",
    "SCHIZOPHRENIA.AND.OTHER.PSYCHIATRIC.DISORDERS",
    "UNSURE",
)
HOMEPAGE = "https://physionet.org/content/phenotype-annotations-mimic/1.20.03/"
NOTES = "https://physionet.org/content/mimiciii/1.4/"


def load(folder: pathlib.Path) -> Data:
    """ACTdb102003.csv joined with MIMIC-III's NOTEEVENTS.csv or .csv.gz on ROW_ID; 70/10/20.

    NONE means no label. Contradictory rows with both NONE and a label are skipped and counted, and
    so are annotations whose note is missing or empty.
    """
    skipped: Counter[str] = Counter()
    annotations = find_file(folder, ("ACTdb102003.csv",), "the phenotype annotations", HOMEPAGE)
    names = ("NOTEEVENTS.csv", "NOTEEVENTS.csv.gz")
    notes = find_file(folder, names, "MIMIC-III's table of notes", NOTES)
    rows = _annotations(annotations, skipped)
    texts = _texts(notes, {row_id for row_id, _ in rows})
    examples = []
    for row_id, label in rows:
        if texts.get(row_id, "").strip():
            examples.append(Example(texts[row_id], label=label))
        else:
            skipped["annotations without a note"] += 1
    rest, test = hf_split(len(examples), 0.2)
    train, validation = hf_split(len(rest), 0.125)
    parts = (rest[train], rest[validation], test)
    splits = ([examples[i] for i in part] for part in parts)
    return make_data(LABELS, splits, skipped, folder)


def _annotations(path: pathlib.Path, skipped: Counter[str]) -> list[tuple[int, tuple[int, ...]]]:
    """(ROW_ID, label) of the rows that are not contradictory."""
    rows = []
    for number, row in read_table(path, ("ROW_ID", "NONE", *LABELS)):
        at = f"{path}, record {number}"
        none = _whole(row["NONE"], at, "NONE", 1)
        label = tuple(_whole(row[name], at, name, 1) for name in LABELS)
        if none and any(label):
            skipped["annotations with both NONE and a label"] += 1
        else:
            rows.append((_whole(row["ROW_ID"], at, "ROW_ID"), label))
    return rows


def _texts(path: pathlib.Path, wanted: set[int]) -> dict[int, str]:
    """{ROW_ID: note} of these ROW_IDs; reading stops after the last of them."""
    texts: dict[int, str] = {}
    for number, row in read_table(path, ("ROW_ID", "TEXT")):
        if len(texts) == len(wanted):
            break
        row_id = _whole(row["ROW_ID"], f"{path}, record {number}", "ROW_ID")
        if row_id in wanted:
            texts.setdefault(row_id, row["TEXT"])
    return texts


def _whole(value: str, at: str, column: str, most: int | None = None) -> int:
    """An integer; pandas writes 1.0 if the column once had missing values."""
    digits = value.strip().removesuffix(".0")
    if not digits.isdecimal() or (most is not None and int(digits) > most):
        expected = "a whole number" if most is None else " or ".join(map(str, range(most + 1)))
        raise ValueError(f"{at}: {column}: expected {expected}, got something else")
    return int(digits)


TASK = Task(
    name="phenotype",
    title="Phenotype: 14 phenotypes in notes of MIMIC-III",
    kind="multilabel",
    metric="weighted_f1",
    homepage=HOMEPAGE,
    load=load,
    published=published(58.1, 60.8, 48.4, 58.3, 25.8, 26.6, 36.8, 46.4, 26.5, 54.9),
)
