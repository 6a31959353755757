"""BERT's masking, drawn on the host: of the selected tokens 80 % [MASK], 10 % random, 10 % kept.

Each token has one 64-bit number, a function of (seed, document, position in the document) alone, so
that a mask depends neither on packing nor on hosts, and a whole sequence is drawn at once.
"""

import dataclasses
import math

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step: 2^64 over the golden ratio, odd


@dataclasses.dataclass(frozen=True)
class Masking:
    """What is masked. special_ids are never selected unless mask_special; ids < vocab_size.

    absent_ids: those below vocab_size that no token has, in order; no random token is one of them.
    """

    rate: float
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_special: bool = False
    absent_ids: tuple[int, ...] = ()


def token_draws(documents: np.ndarray, lengths: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Returns a random uint64 for each token of these documents, one document after the other.

    Each document has its own SplitMix64 stream (Steele, Lea and Flood 2014), whose start is drawn
    from the seed and the document's number.
    """
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    streams = _mix(key + (documents.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
    offsets = np.arange(1, lengths.sum() + 1, dtype=np.uint64)
    return _mix(np.repeat(streams - starts * _GOLDEN, lengths) + offsets * _GOLDEN)


def pick_positions(ids: np.ndarray, draws: np.ndarray, masking: Masking) -> np.ndarray:
    """Returns the positions to predict: each with probability `rate`, by its draw's upper half."""
    picked = np.flatnonzero(draws >> np.uint64(32) < np.uint64(round(masking.rate * 2**32)))
    if masking.mask_special:
        return picked
    return picked[~np.isin(ids[picked], masking.special_ids)]


def corrupt(ids: np.ndarray, picked: np.ndarray, draws: np.ndarray, masking: Masking) -> np.ndarray:
    """Returns the ids with those picked replaced, or not, by the lower half of their draws.

    Source: Devlin et al. 2019; the rates of ModernBERT's data collator.
    """
    corrupted = ids.copy()
    action = draws[picked] & np.uint64(2**32 - 1)
    corrupted[picked[action < int(0.8 * 2**32)]] = masking.mask_id
    chosen = picked[(action >= int(0.8 * 2**32)) & (action < int(0.9 * 2**32))]
    absent = np.array(masking.absent_ids, np.int64)
    present = np.uint64(masking.vocab_size - len(absent))
    rank = (_mix(draws[chosen] + _GOLDEN) % present).astype(np.int64)
    # The rank-th id that exists: shifted by the absent ids below it.
    corrupted[chosen] = rank + np.searchsorted(absent - np.arange(len(absent)), rank, "right")
    return corrupted


def predicted_positions(sequence_length: int, rate: float) -> int:
    """Returns P, the predictions per sequence: the mean plus six sigma, rounded up to 16."""
    mean = sequence_length * rate
    sigma = math.sqrt(sequence_length * rate * (1 - rate))
    return min(-(-math.ceil(mean + 6 * sigma) // 16) * 16, sequence_length)


def fit_positions(
    positions: np.ndarray, limit: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Returns at most `limit` of a sequence's positions, in order, and how many were dropped."""
    surplus = len(positions) - limit
    if surplus <= 0:
        return positions, 0
    keep = np.random.default_rng(seed).choice(len(positions), limit, replace=False)
    return positions[np.sort(keep)], surplus


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
