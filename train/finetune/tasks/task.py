"""What every task module provides: a Task, and the examples that its files hold."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

KIND = Literal["classification", "multilabel", "tokens", "qa"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One input with its answer.

    text is the input; of a pair, text_pair the second one; of a token task `words` stands for both.
    label: an index into the labels; for multilabel one 0 or 1 a label, for tokens one index a word,
    for qa where the answer starts and ends in text_pair, the context, in characters.
    """

    text: str = ""
    text_pair: str | None = None
    words: tuple[str, ...] = ()
    label: int | tuple[int, ...] = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a task and the names of its labels.

    skipped: {reason: number} of what was left out, or kept but is out of the ordinary; no text.
    """

    labels: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how its files are read and how it is scored.

    metric picks the best epoch on validation and is what `published` gives: {model: test score in
    per cent}, from the card of BioClinical ModernBERT. load(folder) raises FileNotFoundError, which
    says where the files are to be had, or ValueError with one line for files that are not as
    expected.
    """

    name: str
    title: str
    kind: KIND
    metric: Literal["weighted_f1", "micro_f1", "accuracy", "f1"]
    homepage: str
    load: Callable[[pathlib.Path], Data]
    published: dict[str, float] = dataclasses.field(default_factory=dict)


def hf_split(n: int, test_share: float, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) rows as `datasets.Dataset.train_test_split(test_size, seed=seed)` has them."""
    order = np.random.default_rng(seed).permutation(n)
    tests = int(np.ceil(test_share * n))
    return order[tests:], order[:tests]


def sklearn_split(n: int, test_share: float, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) rows as scikit-learn's train_test_split(random_state=seed) has them."""
    order = np.random.RandomState(seed).permutation(n)
    tests = int(np.ceil(test_share * n))
    return order[tests:], order[:tests]


SPLIT = Callable[[int, float], tuple[np.ndarray, np.ndarray]]


def three_ways(
    n: int, split: SPLIT = hf_split, first: float = 0.3, second: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(train, validation, test) rows, 70/15/15: three tenths aside, then the half of those."""
    train, aside = split(n, first)
    validation, test = split(len(aside), second)
    return train, aside[validation], aside[test]


def make_data(
    labels: tuple[str, ...],
    splits: Iterable[list[Example]],
    skipped: Mapping[str, int],
    where: pathlib.Path,
) -> Data:
    """Data fit to train on, of train, validation and test examples.

    skipped also gets the labels that training lacks and the examples of test that it holds too.
    Raises ValueError with one line for an empty split, or where all of training has one answer.
    """
    train, validation, test = splits
    notes = {reason: number for reason, number in skipped.items() if number}
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not split:
            raise ValueError(
                f"{where}: the {name} split is empty; train, validation and test hold "
                f"{len(train)}, {len(validation)} and {len(test)} examples, and each needs some"
            )
    seen = _used(train)
    multilabel = isinstance(train[0].label, tuple) and not any(e.words for e in train)
    if len(seen) < (1 if multilabel else 2):
        what = f"only {labels[seen.pop()]!r}" if seen else "none"
        raise ValueError(
            f"{where}: expected {'a label' if multilabel else 'two labels or more'} in training, "
            f"got {what}"
        )
    if unseen := sorted(_used(validation + test) - seen):
        names = ", ".join(labels[i] for i in unseen[:5]) + ", ..." * (len(unseen) > 5)
        notes[f"labels that training lacks: {names}"] = len(unseen)
    known = {(e.text, e.text_pair, e.words) for e in train}
    if again := sum((e.text, e.text_pair, e.words) in known for e in test):
        notes["test examples that training holds too (kept)"] = again
    return Data(labels, train, validation, test, notes)


def _used(examples: list[Example]) -> set[int]:
    """The labels that occur."""
    used: set[int] = set()
    for example in examples:
        if isinstance(example.label, int):
            used.add(example.label)
        elif example.words:
            used.update(example.label)
        else:
            used.update(i for i, one in enumerate(example.label) if one)
    return used
