"""Exact-text deduplication by keys: 16 bytes of a text's sha256 stand for it.

Keys lie in files, one file a job, so that only one hash partition of them is in memory at a time.
"""

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

# high decides the split, as text.split_of has it; low decides the partition; size in bytes of text.
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<u4")])
AT_ONCE = 8_000_000  # keys in memory, about 50 bytes each


def key_of(encoded: bytes) -> tuple[int, int, int]:
    """A KEY of a text in UTF-8."""
    digest = hashlib.sha256(encoded).digest()
    high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
    return high, low, len(encoded)


def first_of_each(files: Sequence[pathlib.Path]) -> list[np.ndarray]:
    """For each file of keys, which of them occur there first, in order of the files: bool [keys].

    Memory is that of AT_ONCE keys, plus one byte a key: all are read once for each partition.
    """
    keys = [np.load(file, mmap_mode="r") for file in files]
    masks = [np.zeros(len(k), bool) for k in keys]
    partitions = -(-sum(map(len, keys)) // AT_ONCE)
    for partition in range(partitions):
        chosen = [np.flatnonzero(k["low"] % partitions == partition) for k in keys]
        high = np.concatenate([k["high"][c] for k, c in zip(keys, chosen, strict=True)])
        low = np.concatenate([k["low"][c] for k, c in zip(keys, chosen, strict=True)])
        order = np.lexsort((high, low))  # stable: the first in order of the files comes first
        new = np.ones(len(order), bool)
        new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
        first = np.zeros(len(order), bool)
        first[order[new]] = True
        ends = np.cumsum([len(c) for c in chosen])
        for mask, places, part in zip(masks, chosen, np.split(first, ends[:-1]), strict=True):
            mask[places] = part
    return masks
