"""Scores of classification, multi-label classification and entity recognition, in NumPy alone.

They equal scikit-learn's, and seqeval's in its default mode, with a division by zero giving 0. All
are numbers and lists that JSON takes; shares, not per cent.
"""

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_scores(truth: Any, guess: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of one label an example. truth, guess: [B] indices into labels.

    Returns accuracy, weighted_f1, micro_f1, macro_f1 (over the labels that occur in truth or guess,
    scikit-learn's default), per_label {name: precision, recall, f1, support} and confusion, whose
    rows are the truth. Raises ValueError for shapes that differ and indices that are no label.
    """
    truth, guess = np.asarray(truth, np.int64), np.asarray(guess, np.int64)
    if truth.ndim != 1 or truth.shape != guess.shape:
        raise ValueError(f"expected two [B] arrays alike, got {truth.shape} and {guess.shape}")
    n = len(labels)
    for name, found in (("truth", truth), ("guess", guess)):
        if found.size and not (0 <= found.min() and found.max() < n):
            raise ValueError(f"{name}: expected 0 to {n - 1}, got {found.min()} to {found.max()}")
    confusion = np.bincount(truth * n + guess, minlength=n * n).reshape(n, n)
    hits, guessed, true = np.diag(confusion), confusion.sum(0), confusion.sum(1)
    f1 = _f1(hits, guessed, true)
    occurs = guessed + true > 0
    accuracy = _share(hits.sum(), true.sum())
    return {
        "accuracy": float(accuracy),
        "weighted_f1": _weighted(f1, true),
        "micro_f1": float(accuracy),  # one label an example: a false positive is a false negative
        "macro_f1": float(f1[occurs].mean()) if occurs.any() else 0.0,
        "per_label": _per_label(labels, hits, guessed, true),
        "confusion": confusion.tolist(),
    }


def multilabel_scores(truth: Any, guess: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of any number of labels an example. truth, guess: [B, labels], each 0 or 1.

    Returns weighted_f1, micro_f1, macro_f1, accuracy (all labels of an example right) and per_label
    {name: precision, recall, f1, support}. Raises ValueError for other shapes and values.
    """
    truth, guess = np.asarray(truth), np.asarray(guess)
    expected = (len(truth), len(labels))
    if truth.size == 0 and guess.size == 0:
        truth = guess = np.zeros((0, len(labels)), bool)
    elif truth.shape != expected or guess.shape != expected:
        raise ValueError(f"expected two {expected} arrays, got {truth.shape} and {guess.shape}")
    for name, found in (("truth", truth), ("guess", guess)):
        if not np.isin(found, (0, 1)).all():
            raise ValueError(f"{name}: expected 0 and 1 only; compare logits with 0 first")
    truth, guess = truth.astype(bool), guess.astype(bool)
    hits, guessed, true = (truth & guess).sum(0), guess.sum(0), truth.sum(0)
    f1 = _f1(hits, guessed, true)
    return {
        "accuracy": float(_share((truth == guess).all(1).sum(), len(truth))),
        "weighted_f1": _weighted(f1, true),
        "micro_f1": float(_f1(hits.sum(), guessed.sum(), true.sum())),
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        "per_label": _per_label(labels, hits, guessed, true),
    }


def entity_scores(truth: Sequence[Sequence[str]], guess: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores of whole entities: type and both ends must be right. truth, guess: tags by word.

    Returns precision, recall and f1 over all entities (micro), accuracy over words, and per_label
    {type: precision, recall, f1, support}. Raises ValueError for lengths that differ.
    """
    if len(truth) != len(guess):
        raise ValueError(f"expected as many guesses as truths, got {len(guess)} and {len(truth)}")
    hits: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    true: Counter[str] = Counter()
    right = words = 0
    for number, (tags, guesses) in enumerate(zip(truth, guess, strict=True)):
        if len(tags) != len(guesses):
            raise ValueError(
                f"sequence {number}: expected {len(tags)} guesses, a word each, got {len(guesses)}"
            )
        words += len(tags)
        right += sum(a == b for a, b in zip(tags, guesses, strict=True))
        found, wanted = set(entities(guesses)), set(entities(tags))
        guessed.update(entity[0] for entity in found)
        true.update(entity[0] for entity in wanted)
        hits.update(entity[0] for entity in found & wanted)
    types = sorted(guessed | true)
    counts = (np.asarray([c[t] for t in types], np.int64) for c in (hits, guessed, true))
    return {
        "precision": float(_share(hits.total(), guessed.total())),
        "recall": float(_share(hits.total(), true.total())),
        "f1": float(_f1(hits.total(), guessed.total(), true.total())),
        "accuracy": float(_share(right, words)),
        "per_label": _per_label(types, *counts),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity in a sequence of tags such as B-name, I-name, O.

    As conlleval and seqeval's default mode read BIO, IOB1 and BIOES: an I- after O or after another
    type begins an entity. A tag without a type is of type "_".
    """
    found = []
    before, type_before, first = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, type_ = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        other_type = type_ != type_before
        ends = (
            before in ("E", "S")
            or (before in ("B", "I") and prefix in ("B", "S", "O"))
            or (before not in ("O", ".") and other_type)
        )
        begins = (
            prefix in ("B", "S")
            or (prefix in ("E", "I") and before in ("E", "S", "O"))
            or (prefix not in ("O", ".") and other_type)
        )
        if ends:
            found.append((type_before, first, i - 1))
        if begins:
            first = i
        before, type_before = prefix, type_
    return found


def _share(part: Any, whole: Any) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _f1(hits: Any, guessed: Any, true: Any) -> np.ndarray:
    return _share(2 * np.asarray(hits), np.asarray(guessed) + np.asarray(true))


def _weighted(f1: np.ndarray, true: np.ndarray) -> float:
    return float(_share((f1 * true).sum(), true.sum()))


def _per_label(
    labels: Sequence[str], hits: np.ndarray, guessed: np.ndarray, true: np.ndarray
) -> dict[str, dict[str, Any]]:
    precision, recall, f1 = _share(hits, guessed), _share(hits, true), _f1(hits, guessed, true)
    return {
        label: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": int(true[i]),
        }
        for i, label in enumerate(labels)
    }


def answer_scores(truth: Sequence[str], guess: Sequence[str]) -> dict[str, Any]:
    """SQuAD's exact_match and f1 over words, each a mean over questions.

    Case, punctuation, articles and blanks count for nothing. Source: arXiv 1606.05250, section 6.
    """
    same, f1 = [], []
    for t, g in zip(truth, guess, strict=True):
        true, got = _answer_words(t), _answer_words(g)
        same.append(float(true == got))
        common = sum((Counter(true) & Counter(got)).values())
        if not true or not got:
            f1.append(same[-1])
        else:
            f1.append(2 * common / (len(true) + len(got)))
    mean = lambda x: float(np.mean(x)) if x else 0.0  # noqa: E731
    return {"f1": mean(f1), "exact_match": mean(same)}


def _answer_words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]
