"""ChemProt as distributed by BLUE: the relation of a chemical and a gene marked in a sentence.

The reference numbers the labels of each split separately, which agrees only if each split has all
six. Here one list numbers them.
"""

import pathlib

from .files import find_file, read_table
from .task import Data, Example, Task, make_data, published

LABELS = ("CPR:3", "CPR:4", "CPR:5", "CPR:6", "CPR:9", "false")
HOMEPAGE = "https://github.com/ncbi-nlp/BLUE_Benchmark/releases (bert_data.zip)"


def load(folder: pathlib.Path) -> Data:
    """The official splits: train.tsv, dev.tsv and test.tsv, columns index, sentence and label.

    Quotes are read as in CSV, which is how pandas reads them for the reference.
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
                "another; expected BLUE's file with its quotes unchanged"
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
    published=published(89.9, 90.8, 89.5, 90.2, 88.3, 89.5, 89.0, 74.2, 87.4, 86.9),
)
