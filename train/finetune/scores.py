"""Scores per task kind: scikit-learn's, whole entities as seqeval counts them, SQuAD's for answers.

A division by zero gives 0. Scores are shares, not percentages, in numbers and lists that JSON can
hold.
"""

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from modernbert_jax.packing import IGNORE_INDEX

from .encode import Encoded, answer_of
from .tasks.task import KIND


def task_scores(
    kind: KIND, labels: Sequence[str], examples: Sequence[Encoded], logits: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The scores of the predictions that follow from the logits of each example.

    logits: [labels] (classification, multilabel), [tokens, labels] (tokens) or [tokens, 2] (qa).
    """
    pairs = list(zip(examples, logits, strict=True))
    if kind == "qa":
        truth = [(e.answer, *e.other_answers) for e in examples]
        return answer_scores(truth, [answer_of(*pair) for pair in pairs])
    if kind == "tokens":
        first = [e.target != IGNORE_INDEX for e in examples]  # the first token of each word
        named = lambda ids: [str(labels[i]) for i in ids]  # noqa: E731
        return entity_scores(
            [named(e.target[at]) for e, at in zip(examples, first, strict=True)],
            [named(x[at].argmax(-1)) for x, at in zip(logits, first, strict=True)],
        )
    truth = np.asarray([e.target for e in examples])
    if kind == "classification":
        return classification_scores(truth, np.asarray(logits).argmax(-1), labels)
    return multilabel_scores(truth, np.asarray(logits) > 0, labels)


def classification_scores(truth: Any, predictions: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of one label per example. truth, predictions: [B] indices into labels.

    Returns accuracy, weighted_f1, micro_f1, macro_f1 (over the labels that occur), per_label {name:
    precision, recall, f1, support} and confusion, with one row per true label. Raises ValueError
    for different shapes and indices that are no label.
    """
    truth, predictions = np.asarray(truth, np.int64), np.asarray(predictions, np.int64)
    if truth.ndim != 1 or truth.shape != predictions.shape:
        raise ValueError(
            f"expected two [B] arrays of one length, got {truth.shape} and {predictions.shape}"
        )
    n = len(labels)
    for name, found in (("truth", truth), ("predictions", predictions)):
        if found.size and not (0 <= found.min() and found.max() < n):
            raise ValueError(f"{name}: expected 0 to {n - 1}, got {found.min()} to {found.max()}")
    scores = _scikit_learn(truth, predictions, labels)
    confusion = confusion_matrix(truth, predictions, labels=range(n))
    return {**scores, "confusion": confusion.tolist()}


def multilabel_scores(truth: Any, predictions: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of any number of labels per example. truth, predictions: [B, labels], each 0 or 1.

    Returns accuracy (of all labels of an example at once), weighted_f1, micro_f1, macro_f1 and
    per_label {name: precision, recall, f1, support}. Raises ValueError for other shapes and values.
    """
    truth, predictions = np.asarray(truth), np.asarray(predictions)
    expected = (len(truth), len(labels))
    if truth.shape != expected or predictions.shape != expected:
        raise ValueError(
            f"expected two {expected} arrays, got {truth.shape} and {predictions.shape}"
        )
    for name, found in (("truth", truth), ("predictions", predictions)):
        if not np.isin(found, (0, 1)).all():
            raise ValueError(f"{name}: expected 0 and 1 only; compare logits with 0 first")
    return _scikit_learn(truth.astype(int), predictions.astype(int), labels)


def _scikit_learn(truth: np.ndarray, predictions: np.ndarray, labels: Sequence[str]) -> dict:
    if not len(truth):
        raise ValueError("expected at least one example, got none")
    options: dict[str, Any] = {"zero_division": 0}
    if truth.ndim == 2 and truth.shape[1] == 1:  # scikit-learn takes one column as two classes
        truth, predictions, options["labels"] = truth[:, 0], predictions[:, 0], [1]
    scores = {"accuracy": float(accuracy_score(truth, predictions))}
    for average in ("weighted", "micro", "macro"):
        f1 = f1_score(truth, predictions, average=average, **options)
        scores[f"{average}_f1"] = float(f1)
    options.setdefault("labels", range(len(labels)))
    columns: Any = precision_recall_fscore_support(truth, predictions, average=None, **options)
    per_label = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    }
    return {**scores, "per_label": per_label}


def entity_scores(
    truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Scores of whole entities, of which the type and both ends must be correct.

    truth, predictions: one tag per word and sequence. Returns precision, recall and f1 over all
    entities (micro), accuracy over words, and per_label {type: precision, recall, f1, support}.
    Raises ValueError for different lengths.
    """
    if len(truth) != len(predictions):
        raise ValueError(f"expected {len(truth)} sequences of tags, got {len(predictions)}")
    correct: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    true: Counter[str] = Counter()
    correct_words = words = 0
    for number, (expected, got) in enumerate(zip(truth, predictions, strict=True)):
        if len(expected) != len(got):
            raise ValueError(f"sequence {number}: expected {len(expected)} tags, got {len(got)}")
        words += len(expected)
        correct_words += sum(a == b for a, b in zip(expected, got, strict=True))
        found, wanted = set(entities(got)), set(entities(expected))
        predicted.update(entity[0] for entity in found)
        true.update(entity[0] for entity in wanted)
        correct.update(entity[0] for entity in found & wanted)
    types = sorted(predicted | true)
    return {
        **_ratios(correct.total(), predicted.total(), true.total()),
        "accuracy": correct_words / max(words, 1),
        "per_label": {
            t: _ratios(correct[t], predicted[t], true[t]) | {"support": true[t]} for t in types
        },
    }


def _ratios(correct: int, predicted: int, true: int) -> dict[str, float]:
    return {
        "precision": correct / max(predicted, 1),
        "recall": correct / max(true, 1),
        "f1": 2 * correct / max(predicted + true, 1),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity in a sequence of tags such as B-name, I-name, O.

    Reads BIO, IOB1 and BIOES as conlleval and seqeval's default mode do: an I- after O or after
    another type begins an entity. A tag without a type has the type "_".
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


def answer_scores(
    truth: Sequence[str | Sequence[str]], predictions: Sequence[str]
) -> dict[str, Any]:
    """SQuAD's exact_match and f1 over words, both averaged over questions.

    truth: the answer of each question, or several, of which the best match counts for each score.
    Case, punctuation, articles and whitespace are ignored. Source: arXiv 1606.05250, section 6.
    """
    exact, f1 = [], []
    for answers, prediction in zip(truth, predictions, strict=True):
        answers = [answers] if isinstance(answers, str) else answers
        pairs = [(_answer_words(answer), _answer_words(prediction)) for answer in answers]
        exact.append(max(float(true == got) for true, got in pairs))
        f1.append(max(_word_f1(true, got) for true, got in pairs))
    mean = lambda x: float(np.mean(x)) if x else 0.0  # noqa: E731
    return {"f1": mean(f1), "exact_match": mean(exact)}


def _word_f1(true: list[str], got: list[str]) -> float:
    common = (Counter(true) & Counter(got)).total()
    return 2 * common / (len(true) + len(got)) if true and got else float(true == got)


def _answer_words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]
