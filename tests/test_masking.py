"""Corruption: rates, what is never touched, seeds, and P."""

import numpy as np
import pytest

from train.masking import Masking, fit_positions, mask_document, predicted_positions

MASKING = Masking(rate=0.3, mask_id=4, vocab_size=1000, special_ids=(0, 1, 2, 3, 4))
IDS = np.random.default_rng(0).integers(5, 1000, 100_000).astype(np.int32)


@pytest.mark.parametrize("rate", [0.15, 0.30])
def test_rates_of_80_10_10(rate):
    """Within five standard deviations of the binomial."""
    masking = Masking(rate, 4, 1000, (0, 1, 2, 3, 4))
    corrupted, picked = mask_document(IDS, masking, (17, 0, 3))
    n = len(IDS)
    close = lambda got, p, of: abs(got - p * of) < 5 * np.sqrt(of * p * (1 - p))  # noqa: E731
    assert close(len(picked), rate, n)
    here = corrupted[picked]
    masked = (here == 4).sum()
    kept = (here == IDS[picked]).sum()
    assert close(masked, 0.8 + 0.1 / 1000, len(picked))
    assert close(kept, 0.1 + 0.1 / 1000, len(picked))
    untouched = np.setdiff1d(np.arange(n), picked)
    np.testing.assert_array_equal(corrupted[untouched], IDS[untouched])
    random = here[(here != 4) & (here != IDS[picked])]
    assert random.min() < 20 and random.max() > 980 and abs(random.mean() - 500) < 20


def test_special_tokens_are_masked_only_when_asked():
    ids = np.tile(np.array([0, 7, 8, 1], np.int32), 5000)
    _, picked = mask_document(ids, MASKING, (1,))
    assert set(ids[picked]) == {7, 8}
    asked = Masking(**{**MASKING.__dict__, "mask_special": True})
    _, picked = mask_document(ids, asked, (1,))
    assert set(ids[picked]) == {0, 1, 7, 8}


def test_seeded_per_record():
    one, again, other = (mask_document(IDS, MASKING, (17, 0, d)) for d in (5, 5, 6))
    np.testing.assert_array_equal(one[0], again[0])
    assert (one[0] != other[0]).any()


def test_predicted_positions():
    """Mean plus six sigma, up to 16: for 8192 tokens at 30 % 2457.6 + 6 * 41.48 = 2706.5."""
    assert predicted_positions(8192, 0.30) == 2720
    assert predicted_positions(8192, 0.15) == 1424  # 1228.8 + 6 * 32.32 = 1422.7
    assert predicted_positions(16, 0.9) == 16


def test_surplus_is_dropped_at_random_and_counted():
    positions = np.arange(100) * 3
    kept, dropped = fit_positions(positions, 60, (1, 2))
    assert dropped == 40 and len(kept) == 60
    assert (np.diff(kept) > 0).all() and set(kept) <= set(positions)
    assert kept.max() > 250  # not simply the first sixty
    same, none = fit_positions(positions, 100, (1, 2))
    assert none == 0 and same is positions
