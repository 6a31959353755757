"""Deduplication by keys: 16 bytes of the sha256 of a text in NFC, as tokenizers see it.

Keys are stored in files, one for each job, so that memory holds one hash partition at a time.
"""

import hashlib
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

# high decides the split; low decides the partition; size in bytes of NFC.
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<u4")])
AT_ONCE = 8_000_000  # keys in memory, about 50 bytes each


def key_of(text: str) -> tuple[int, int, int]:
    """The KEY of a text. Its canonical equivalents (NFC, NFD) have the same key.

    Raises UnicodeEncodeError for a text with lone surrogates.
    """
    # ModernBERT's tokenizer applies NFC, so texts that differ only in form give the same ids.
    encoded = unicodedata.normalize("NFC", text).encode()
    digest = hashlib.sha256(encoded).digest()
    high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
    return high, low, len(encoded)


def is_eval(high: Any, eval_fraction: float) -> Any:
    """Whether a text with this key is in the evaluation split. Takes an integer or an array."""
    return high / 2**64 < eval_fraction


def first_of_each(files: Sequence[pathlib.Path]) -> list[np.ndarray]:
    """Marks the first occurrence of each key, in the order of the files: bool [keys] for each file.

    Memory holds AT_ONCE keys, plus one byte for every key. Each partition reads all files once.
    """
    keys = [np.load(file, mmap_mode="r") for file in files]
    masks = [np.zeros(len(k), bool) for k in keys]
    partitions = -(-sum(map(len, keys)) // AT_ONCE)
    for partition in range(partitions):
        chosen = [np.flatnonzero(k["low"] % partitions == partition) for k in keys]
        some = np.concatenate([k[c] for k, c in zip(keys, chosen, strict=True)])
        order = np.lexsort((some["high"], some["low"]))  # stable: earlier files come first
        high, low = some["high"][order], some["low"][order]
        new = np.ones(len(order), bool)
        new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        first = np.zeros(len(order), bool)
        first[order[new]] = True
        ends = np.cumsum([len(c) for c in chosen])
        for mask, positions, part in zip(masks, chosen, np.split(first, ends[:-1]), strict=True):
            mask[positions] = part
    return masks
