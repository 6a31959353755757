"""Scores against counts and formulas, and against seqeval, on random and on degenerate labels."""

import json
import warnings

import numpy as np
import pytest
import seqeval.metrics
from hypothesis import given, strategies as st

from train.finetune.scores import (
    answer_scores,
    classification_scores,
    entities,
    entity_scores,
    multilabel_scores,
)

CLOSE = {"rel": 0, "abs": 1e-12}


def ratio(part, whole):
    return part / whole if whole else 0.0


def check_f1(found, truth, predictions, names, macro_over=None):
    """truth, predictions: [B, labels] of bool. Precision, recall and F1 from their definitions."""
    per_label = {}
    for name, t, p in zip(names, truth.T, predictions.T, strict=True):
        correct = sum(t & p)
        precision, recall = ratio(correct, sum(p)), ratio(correct, sum(t))
        f1 = ratio(2 * precision * recall, precision + recall)
        per_label[name] = {"precision": precision, "recall": recall, "f1": f1, "support": sum(t)}
        assert found["per_label"][name] == pytest.approx(per_label[name], **CLOSE)
    assert list(found["per_label"]) == list(names)
    correct, total = (truth & predictions).sum(), truth.sum() + predictions.sum()
    assert found["micro_f1"] == pytest.approx(ratio(2 * correct, total), **CLOSE)
    weighted = sum(s["f1"] * s["support"] for s in per_label.values())
    assert found["weighted_f1"] == pytest.approx(ratio(weighted, truth.sum()), **CLOSE)
    f1 = [per_label[name]["f1"] for name in (names if macro_over is None else macro_over)]
    assert found["macro_f1"] == pytest.approx(np.mean(f1), **CLOSE)
    right = (truth == predictions).all(axis=1)
    assert found["accuracy"] == pytest.approx(np.mean(right), **CLOSE)
    json.dumps(found)


def check_classification(truth, predictions, n):
    names = [f"label {i}" for i in range(n)]
    found = classification_scores(np.array(truth), np.array(predictions), names)
    one_hot = np.eye(n, dtype=bool)
    occurring = [names[i] for i in sorted({*truth, *predictions})]
    check_f1(found, one_hot[truth], one_hot[predictions], names, macro_over=occurring)
    confusion = np.zeros((n, n), int)
    np.add.at(confusion, (truth, predictions), 1)
    assert found["confusion"] == confusion.tolist()


@given(st.data(), st.integers(2, 6), st.integers(1, 60))
def test_classification(data, n, rows):
    column = st.lists(st.integers(0, n - 1), min_size=rows, max_size=rows)
    check_classification(data.draw(column), data.draw(column), n)


@pytest.mark.parametrize(
    "truth, predictions",
    [
        ([0, 0, 0], [0, 0, 0]),  # one class alone
        ([0, 0, 0], [1, 1, 2]),  # all wrong
        ([0, 1, 1], [0, 0, 0]),  # a class never predicted
        ([0, 0, 3], [3, 1, 3]),  # a class that occurs in neither
    ],
)
def test_classification_with_missing_classes(truth, predictions):
    check_classification(truth, predictions, 4)


def test_classification_of_many_rows():
    rng = np.random.default_rng(0)
    truth = rng.choice(14, 5000, p=rng.dirichlet(np.full(14, 0.3)))
    predictions = np.where(rng.random(5000) < 0.6, truth, rng.integers(0, 14, 5000))
    check_classification(truth.tolist(), predictions.tolist(), 14)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2),
            min_size=1,
            max_size=40,
        )
    )
)
def test_multilabel(rows):
    truth, predictions = (np.array(column) for column in zip(*rows, strict=True))
    names = [f"label {i}" for i in range(truth.shape[1])]
    found = multilabel_scores(truth, predictions > 0, names)
    check_f1(found, truth > 0, predictions > 0, names)


@pytest.mark.parametrize("truth, predictions", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_multilabel_all_alike(truth, predictions):
    truth, predictions = np.full((4, 3), truth), np.full((4, 3), predictions)
    found = multilabel_scores(truth, predictions, "abc")
    check_f1(found, truth > 0, predictions > 0, "abc")
    assert found["macro_f1"] == (truth & predictions).all()


# Entities


def seqeval_report(truth, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are none, and of NumPy's types in seqeval
        report = seqeval.metrics.classification_report(
            truth, predictions, output_dict=True, zero_division=0
        )
        accuracy = seqeval.metrics.accuracy_score(truth, predictions)
    return report, accuracy


def check_entities(truth, predictions):
    report, accuracy = seqeval_report(truth, predictions)
    found = entity_scores(truth, predictions)
    assert found["accuracy"] == pytest.approx(accuracy, **CLOSE)
    overall = report.pop("micro avg")
    for average in ("macro avg", "weighted avg"):
        report.pop(average)
    assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(
        [float(overall[k]) for k in ("precision", "recall", "f1-score")], **CLOSE
    )
    assert list(found["per_label"]) == list(report)
    for name, expected in report.items():
        got = [found["per_label"][name][k] for k in ("precision", "recall", "f1", "support")]
        assert got == pytest.approx(
            [float(expected[k]) for k in ("precision", "recall", "f1-score", "support")], **CLOSE
        )
    json.dumps(found)


TAGS = ["O", "O", *[f"{p}-{t}" for p in "BI" for t in ("name", "date", "phone_nb")]]
ODD_TAGS = [*TAGS, "B", "I", ".", "E-name", "S-name", "E-date", "S-date", "I-a-b"]


@pytest.mark.parametrize("tags", [TAGS, ODD_TAGS], ids=["BIO", "odd"])
@given(data=st.data())
def test_entities(tags, data):
    pairs = st.lists(st.tuples(st.sampled_from(tags), st.sampled_from(tags)), max_size=12)
    sequences = data.draw(st.lists(pairs, min_size=1, max_size=5).filter(any))
    truth, predictions = ([[pair[i] for pair in s] for s in sequences] for i in (0, 1))
    if any(any(tag != "O" for tag in s) for s in truth + predictions):
        check_entities(truth, predictions)


def test_entities_of_many_sequences():
    rng = np.random.default_rng(1)
    truth = [rng.choice(TAGS, n).tolist() for n in rng.integers(1, 40, 200)]
    predictions = [[t if rng.random() < 0.8 else str(rng.choice(TAGS)) for t in s] for s in truth]
    check_entities(truth, predictions)


@pytest.mark.parametrize(
    "truth, predictions",
    [
        ([["O", "O"]], [["O", "B-a"]]),  # no entity in the truth
        ([["B-a", "I-a"]], [["O", "O"]]),  # none predicted
        ([["B-a", "I-a"]], [["I-a", "I-a"]]),  # an I- that begins
        ([["B-a", "I-b"]], [["B-a", "I-a"]]),  # another type inside
        ([["B-a"], ["I-a"]], [["B-a"], ["B-a"]]),  # no entity runs over the end of a sequence
        ([[], ["B-a"]], [[], ["B-a"]]),  # an empty sequence
    ],
)
def test_degenerate_entities(truth, predictions):
    check_entities(truth, predictions)


def test_only_O():
    found = entity_scores([["O", "O"], ["O"]], [["O", "O"], ["O"]])
    assert found == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1, "per_label": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert seqeval.metrics.f1_score([["O", "O"], ["O"]], [["O", "O"], ["O"]]) == 0


def test_nothing_at_all():
    found = entity_scores([], [])
    assert found == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 0, "per_label": {}}
    for scores, empty in ((classification_scores, []), (multilabel_scores, np.zeros((0, 2)))):
        with pytest.raises(ValueError, match="expected at least one example"):
            scores(empty, empty, ["a", "b"])


def test_where_entities_lie():
    tags = ["I-a", "I-a", "B-a", "O", "S-b", "B-b", "E-b", "E-b"]
    assert entities(tags) == [("a", 0, 1), ("a", 2, 2), ("b", 4, 4), ("b", 5, 6), ("b", 7, 7)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: classification_scores([0, 1], [0], "ab"), "two .* arrays of one length"),
        (lambda: classification_scores([0, 2], [0, 1], "ab"), "truth: expected 0 to 1"),
        (lambda: multilabel_scores([[0, 1]], [[0.3, 1]], "ab"), "predictions: expected 0 and 1"),
        (lambda: multilabel_scores([[0, 1]], [[0, 1, 1]], "ab"), r"expected two \(1, 2\)"),
        (lambda: entity_scores([["O"]], []), "expected 1 sequences of tags, got 0"),
        (lambda: entity_scores([["O"]], [["O", "O"]]), "sequence 0: expected 1 tags"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_answers_by_hand():
    """SQuAD's words: case, punctuation, articles and blanks do not count."""
    truth = ["The left lung.", "a mild fever", "no", "rash"]
    predictions = ["left  Lung", "fever", "yes", ""]
    scores = answer_scores(truth, predictions)
    assert scores["exact_match"] == 1 / 4
    assert scores["f1"] == pytest.approx((1 + 2 * 1 / 3 + 0 + 0) / 4)
    assert answer_scores([], []) == {"f1": 0.0, "exact_match": 0.0}


def test_the_best_of_several_answers_counts():
    """As in SQuAD's evaluation; the best matches are worth 4/5, 1 and 0."""
    truth = [("mild fever", "a fever since May", "fever"), ("no", "none"), ("rash",)]
    scores = answer_scores(truth, ["fever since", "None.", "cough"])
    assert scores == pytest.approx({"f1": (4 / 5 + 1 + 0) / 3, "exact_match": 1 / 3})
