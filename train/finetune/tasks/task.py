"""What every task module provides: a Task, which reads its files to examples in three splits."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from ...common.names import shown_labels

LONGEST_LABEL = 64  # characters
MANY_LABELS = 20  # more, of which most occur once, are text or numbers of records

PUBLISHED_MODELS = (
    "BioClinical ModernBERT base", "BioClinical ModernBERT large", "ModernBERT base",
    "ModernBERT large", "Bio_ClinicalBERT", "BioBERT", "BioMed-RoBERTa", "Clinical-Longformer",
    "Clinical-BigBird", "Clinical ModernBERT",
)  # fmt: skip

KIND = Literal["classification", "multilabel", "tokens", "qa"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One input with its label.

    text: the input, or the first text of a pair, whose second is text_pair. A task of kind "tokens"
    has words instead of both. label: an index into the labels; 0 or 1 per label for multilabel, an
    index per word for tokens; for qa the offsets, in characters, at which the answer starts and
    ends in text_pair, the context; other_answers: texts that count as correct too.
    """

    text: str = ""
    text_pair: str | None = None
    words: tuple[str, ...] = ()
    label: int | tuple[int, ...] = 0
    other_answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a task and the names of its labels.

    skipped: {reason: number} of what was skipped. kept: the same of what was kept although it is
    unusual. Neither holds text of an example.
    """

    labels: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    kept: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of your own tables; None: the usual names, see `files`."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


USUAL = Columns()


@dataclasses.dataclass(frozen=True)
class Task:
    """How the files of a task are read and how its predictions are scored.

    metric: selects the best epoch by its value on validation; `published` has its test scores from
    the literature. load(folder): raises FileNotFoundError that says where to get the files, or
    ValueError with one line for files in another form; load(folder, Columns(...)) if takes_columns.
    files and example: the form of your own files and a row of one, for --help.
    """

    name: str
    title: str
    kind: KIND
    metric: Literal["weighted_f1", "micro_f1", "accuracy", "f1"]
    homepage: str
    load: Callable[..., Data]
    published: dict[str, float] = dataclasses.field(default_factory=dict)  # see `published`
    files: str = ""
    example: str = ""
    takes_columns: bool = False


def hf_split(n: int, test_share: float, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) rows as in `datasets.Dataset.train_test_split(test_size, seed=seed)`."""
    order = np.random.default_rng(seed).permutation(n)
    tests = int(np.ceil(test_share * n))
    return order[tests:], order[:tests]


def sklearn_split(n: int, test_share: float, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) rows as in scikit-learn's train_test_split(random_state=seed)."""
    order = np.random.RandomState(seed).permutation(n)
    tests = int(np.ceil(test_share * n))
    return order[tests:], order[:tests]


def published(*scores: float) -> dict[str, float]:
    """{model: test score in percent} from the model card of BioClinical ModernBERT."""
    return dict(zip(PUBLISHED_MODELS, scores, strict=True))


SPLIT = Callable[[int, float], tuple[np.ndarray, np.ndarray]]


def three_ways(
    n: int, split: SPLIT = hf_split, first: float = 0.3, second: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(train, validation, test) rows, 70/15/15: sets 30 % aside, then splits these in half."""
    train, aside = split(n, first)
    validation, test = split(len(aside), second)
    return train, aside[validation], aside[test]


def make_data(
    labels: tuple[str, ...],
    splits: Iterable[list[Example]],
    skipped: Mapping[str, int],
    where: pathlib.Path,
    kept: Mapping[str, int] | None = None,
) -> Data:
    """The Data of train, validation and test examples, after checks.

    Also counts labels that training lacks, and test examples that training holds too, in `kept`.
    Raises ValueError with one line for an empty split, or if all of training has the same label.
    """
    train, validation, test = splits
    skipped = {reason: number for reason, number in skipped.items() if number}
    notes = {reason: number for reason, number in (kept or {}).items() if number}
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not split:
            raise ValueError(
                f"{where}: the {name} split is empty; train, validation and test hold "
                f"{len(train)}, {len(validation)} and {len(test)} examples, and each needs some"
            )
    seen = set(_uses(train))
    names = _shown(labels, train + validation + test)
    multilabel = isinstance(train[0].label, tuple) and not any(e.words for e in train)
    if len(seen) < (1 if multilabel else 2):
        what = f"only {names[seen.pop()]!r}" if seen else "none"
        raise ValueError(
            f"{where}: expected {'a label' if multilabel else 'two labels or more'} in training, "
            f"got {what}"
        )
    if unseen := sorted(set(_uses(validation + test)) - seen):
        listing = ", ".join(names[i] for i in unseen[:5]) + ", ..." * (len(unseen) > 5)
        notes[f"labels that training lacks: {listing}"] = len(unseen)
    known = {(e.text, e.text_pair, e.words) for e in train}
    if again := sum((e.text, e.text_pair, e.words) in known for e in test):
        notes["test examples that training holds too"] = again
    return Data(labels, train, validation, test, skipped, notes)


def with_shown_labels(data: Data, where: str, allow_long_labels: bool = False) -> Data:
    """The Data with its labels as all results show them; see `shown_labels`.

    allow_long_labels: the labels stay as they are. Otherwise raises ValueError with one line for a
    label of more than 64 characters, and for more than 20 labels that are distinct in more than
    half of the examples (or words): both look like text instead of labels.
    """
    if allow_long_labels:
        return data
    examples = data.train + data.validation + data.test
    shown = _shown(data.labels, examples)
    remedy = (
        "make sure that the label column holds labels, or pass --allow-long-labels, which writes "
        "them to the results, the model and its card as they are"
    )
    for number, label in enumerate(data.labels, start=1):
        if len(label) > LONGEST_LABEL:
            raise ValueError(
                f"{where}: expected labels of at most {LONGEST_LABEL} characters, label {number} "
                f"of {len(data.labels)} has {len(label)}; {remedy}"
            )
    unit = "words" if any(example.words for example in examples) else "examples"
    rows = sum(len(example.words) or 1 for example in examples)
    if len(data.labels) > max(MANY_LABELS, rows / 2):
        raise ValueError(
            f"{where}: expected labels that occur again and again, got {len(data.labels)} in "
            f"{rows} {unit}; {remedy}"
        )
    kept = dict(data.kept)
    if hidden := sum(a != b for a, b in zip(shown, data.labels, strict=True)):
        reason = "labels that look like text, written as position and length"
        kept[f"{reason} (--allow-long-labels writes them as they are)"] = hidden
    return dataclasses.replace(data, labels=shown, kept=kept)


def _shown(labels: Sequence[str], examples: Sequence[Example]) -> tuple[str, ...]:
    uses = _uses(examples)
    once = {label for i, label in enumerate(labels) if uses[i] <= 1}
    return shown_labels(labels, tags=any(example.words for example in examples), rare=once)


def _uses(examples: Sequence[Example]) -> Counter[int]:
    """How often each label occurs, without those that do not."""
    uses: Counter[int] = Counter()
    for example in examples:
        if isinstance(example.label, int):
            uses[example.label] += 1
        elif example.words:
            uses.update(example.label)
        else:
            uses.update(i for i, one in enumerate(example.label) if one)
    return uses
