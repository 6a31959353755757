"""From examples to token ids and targets, from batches to packed rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from modernbert_jax.packing import IGNORE_INDEX, fill_rows, placed, plan_rows, row_size

from .tasks.task import KIND, Example

# The likeliest answer has at most this many tokens, as in transformers' question answering.
LONGEST_ANSWER = 30


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of an example and what the model should predict.

    input_ids: with special tokens. target: a label index (classification), 0 or 1 per label
    (multilabel), a label index or IGNORE_INDEX per token (tokens), or the first and last token of
    the answer (qa). For qa only: context is the text with the offsets of each token in it (None for
    special tokens and those of the question), answer the expected text, other_answers further ones.
    truncated: whether the example had more tokens.
    """

    input_ids: np.ndarray
    target: Any
    context: tuple[str, list[tuple[int, int] | None]] | None = None
    answer: str = ""
    truncated: bool = False
    other_answers: tuple[str, ...] = ()


def encode(
    examples: Sequence[Example], tokenizer: Any, kind: KIND, max_length: int
) -> list[Encoded]:
    """Tokenizes examples, truncated to max_length tokens.

    In a task of kind "tokens" the first token of a word carries its label, the others IGNORE_INDEX.
    A special token in a text, such as "[SEP]", is text like any other.
    """
    options = {"truncation": True, "max_length": max_length, "split_special_tokens": True}
    one = {"tokens": _encode_words, "qa": _encode_question}.get(kind, _encode_text)
    encoded: list[Encoded] = []
    for start in range(0, len(examples), 256):
        chunk = examples[start : start + 256]
        if kind == "tokens":
            batch = tokenizer([list(e.words) for e in chunk], is_split_into_words=True, **options)
        else:
            texts: list[list[str]] = [[e.text for e in chunk]]
            if any(e.text_pair is not None for e in chunk):
                texts.append([e.text_pair or "" for e in chunk])
            if kind == "qa":
                options["return_offsets_mapping"] = True
            batch = tokenizer(*texts, **options)
        for i, example in enumerate(chunk):
            # Only fast tokenizers have encodings.
            truncated = bool(batch.encodings and batch.encodings[i].overflowing)
            encoded.append(dataclasses.replace(one(batch, i, example), truncated=truncated))
    return encoded


def _ids(batch: Any, i: int) -> np.ndarray:
    return np.asarray(batch["input_ids"][i], np.int32)


def _encode_text(batch: Any, i: int, example: Example) -> Encoded:
    return Encoded(_ids(batch, i), example.label)


def _encode_words(batch: Any, i: int, example: Example) -> Encoded:
    assert isinstance(example.label, tuple)
    words = batch.word_ids(i)
    target = [
        IGNORE_INDEX if word is None or word == before else example.label[word]
        for word, before in zip(words, [None, *words[:-1]], strict=True)
    ]
    return Encoded(_ids(batch, i), np.asarray(target, np.int32))


def _encode_question(batch: Any, i: int, example: Example) -> Encoded:
    assert isinstance(example.label, tuple) and example.text_pair is not None
    parts = zip(batch["offset_mapping"][i], batch.sequence_ids(i), strict=True)
    offsets: list[Any] = [tuple(offset) if part == 1 else None for offset, part in parts]
    start, end = example.label
    inside = [n for n, o in enumerate(offsets) if o and o[0] < end and o[1] > start]
    # An answer that was truncated away has no target.
    target = [inside[0], inside[-1]] if inside else [IGNORE_INDEX, IGNORE_INDEX]
    answer = example.text_pair[start:end]
    context = example.text_pair, offsets
    others = example.other_answers
    return Encoded(_ids(batch, i), np.asarray(target), context, answer, other_answers=others)


def answer_of(encoded: Encoded, logits_T2: np.ndarray, longest: int = LONGEST_ANSWER) -> str:
    """The most likely answer: the span of the context with the highest start plus end logit."""
    assert encoded.context is not None
    text, offsets = encoded.context
    own = np.asarray([offset is not None for offset in offsets])
    start, end = (np.where(own, logits_T2[:, k], -np.inf) for k in (0, 1))
    scores = start[:, None] + end[None, :]
    spans = np.tri(len(own), len(own), longest - 1, bool) & ~np.tri(len(own), k=-1, dtype=bool)
    scores = np.where(spans, scores, -np.inf)
    if not np.isfinite(scores).any():
        return ""
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    from_, to = offsets[first], offsets[last]
    assert from_ is not None and to is not None
    return text[from_[0] : to[1]]


def pack(
    batch: Sequence[Encoded], slots: int, kind: KIND, labels: int
) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]:
    """Packs a batch into rows: {"input_ids", "segment_ids", "targets"}, and where each example is.

    The rows are [R, T]: T is a power of two from 128 on that holds the longest example, R one of 1,
    2, 3, 4, 6, 8, 12, and so on; few shapes mean few compilations. targets are [R, slots]
    (classification), [R, slots, labels] (multilabel), [R, T] (tokens) or [R, slots, 2] positions in
    the row (qa), with IGNORE_INDEX in unused entries. Each example is at (row, segment counted from
    0, position of its first token).
    """
    lengths = np.asarray([len(e.input_ids) for e in batch])
    width = row_size(int(lengths.max()), smallest=128, per_octave=1)
    plan = plan_rows(lengths, width)
    rows = [plan.row(r).tolist() for r in range(len(plan))]
    rows += [[]] * (row_size(len(rows), smallest=1, per_octave=2) - len(rows))
    input_ids, segment_ids = fill_rows([e.input_ids for e in batch], rows, width)
    shapes = {"classification": (), "multilabel": (labels,), "qa": (2,)}
    shape = (len(rows), width) if kind == "tokens" else (len(rows), slots, *shapes[kind])
    targets = np.full(shape, IGNORE_INDEX, np.int32)
    where = [(0, 0, 0)] * len(batch)
    for r, segment, start, i in placed(rows, lambda i: len(batch[i].input_ids)):
        target = batch[i].target
        if kind == "tokens":
            targets[r, start : start + len(batch[i].input_ids)] = target
        elif kind == "qa":
            targets[r, segment] = np.where(target == IGNORE_INDEX, IGNORE_INDEX, target + start)
        else:
            targets[r, segment] = target
        where[i] = (r, segment, start)
    return {"input_ids": input_ids, "segment_ids": segment_ids, "targets": targets}, where
