"""Packing is an index: document lengths and a seed make a row plan, the same on every host."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

IGNORE_INDEX = -100  # the label of a position that no loss counts, the default of PyTorch
SLOT_TOKENS = 16  # tokens of a row per segment slot; see segment_slots


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Row r packs the documents `documents[starts[r]:starts[r + 1]]`, in order."""

    documents: np.ndarray
    starts: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, r: int) -> np.ndarray:
        """Returns the documents of row r, in order."""
        return self.documents[self.starts[r] : self.starts[r + 1]]


def plan_rows(
    lengths: np.ndarray, sequence_length: int, seed: tuple[int, ...] | None = None
) -> RowPlan:
    """Assigns each document to the fullest row with room for it, longest documents first.

    lengths: in tokens. seed: for example (seed, epoch), shuffles documents of equal length and the
    order of the rows; None keeps the given order as far as possible. Documents of equal length are
    placed together, so the cost is about one array operation per pair of a length and a free space,
    not one step per document. Raises ValueError for a document that is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and (lengths.min() < 1 or lengths.max() > sequence_length):
        worst = lengths.min() if lengths.min() < 1 else lengths.max()
        raise ValueError(
            f"lengths: expected 1 to {sequence_length} tokens per document, got {worst}"
        )
    rng = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = np.empty(len(lengths), np.int64)  # in `order`
    # The numbers of the rows with each amount of room left.
    free: list[list[np.ndarray]] = [[] for _ in range(sequence_length + 1)]
    some = np.zeros(sequence_length + 1, bool)
    rows = 0

    def put_back(space: int, numbers: np.ndarray) -> None:
        if space and len(numbers):
            free[space].append(numbers)
            some[space] = True

    values, firsts = np.unique(-lengths[order], return_index=True)
    for length, first, last in zip(-values, firsts, [*firsts, len(order)][1:], strict=True):
        while first < last:
            space = int(length + np.argmax(some[length:]))
            if some[space]:
                taken = free[space].pop()
                some[space] = bool(free[space])
            else:  # open as many rows as the remaining documents of this length need
                space = sequence_length
                taken = rows + np.arange(-(-(last - first) // (space // length)))
                rows += len(taken)
            # No free space lies between `length` and `space`, so best fit fills one row at a time.
            a_row = space // length
            count = min(last - first, len(taken) * a_row)
            row_of[first : first + count] = np.repeat(taken, a_row)[:count]
            first += count
            full, rest = divmod(count, a_row)
            put_back(space - a_row * length, taken[:full])
            put_back(space - rest * length, taken[full : full + (rest > 0)])
            put_back(space, taken[full + (rest > 0) :])

    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=rows)
    documents, starts = order[by_row], np.concatenate([[0], np.cumsum(counts)])
    if rng is None:
        return RowPlan(documents, starts, sequence_length)
    shuffled = rng.permutation(rows)
    new_starts = np.concatenate([[0], np.cumsum(counts[shuffled])])
    within = np.arange(len(documents)) - np.repeat(new_starts[:-1], counts[shuffled])
    return RowPlan(
        documents[np.repeat(starts[shuffled], counts[shuffled]) + within],
        new_starts,
        sequence_length,
    )


def row_size(tokens: int, smallest: int = 64, per_octave: int = 4) -> int:
    """The length of the row that `tokens` are padded to, from a short list of sizes.

    Few sizes mean few compilations. From `smallest` (a power of two) on there are `per_octave`
    sizes between a power of two and the next, so that with 4 at most a fifth of a row is padding.
    """
    octave = 2 ** max(smallest.bit_length() - 1, math.ceil(math.log2(max(tokens, 1))) - 1)
    steps = range(per_octave, 2 * per_octave + 1)
    return next(size for k in steps if (size := octave * k // per_octave) >= tokens)


def segment_slots(sequence_length: int, texts: int = 1) -> int:
    """Returns the padded number of segments of a row, one of few numbers to limit compilations.

    One segment per SLOT_TOKENS is enough for most rows; rows with more texts get more.
    """
    slots = sequence_length // SLOT_TOKENS
    return slots if texts <= slots else 2 ** (texts - 1).bit_length()


def batch_rows(
    lengths: Sequence[int], rows: int, batch_tokens: int, texts: int | None = None
) -> Iterator[list[list[int]]]:
    """Yields batches for inference: `rows` lists of text indices each, the longest texts first.

    Texts in one row have similar lengths. A row holds at most batch_tokens, or a single longer
    text, and at most `texts` texts. The last batch may have empty rows.
    """
    batch: list[list[int]] = [[]]
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = filled + lengths[i] > batch_tokens or len(batch[-1]) == texts
        if batch[-1] and full:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            filled = 0
        batch[-1].append(i)
        filled += lengths[i]
    if batch[0]:
        yield batch + [[] for _ in range(rows - len(batch))]


def fill_rows(
    texts: Sequence[Sequence[int] | np.ndarray],
    rows: Sequence[Sequence[int] | np.ndarray],
    size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Packs texts into input_ids_BL and segment_ids_BL.

    texts: token ids. rows: for each row the indices of its texts, which get the segment ids 1, 2,
    and so on. size: L, by default the `row_size` of the fullest row.
    """
    size = size or row_size(max(sum(len(texts[i]) for i in row) for row in rows))
    input_ids_BL, segment_ids_BL = np.zeros((2, len(rows), size), np.int32)
    for r, segment, start, i in placed(rows, lambda i: len(texts[i])):
        end = start + len(texts[i])
        input_ids_BL[r, start:end], segment_ids_BL[r, start:end] = texts[i], segment + 1
    return input_ids_BL, segment_ids_BL


def placed(
    rows: Sequence[Sequence[int] | np.ndarray], length: Callable[[int], int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yields (row, segment counted from 0, first position, index) of each text of `fill_rows`.

    length: the number of tokens of the text of an index.
    """
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row):
            yield r, segment, start, int(i)
            start += length(i)
