"""Phenotypes of patients in notes of MIMIC-III: 13 and "unsure", any number of them a note."""

import pathlib
from collections import Counter

from .files import find_file, read_table
from .task import Data, Example, Task, hf_split, make_data

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

    NONE means no label. Rows that have both NONE and a label contradict themselves: they are left
    out, as are annotations whose note is missing or empty; both are counted.
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
    """(ROW_ID, label) of the rows that do not contradict themselves."""
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
    """The notes with these ROW_IDs; the file is read no further than the last of them."""
    texts: dict[int, str] = {}
    for number, row in read_table(path, ("ROW_ID", "TEXT")):
        if len(texts) == len(wanted):
            break
        row_id = _whole(row["ROW_ID"], f"{path}, record {number}", "ROW_ID")
        if row_id in wanted:
            texts.setdefault(row_id, row["TEXT"])
    return texts


def _whole(value: str, at: str, column: str, most: int | None = None) -> int:
    """A whole number; pandas writes 1.0 where a column once had gaps."""
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
    published={
        "BioClinical ModernBERT base": 58.1,
        "BioClinical ModernBERT large": 60.8,
        "ModernBERT base": 48.4,
        "ModernBERT large": 58.3,
        "Bio_ClinicalBERT": 25.8,
        "BioBERT": 26.6,
        "BioMed-RoBERTa": 36.8,
        "Clinical-Longformer": 46.4,
        "Clinical-BigBird": 26.5,
        "Clinical ModernBERT": 54.9,
    },
)
