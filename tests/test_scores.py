"""Scores against scikit-learn and seqeval, on random and on degenerate labels."""

import json
import warnings

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, strategies as st

from train.finetune.scores import (
    answer_scores,
    classification_scores,
    entities,
    entity_scores,
    multilabel_scores,
)

CLOSE = {"rel": 0, "abs": 1e-12}


def sklearn_f1(truth, guess, average, **how):
    return sklearn.metrics.f1_score(truth, guess, average=average, zero_division=0, **how)


def check_per_label(found, truth, guess, names):
    expected = sklearn.metrics.precision_recall_fscore_support(
        truth, guess, labels=range(len(names)), average=None, zero_division=0
    )
    assert list(found) == list(names)
    for i, name in enumerate(names):
        got = [found[name][k] for k in ("precision", "recall", "f1", "support")]
        assert got == pytest.approx([float(column[i]) for column in expected], **CLOSE)


def check_classification(truth, guess, n):
    names = [f"label {i}" for i in range(n)]
    found = classification_scores(np.array(truth), np.array(guess), names)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess), **CLOSE)
    for average in ("weighted", "micro", "macro"):
        assert found[f"{average}_f1"] == pytest.approx(sklearn_f1(truth, guess, average), **CLOSE)
    check_per_label(found["per_label"], truth, guess, names)
    assert (
        found["confusion"]
        == sklearn.metrics.confusion_matrix(truth, guess, labels=range(n)).tolist()
    )
    json.dumps(found)


@given(st.data(), st.integers(2, 6), st.integers(1, 60))
def test_classification(data, n, rows):
    column = st.lists(st.integers(0, n - 1), min_size=rows, max_size=rows)
    check_classification(data.draw(column), data.draw(column), n)


@pytest.mark.parametrize(
    "truth, guess",
    [
        ([0, 0, 0], [0, 0, 0]),  # one class alone
        ([0, 0, 0], [1, 1, 2]),  # all wrong
        ([0, 1, 1], [0, 0, 0]),  # a class never guessed
        ([0, 0, 3], [3, 1, 3]),  # a class that occurs in neither
    ],
)
def test_classification_with_missing_classes(truth, guess):
    check_classification(truth, guess, 4)


def test_classification_of_many_rows():
    rng = np.random.default_rng(0)
    truth = rng.choice(14, 5000, p=rng.dirichlet(np.full(14, 0.3)))
    guess = np.where(rng.random(5000) < 0.6, truth, rng.integers(0, 14, 5000))
    check_classification(truth.tolist(), guess.tolist(), 14)


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
    truth, guess = (np.array(column) for column in zip(*rows, strict=True))
    names = [f"label {i}" for i in range(truth.shape[1])]
    found = multilabel_scores(truth, guess > 0, names)
    if len(names) > 1:  # scikit-learn takes a single column for single labels
        for average in ("weighted", "micro", "macro"):
            assert found[f"{average}_f1"] == pytest.approx(
                sklearn_f1(truth, guess, average), **CLOSE
            )
        assert found["accuracy"] == pytest.approx(
            sklearn.metrics.accuracy_score(truth, guess), **CLOSE
        )
        check_per_label(found["per_label"], truth, guess, names)
    for i, name in enumerate(names):
        assert found["per_label"][name]["f1"] == pytest.approx(
            sklearn_f1(truth[:, i], guess[:, i], "binary"), **CLOSE
        )
    json.dumps(found)


@pytest.mark.parametrize("truth, guess", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_multilabel_all_alike(truth, guess):
    truth, guess = np.full((4, 3), truth), np.full((4, 3), guess)
    found = multilabel_scores(truth, guess, "abc")
    for average in ("weighted", "micro", "macro"):
        assert found[f"{average}_f1"] == sklearn_f1(truth, guess, average)


# Entities


def seqeval_report(truth, guess):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are none, and of NumPy's types in seqeval
        report = seqeval.metrics.classification_report(
            truth, guess, output_dict=True, zero_division=0
        )
        accuracy = seqeval.metrics.accuracy_score(truth, guess)
    return report, accuracy


def check_entities(truth, guess):
    report, accuracy = seqeval_report(truth, guess)
    found = entity_scores(truth, guess)
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
    truth, guess = ([[pair[i] for pair in s] for s in sequences] for i in (0, 1))
    if any(any(tag != "O" for tag in s) for s in truth + guess):
        check_entities(truth, guess)


def test_entities_of_many_sequences():
    rng = np.random.default_rng(1)
    truth = [rng.choice(TAGS, n).tolist() for n in rng.integers(1, 40, 200)]
    guess = [[t if rng.random() < 0.8 else str(rng.choice(TAGS)) for t in s] for s in truth]
    check_entities(truth, guess)


@pytest.mark.parametrize(
    "truth, guess",
    [
        ([["O", "O"]], [["O", "B-a"]]),  # no entity in the truth
        ([["B-a", "I-a"]], [["O", "O"]]),  # none guessed
        ([["B-a", "I-a"]], [["I-a", "I-a"]]),  # an I- that begins
        ([["B-a", "I-b"]], [["B-a", "I-a"]]),  # another type inside
        ([["B-a"], ["I-a"]], [["B-a"], ["B-a"]]),  # no entity runs over the end of a sequence
        ([[], ["B-a"]], [[], ["B-a"]]),  # an empty sequence
    ],
)
def test_degenerate_entities(truth, guess):
    check_entities(truth, guess)


def test_only_O():
    found = entity_scores([["O", "O"], ["O"]], [["O", "O"], ["O"]])
    assert found == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1, "per_label": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert seqeval.metrics.f1_score([["O", "O"], ["O"]], [["O", "O"], ["O"]]) == 0


def test_nothing_at_all():
    found = entity_scores([], [])
    assert found == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 0, "per_label": {}}
    found = classification_scores([], [], ["a", "b"])
    assert found["accuracy"] == found["weighted_f1"] == found["macro_f1"] == 0
    assert found["confusion"] == [[0, 0], [0, 0]]
    assert multilabel_scores([], [], ["a", "b"])["micro_f1"] == 0


def test_where_entities_lie():
    tags = ["I-a", "I-a", "B-a", "O", "S-b", "B-b", "E-b", "E-b"]
    assert entities(tags) == [("a", 0, 1), ("a", 2, 2), ("b", 4, 4), ("b", 5, 6), ("b", 7, 7)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: classification_scores([0, 1], [0], "ab"), "two .* arrays alike"),
        (lambda: classification_scores([0, 2], [0, 1], "ab"), "truth: expected 0 to 1"),
        (lambda: multilabel_scores([[0, 1]], [[0.3, 1]], "ab"), "guess: expected 0 and 1"),
        (lambda: multilabel_scores([[0, 1]], [[0, 1, 1]], "ab"), r"expected two \(1, 2\)"),
        (lambda: entity_scores([["O"]], []), "as many guesses"),
        (lambda: entity_scores([["O"]], [["O", "O"]]), "sequence 0: expected 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_answers_by_hand():
    """SQuAD's words: case, punctuation, articles and blanks do not count."""
    truth = ["The left lung.", "a mild fever", "no", "rash"]
    guess = ["left  Lung", "fever", "yes", ""]
    scores = answer_scores(truth, guess)
    assert scores["exact_match"] == 1 / 4
    assert scores["f1"] == pytest.approx((1 + 2 * 1 / 3 + 0 + 0) / 4)
    assert answer_scores([], []) == {"f1": 0.0, "exact_match": 0.0}
