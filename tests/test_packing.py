"""Row plans: nothing lost, nothing twice, best fit, deterministic."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from modernbert_jax.packing import plan_rows


def fills(plan, lengths):
    return np.array([lengths[plan.row(r)].sum() for r in range(len(plan))])


def best_fit_decreasing(lengths, sequence_length):
    """The textbook loop: how much each row holds, sorted."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r, free in enumerate(room) if free >= length]
        if fitting:
            room[min(fitting, key=lambda r: room[r])] -= length
        else:
            room.append(sequence_length - length)
    return sorted(sequence_length - free for free in room)


@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    seed=st.none() | st.integers(0, 5),
)
def test_is_best_fit_and_loses_nothing(lengths, seed):
    lengths = np.array(lengths, np.int64)
    plan = plan_rows(lengths, 40, None if seed is None else (seed, 0))
    assert sorted(plan.documents) == list(range(len(lengths)))
    assert sorted(fills(plan, lengths)) == best_fit_decreasing(lengths, 40)


def test_real_lengths_leave_no_padding_to_speak_of():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1, 50_000).astype(int), 3, 8192)
    plan = plan_rows(lengths, 8192, (17, 0))
    assert fills(plan, lengths).mean() / 8192 > 0.999


def test_same_seed_same_plan_other_epoch_other_plan():
    lengths = np.random.default_rng(0).integers(3, 100, 1000)
    one, again, other = (plan_rows(lengths, 128, (17, e)) for e in (0, 0, 1))
    np.testing.assert_array_equal(one.documents, again.documents)
    np.testing.assert_array_equal(one.starts, again.starts)
    assert (one.documents != other.documents).mean() > 0.9


def test_no_documents_make_no_rows():
    assert len(plan_rows(np.array([], int), 8)) == 0


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_refuses_lengths_that_fit_no_row(lengths):
    with pytest.raises(ValueError, match="expected 1 to 8 tokens per document"):
        plan_rows(np.array(lengths), 8)
