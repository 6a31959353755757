"""Corruption: rates, what is never touched, seeds, and P."""

import numpy as np
import pytest

from train.pretrain.masking import (
    Masking,
    _mix,
    corrupt,
    fit_positions,
    pick_positions,
    predicted_positions,
    token_draws,
)

MASKING = Masking(rate=0.3, mask_id=4, vocab_size=1000, special_ids=(0, 1, 2, 3, 4))
IDS = np.random.default_rng(0).integers(5, 1000, 100_000).astype(np.int32)


def mask_document(ids, masking, seed):
    """(corrupted ids, selected positions) of one document; seed ends with its number."""
    draws = token_draws(np.array(seed[-1:]), np.array([len(ids)]), seed[:-1])
    picked = pick_positions(ids, draws, masking)
    return corrupt(ids, picked, draws, masking), picked


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


def test_random_tokens_exist():
    """Ids with gaps: each that exists is drawn equally often; without gaps nothing changes."""
    absent = (5, 6, 7, 500, 998)
    gaps = Masking(0.9, 4, 1000, (), absent_ids=absent)
    ids = np.full(400_000, 8, np.int32)
    draws = token_draws(np.array([0]), np.array([len(ids)]), (17,))
    picked = pick_positions(ids, draws, gaps)
    counts = np.bincount(corrupt(ids, picked, draws, gaps), minlength=1000)
    assert not counts[list(absent)].any()
    others = np.setdiff1d(np.arange(1000), [*absent, 4, 8])
    mean = 0.1 * len(picked) / 995  # 36 each
    assert (abs(counts[others] - mean) < 6 * np.sqrt(mean)).all()
    full = Masking(0.9, 4, 995, ())
    dense = corrupt(ids, picked, draws, full)
    chosen = (dense != 4) & (dense != 8)
    numbers = np.setdiff1d(np.arange(1000), absent)  # the rank-th id that exists
    np.testing.assert_array_equal(numbers[dense[chosen]], corrupt(ids, picked, draws, gaps)[chosen])


def test_a_mask_depends_on_no_neighbour():
    """Documents of a row, in any order, are drawn as each is alone."""
    lengths = np.array([300, 1, 57, 2000])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        ids = np.concatenate([IDS[: lengths[d]] for d in order])
        draws = token_draws(np.array(order), lengths[order], (17, 0))
        picked = pick_positions(ids, draws, MASKING)
        corrupted = corrupt(ids, picked, draws, MASKING)
        alone = [mask_document(IDS[: lengths[d]], MASKING, (17, 0, d)) for d in order]
        np.testing.assert_array_equal(corrupted, np.concatenate([a for a, _ in alone]))
        starts = np.cumsum(lengths[order]) - lengths[order]
        want = np.concatenate([p + s for (_, p), s in zip(alone, starts, strict=True)])
        np.testing.assert_array_equal(picked, want)


def test_draws_are_splitmix64_and_look_random():
    """Known answers of the published generator, seeded with 1234567; then counts of bits."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _mix(states).tolist() == known
    lengths = np.full(2000, 100)
    draws = token_draws(np.arange(2000), lengths, (17, 3)).reshape(2000, 100)
    assert len(np.unique(draws)) == draws.size
    other = token_draws(np.arange(2000), lengths, (17, 4)).reshape(2000, 100)
    pairs = [(draws, other), (draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])]
    for one, two in pairs:  # epochs, documents, places
        for bit in range(64):
            same = ((one ^ two) >> np.uint64(bit) & np.uint64(1)).mean()
            assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(one.size)


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
