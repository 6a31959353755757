"""BERT's corruption, drawn on the host: of the tokens picked, 80 % [MASK], 10 % random, 10 % kept.

Seeded by (seed, epoch, document), so that a mask depends neither on packing nor on hosts.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Masking:
    """What is masked. special_ids are never picked unless mask_special; ids < vocab_size."""

    rate: float
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_special: bool = False


def mask_document(
    ids: np.ndarray, masking: Masking, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(corrupted ids, positions picked), both of one document; its `ids` are the labels there.

    Source: Devlin et al. 2019; the rates of ModernBERT's data collator.
    """
    rng = np.random.default_rng(seed)
    pick = rng.random(len(ids)) < masking.rate
    if not masking.mask_special:
        pick &= ~np.isin(ids, masking.special_ids)
    action = rng.random(len(ids))
    random_ids = rng.integers(0, masking.vocab_size, len(ids), dtype=ids.dtype)
    corrupted = np.where(pick & (action < 0.8), ids.dtype.type(masking.mask_id), ids)
    corrupted = np.where(pick & (action >= 0.8) & (action < 0.9), random_ids, corrupted)
    return corrupted, np.flatnonzero(pick)


def predicted_positions(row_length: int, rate: float) -> int:
    """P, the positions a row predicts: the mean plus six sigma, rounded up to 16."""
    mean = row_length * rate
    sigma = math.sqrt(row_length * rate * (1 - rate))
    return min(-(-math.ceil(mean + 6 * sigma) // 16) * 16, row_length)


def fit_positions(
    positions: np.ndarray, limit: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """At most `limit` of a row's picks, in order, and how many were dropped at random."""
    surplus = len(positions) - limit
    if surplus <= 0:
        return positions, 0
    keep = np.random.default_rng(seed).choice(len(positions), limit, replace=False)
    return positions[np.sort(keep)], surplus
