"""ChemProt as BLUE distributes it: how the chemical and the gene that a sentence marks are related.

The reference numbers the labels of each split on its own, which agrees only as long as each split
has all six; here they are one table.
"""

import pathlib

from .files import find_file, read_table
from .task import Data, Example, Task, make_data

LABELS = ("CPR:3", "CPR:4", "CPR:5", "CPR:6", "CPR:9", "false")
HOMEPAGE = "https://github.com/ncbi-nlp/BLUE_Benchmark/releases (bert_data.zip)"


def load(folder: pathlib.Path) -> Data:
    """The official splits: train.tsv, dev.tsv and test.tsv, columns index, sentence and label.

    Quotes are read as the CSV format has them, as pandas does for the reference.
    """
    train, validation, test = (
        _read(find_file(folder, (f"{name}.tsv",), "ChemProt", HOMEPAGE))
        for name in ("train", "dev", "test")
    )
    return make_data(LABELS, (train, validation, test), {}, folder)


def _read(path: pathlib.Path) -> list[Example]:
    examples = []
    for number, row in read_table(path, ("sentence", "label")):
        if row["label"] not in LABELS:
            raise ValueError(
                f"{path}, record {number}: expected one of the labels {', '.join(LABELS)}, got "
                "another; is the file BLUE's, and its quotes as they were?"
            )
        examples.append(Example(row["sentence"], label=LABELS.index(row["label"])))
    return examples


TASK = Task(
    name="chemprot",
    title="ChemProt: relations of chemicals and genes",
    kind="classification",
    metric="weighted_f1",
    homepage=HOMEPAGE,
    load=load,
    published={
        "BioClinical ModernBERT base": 89.9,
        "BioClinical ModernBERT large": 90.8,
        "ModernBERT base": 89.5,
        "ModernBERT large": 90.2,
        "Bio_ClinicalBERT": 88.3,
        "BioBERT": 89.5,
        "BioMed-RoBERTa": 89.0,
        "Clinical-Longformer": 74.2,
        "Clinical-BigBird": 87.4,
        "Clinical ModernBERT": 86.9,
    },
)
