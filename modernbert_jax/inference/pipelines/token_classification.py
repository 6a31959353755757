"""Token classification: the entities of texts of any length."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.heads import ModernBertForTokenClassification
from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.pipelines.base import Pipeline, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STRATEGIES = ("none", "simple", "first", "average", "max")


class TokenClassification(Pipeline):
    """`pipe("Seen by Dr. Low.")`: the entities of a text of any length.

    Results are those of transformers' TokenClassificationPipeline: {"entity", "score", "index",
    "word", "start", "end"} per token, or {"entity_group", "score", "word", "start", "end"} with an
    aggregation_strategy ("simple", "first", "average", "max"). start and end are character offsets
    in the text as it was passed.

    A text longer than the model supports is read in windows that overlap by `stride` tokens. Each
    token's label comes from the window that gives it the most context, so an entity across an edge
    is found in one part. Words end at any white space (in transformers only at a space, but notes
    have lines).
    """

    model_class: type = ModernBertForTokenClassification
    task: str = "token-classification"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        aggregation_strategy: str = "none",
        stride: int | None = None,
        max_length: int | None = None,
        ignore_labels: Sequence[str] = ("O",),
        batch_tokens: int | None = None,
    ):
        """max_length: of a window, in tokens; by default the smaller of the model's and the
        tokenizer's limit. stride: by default 256, or half of a shorter window."""
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        if aggregation_strategy not in STRATEGIES:
            raise ValueError(
                f"aggregation_strategy: expected {', '.join(STRATEGIES)}, got "
                f"{aggregation_strategy!r}"
            )
        if isinstance(ignore_labels, str):
            raise ValueError(f"ignore_labels: expected a list of labels, got {ignore_labels!r}")
        self.aggregation_strategy, self.ignore_labels = aggregation_strategy, ignore_labels
        empty = tokenizer("")["input_ids"]  # [CLS] [SEP]
        self._before, self._after = empty[:1], empty[1:]
        if max_length is None:
            max_length = self.max_length
        limits = len(empty) + 1, self.max_length
        self.window = whole_number("max_length", max_length, *limits) - len(empty)
        if stride is None:
            stride = min(256, self.window // 2)
        self.stride = whole_number("stride", stride, 0, self.window - 1)

    def _function(self):
        def probabilities(params, input_ids_BL, segment_ids_BL):
            model = self._build(params)
            return jax.nn.softmax(model(input_ids_BL, segment_ids=segment_ids_BL).logits, axis=-1)

        return probabilities, ()

    def __call__(
        self, inputs: str | Sequence[str], *, show_progress_bar: bool | None = None
    ) -> list[Any]:
        """Returns the entities of a text, or a list of those of each text, in order of offset."""
        texts = texts_of(inputs)
        encoded = [
            self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for text in texts
        ]
        scores = self._scores([e["input_ids"] for e in encoded], show_progress_bar)
        found = [self._entities(*args) for args in zip(texts, encoded, scores, strict=True)]
        return found[0] if isinstance(inputs, str) else found

    def _scores(
        self, texts: Sequence[Sequence[int]], show_progress_bar: bool | None
    ) -> list[np.ndarray]:
        """Returns the probabilities [tokens, labels] of each text, computed in windows."""
        windows: list[tuple[int, int, int, int]] = []  # text, first token, and the tokens to keep
        ids: list[list[int]] = []
        for t, tokens in enumerate(texts):
            for start, end, keep, until in split_windows(len(tokens), self.window, self.stride):
                windows.append((t, start, keep, until))
                ids.append([*self._before, *tokens[start:end], *self._after])
        scores = [np.zeros((len(tokens), self.model.config.num_labels)) for tokens in texts]
        for w, p_LE in self._by_token(ids, show_progress_bar):
            t, start, keep, until = windows[w]
            shift = len(self._before) - start
            scores[t][keep:until] = p_LE[keep + shift : until + shift]
        return scores

    def _entities(self, text: str, encoded: Any, scores_LE: np.ndarray) -> list[dict[str, Any]]:
        strategy = self.aggregation_strategy
        tokens = self.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        spans = [
            {"tokens": [token], "p": p, "start": start, "end": end}
            for token, (start, end), p in zip(
                tokens, encoded["offset_mapping"], scores_LE, strict=True
            )
        ]
        if strategy not in ("none", "simple"):
            spans = [_word(group, strategy) for group in split_words(text, spans)]
        labeled = []
        for index, span in enumerate(spans, start=len(self._before)):
            best = int(span["p"].argmax())
            label, score = self.model.config.id2label[best], float(span["p"][best])
            labeled.append({**span, "entity": label, "score": score, "index": index})
        if strategy == "none":
            return [
                {k: s[k] for k in ("entity", "score", "index")}
                | {"word": s["tokens"][0], "start": s["start"], "end": s["end"]}
                for s in labeled
                if s["entity"] not in self.ignore_labels
            ]
        decoder = self.tokenizer.backend_tokenizer.decoder
        groups = [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": float(np.mean([s["score"] for s in group])),
                "word": decoder.decode([t for s in group for t in s["tokens"]]),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in _runs(labeled)
        ]
        return [g for g in groups if g["entity_group"] not in self.ignore_labels]


def split_windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Returns windows over a text as token positions: (start, end, keep from, keep until).

    Every window has `window` tokens unless the text is shorter. Neighbors share at least `stride`
    tokens, and the tokens kept from two neighbors meet in the middle of those.
    """
    if tokens <= window:
        return [(0, tokens, 0, tokens)]
    starts = [*range(0, tokens - window, window - stride), tokens - window]
    cuts = [0, *((a + window + b) // 2 for a, b in zip(starts, starts[1:], strict=False)), tokens]
    return [(s, s + window, cuts[n], cuts[n + 1]) for n, s in enumerate(starts)]


def split_words(text: str, spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups the tokens of a text by words, which white space separates."""
    groups: list[list[dict[str, Any]]] = []
    for span in spans:
        start = span["start"]
        if not groups or start == 0 or re.search(r"\s", text[start - 1 : start + 1]):
            groups.append([])
        groups[-1].append(span)
    return groups


def _word(group: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
    p = np.stack([span["p"] for span in group])
    best = {"first": p[0], "max": p[p.max(-1).argmax()], "average": p.mean(0)}[strategy]
    tokens = [token for span in group for token in span["tokens"]]
    return {"tokens": tokens, "p": best, "start": group[0]["start"], "end": group[-1]["end"]}


def _runs(spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups neighbors of one entity type; a B- label starts a new group."""
    groups: list[list[dict[str, Any]]] = []
    previous = None
    for span in spans:
        label = span["entity"]
        begins, kind = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
        if begins or kind != previous:
            groups.append([])
        groups[-1].append(span)
        previous = kind
    return groups
