"""Texts in, answers in transformers' form out: fill-mask, text- and token-classification."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.heads import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert_jax.inference.embedder import progress
from modernbert_jax.inference.export import Function, batch_tokens_here, load, save
from modernbert_jax.packing import batch_rows, fill_rows, segment_slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What transformers' pipeline takes, and what stands for it here.
NOT_TAKEN = {
    name: "expected none, jax's default device computes; for another, call within "
    "`with jax.default_device(d)`"
    for name in ("device", "device_map")
} | {"batch_size": "expected none, texts are packed into rows; batch_tokens=N sets their size"}


def pipeline(
    task: str = "",
    model: Any = None,
    tokenizer: PreTrainedTokenizerFast | str | os.PathLike[str] | None = None,
    *,
    compile_cache: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    param_dtype: Any = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """transformers' entry: "fill-mask", "text-classification", "token-classification" (or "ner").

    model: a folder, a hub id, or a model of the task's class with a tokenizer beside it.
    dtype, torch_dtype, param_dtype, revision: as for from_pretrained.
    compile_cache: a folder that keeps compiled programs for later processes. options: those of the
    class, FillMask, TextClassification or TokenClassification. Raises ValueError for another task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected {', '.join(TASKS)}, got {task!r}; Embedder makes vectors")
    for name in NOT_TAKEN.keys() & options.keys():
        raise TypeError(f"{name}: {NOT_TAKEN[name]}")
    loading = {
        "dtype": dtype,
        "torch_dtype": torch_dtype,
        "param_dtype": param_dtype,
        "revision": revision,
    }
    cls = TASKS[task]
    return cls(*load(cls.model_class, model, tokenizer, loading, compile_cache), **options)


class _Pipeline:
    """What the three share: texts become token ids, packed rows, and one compiled function."""

    model_class: type
    task: str

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        batch_tokens: int | None = None,
    ):
        """folder: where exported functions may be. batch_tokens: of a packed row, at most; by
        default 16,384, on a CPU 512."""
        self.model: Any = model
        self.tokenizer: PreTrainedTokenizerFast = tokenizer
        self.batch_tokens: int = batch_tokens or batch_tokens_here()
        self.longest: int = model.config.max_position_embeddings
        self._params = flatten(model)
        call, statics = self._function()
        self._run = Function(self.task, call, model.config, folder, statics)

    def _function(self) -> tuple[Callable[..., jax.Array], tuple[int, ...]]:
        """f(params, ids_BL, segments_BL, ...) and which of its arguments are ints."""
        raise NotImplementedError

    def _too_long(self, tokens: int, remedy: str) -> None:
        if tokens > self.longest:
            raise ValueError(f"text: {tokens:,} tokens, the model takes {self.longest:,}; {remedy}")

    def _rows(
        self, ids: Sequence[Sequence[int]], show: bool | None
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Rows of texts alike in length: (which texts, ids_BL, segments_BL), B is 1."""
        batches = list(batch_rows([len(i) for i in ids], 1, self.batch_tokens))
        for rows in progress(self.task, batches, len(ids), show):
            yield rows[0], *fill_rows(ids, rows)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model and its function for one text of so many tokens; the rows' sizes.

        `pipeline(task, folder)` then uses them. platforms: "cpu", "cuda", "tpu"; by default the one
        at hand.
        """
        save(folder, self.model, self.tokenizer)
        return self._run.export(folder, self._params, tokens, self._one, platforms)

    def _one(self, sequence_length: int) -> tuple[Any, ...]:
        """What follows the rows in a call with one text."""
        return ()


class FillMask(_Pipeline):
    """`pipe("[MASK] is a disease.")`: the likeliest tokens in the place of each [MASK].

    Source: transformers' FillMaskPipeline, whose results these are: a list of {"score", "token",
    "token_str", "sequence"} for a text with one mask, one such list a mask for several, and a list
    of those for a list of texts (but for a list of one, as there).
    """

    model_class: type = ModernBertForMaskedLM
    task: str = "fill-mask"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        top_k: int = 5,
        **options: Any,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: expected a mask token, found none")
        super().__init__(model, tokenizer, folder, **options)
        self.top_k = top_k

    def _function(self):
        config = self.model.config

        def probabilities(params, ids_BL, segments_BL, places_BP):
            model = module_of(ModernBertForMaskedLM, config, params)
            out = model(ids_BL, segment_ids=segments_BL, predict_positions=places_BP)
            return jax.nn.softmax(out.logits, axis=-1)

        return probabilities, ()

    def _one(self, sequence_length: int):
        return (np.zeros((1, 1), np.int32),)

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any]:
        """Fills the masks of a text, or of each of a list of texts.

        top_k: how many tokens. targets: only these words are scored; of one that is no token the
        first is taken. Raises ValueError for a text without a mask, or longer than the model.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        wanted = None if targets is None else self._targets(targets)
        ids = self.tokenizer(texts)["input_ids"] if texts else []
        mask = self.tokenizer.mask_token_id
        places = [[n for n, i in enumerate(text) if i == mask] for text in ids]
        for text, found in zip(ids, places, strict=True):
            self._too_long(len(text), "shorten it")
            if not found:
                raise ValueError(
                    f"text: expected {self.tokenizer.mask_token} where a word is to be found, got "
                    "none"
                )
        results: list[Any] = [None] * len(ids)
        for row, ids_BL, segments_BL in self._rows(ids, show_progress_bar):
            starts = np.cumsum([0] + [len(ids[i]) for i in row])
            asked = [start + p for start, i in zip(starts, row, strict=False) for p in places[i]]
            padded = np.resize(asked, (1, 2 ** (len(asked) - 1).bit_length())).astype(np.int32)
            p_PV = np.asarray(self._run(self._params, ids_BL, segments_BL, padded))[0]
            parts = np.split(p_PV[: len(asked)], np.cumsum([len(places[i]) for i in row])[:-1])
            for i, part in zip(row, parts, strict=True):
                results[i] = self._answer(ids[i], places[i], part, top_k or self.top_k, wanted)
        return results[0] if len(results) == 1 else results

    def _answer(self, ids, places, p_PV, top_k: int, targets: np.ndarray | None) -> list[Any]:
        p_PV = p_PV if targets is None else p_PV[:, targets]
        tokenizer, rows = self.tokenizer, []
        for place, p_V in zip(places, p_PV, strict=True):
            row = []
            for index in np.argsort(-p_V, kind="stable")[:top_k]:
                token = int(index if targets is None else targets[index])
                filled = [token if n == place else i for n, i in enumerate(ids)]
                row.append(
                    {
                        "score": float(p_V[index]),
                        "token": token,
                        "token_str": tokenizer.decode([token]),
                        # With one mask the text alone; with more, the others must stay to be seen.
                        "sequence": tokenizer.decode(
                            [i for i in filled if i != tokenizer.pad_token_id],
                            skip_special_tokens=len(places) == 1,
                        ),
                    }
                )
            rows.append(row)
        return rows[0] if len(rows) == 1 else rows

    def _targets(self, targets: str | Sequence[str]) -> np.ndarray:
        vocabulary = self.tokenizer.get_vocab()
        ids = []
        for target in [targets] if isinstance(targets, str) else targets:
            known = vocabulary.get(target)
            pieces = [known] if known is not None else self.tokenizer.encode(
                target, add_special_tokens=False
            )[:1]  # fmt: skip
            ids += pieces
        if not ids:
            raise ValueError("targets: expected at least one word of the vocabulary, got none")
        return np.unique(ids)


class TextClassification(_Pipeline):
    """`pipe("No fever.")`: [{"label", "score"}], as transformers' TextClassificationPipeline.

    Scores are a softmax over the labels; a sigmoid of each for one label or a multi-label model;
    the plain output for a regression.
    """

    model_class: type = ModernBertForSequenceClassification
    task: str = "text-classification"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        top_k: int | None | str = "",
        **options: Any,
    ):
        super().__init__(model, tokenizer, folder, **options)
        self.top_k: int | None | str = top_k

    def _function(self):
        config = self.model.config
        regression = config.problem_type == "regression"
        several = config.problem_type == "multi_label_classification" or config.num_labels == 1

        def scores(params, ids_BL, segments_BL, segments: int):
            model = module_of(ModernBertForSequenceClassification, config, params)
            logits_BSE = model(ids_BL, segment_ids=segments_BL, num_segments=segments).logits
            if regression:
                return logits_BSE
            return jax.nn.sigmoid(logits_BSE) if several else jax.nn.softmax(logits_BSE, axis=-1)

        return scores, (3,)

    def _one(self, sequence_length: int):
        return (segment_slots(sequence_length),)

    def __call__(
        self,
        inputs: str | dict[str, str] | Sequence[str | dict[str, str]],
        *,
        top_k: int | None | str = "",
        truncation: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Labels of a text, a pair {"text", "text_pair"}, or a list of either.

        top_k: so many labels, None all of them, a list for each text; left out, the best alone
        (or what the pipeline was made with).
        Raises ValueError for a text longer than the model, unless `truncation` cuts it.
        """
        top_k = self.top_k if isinstance(top_k, str) else top_k
        single = isinstance(inputs, str | dict)
        items = [inputs] if single else list(inputs)
        ids = []
        for item in items:
            pair: dict[str, Any] = {"text": item} if isinstance(item, str) else dict(item)
            ids.append(self.tokenizer(**pair)["input_ids"])
            if truncation and len(ids[-1]) > self.longest:
                ids[-1] = self.tokenizer(**pair, truncation=True, max_length=self.longest)[
                    "input_ids"
                ]
            self._too_long(len(ids[-1]), "truncation=True cuts it")
        results: list[Any] = [None] * len(ids)
        for row, ids_BL, segments_BL in self._rows(ids, show_progress_bar):
            slots = segment_slots(ids_BL.shape[1], len(row))
            scores_SE = np.asarray(self._run(self._params, ids_BL, segments_BL, slots))[0]
            for i, scores_E in zip(row, scores_SE, strict=False):
                order = np.argsort(-scores_E, kind="stable")
                labels = [
                    {"label": label_of(self.model.config, int(e)), "score": float(scores_E[e])}
                    for e in order
                ]
                results[i] = labels[0] if isinstance(top_k, str) else labels[:top_k]
        if isinstance(inputs, str) and isinstance(top_k, str):
            return results  # a list of one, as there
        return results[0] if single else results


class TokenClassification(_Pipeline):
    """`pipe("Seen by Dr. Low.")`: the entities of a text of any length.

    Source: transformers' TokenClassificationPipeline, whose results these are: {"entity", "score",
    "index", "word", "start", "end"} a token, or {"entity_group", "score", "word", "start", "end"}
    with an aggregation_strategy ("simple", "first", "average", "max"). start and end are characters
    of the text as it was given.

    A text longer than the model is read in windows that overlap by `stride` tokens; each token is
    judged where it has the most context, so an entity across an edge comes out whole. Words end at
    any white space (there at a space only; notes have lines).
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
        stride: int = 256,
        max_length: int | None = None,
        ignore_labels: Sequence[str] = ("O",),
        **options: Any,
    ):
        """max_length: of a window, in tokens; by default the model's."""
        super().__init__(model, tokenizer, folder, **options)
        if aggregation_strategy not in STRATEGIES:
            raise ValueError(
                f"aggregation_strategy: expected {', '.join(STRATEGIES)}, got "
                f"{aggregation_strategy!r}"
            )
        self.aggregation_strategy, self.ignore_labels = aggregation_strategy, ignore_labels
        empty = tokenizer("")["input_ids"]  # [CLS] [SEP]
        self._before, self._after = empty[:1], empty[1:]
        self.window = min(max_length or self.longest, self.longest) - len(empty)
        if self.window < 1 or stride < 0:
            raise ValueError(
                f"max_length, stride: expected more than {len(empty)} and at least 0 tokens, got "
                f"{max_length} and {stride}"
            )
        self.stride = min(stride, self.window // 2)

    def _function(self):
        config = self.model.config

        def probabilities(params, ids_BL, segments_BL):
            model = module_of(ModernBertForTokenClassification, config, params)
            return jax.nn.softmax(model(ids_BL, segment_ids=segments_BL).logits, axis=-1)

        return probabilities, ()

    def __call__(
        self, inputs: str | Sequence[str], *, show_progress_bar: bool | None = None
    ) -> list[Any]:
        """The entities of a text, or a list of those of each text, in order of their place."""
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        encoded = [
            self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for text in texts
        ]
        windows: list[tuple[int, int, int, int]] = []  # text, its first token, what is kept of it
        ids: list[list[int]] = []
        for t, one in enumerate(encoded):
            tokens = one["input_ids"]
            for start, end, keep, until in split_windows(len(tokens), self.window, self.stride):
                windows.append((t, start, keep, until))
                ids.append([*self._before, *tokens[start:end], *self._after])
        scores = [np.zeros((len(e["input_ids"]), self.model.config.num_labels)) for e in encoded]
        for row, ids_BL, segments_BL in self._rows(ids, show_progress_bar):
            p_LE = np.asarray(self._run(self._params, ids_BL, segments_BL))[0]
            at = 0
            for w in row:
                t, start, keep, until = windows[w]
                shift = at + len(self._before) - start
                scores[t][keep:until] = p_LE[keep + shift : until + shift]
                at += len(ids[w])
        found = [
            self._entities(text, one, p)
            for text, one, p in zip(texts, encoded, scores, strict=True)
        ]
        return found[0] if isinstance(inputs, str) else found

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
            spans = [_word(group, strategy) for group in _words(text, spans)]
        named = []
        for index, span in enumerate(spans, start=len(self._before)):
            best = int(span["p"].argmax())
            label, score = label_of(self.model.config, best), float(span["p"][best])
            named.append({**span, "entity": label, "score": score, "index": index})
        if strategy == "none":
            return [
                {k: s[k] for k in ("entity", "score", "index")}
                | {"word": s["tokens"][0], "start": s["start"], "end": s["end"]}
                for s in named
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
            for group in _runs(named)
        ]
        return [g for g in groups if g["entity_group"] not in self.ignore_labels]


TASKS: dict[str, Any] = {
    "fill-mask": FillMask,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "ner": TokenClassification,
}
STRATEGIES = ("none", "simple", "first", "average", "max")


def label_of(config: Any, index: int) -> str:
    """The name of a label, LABEL_0 and so on where the model has none."""
    return config.id2label[index] if config.id2label else f"LABEL_{index}"


def split_windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Windows over a text: (start, end, keep from, keep until), counted in its tokens.

    Each but a short text's has `window` tokens, neighbours share at least `stride`, and what is
    kept of two neighbours meets in the middle of what they share.
    """
    if tokens <= window:
        return [(0, tokens, 0, tokens)]
    starts = [*range(0, tokens - window, window - stride), tokens - window]
    cuts = [0, *((a + window + b) // 2 for a, b in zip(starts, starts[1:], strict=False)), tokens]
    return [(s, s + window, cuts[n], cuts[n + 1]) for n, s in enumerate(starts)]


def _words(text: str, spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
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
    """Neighbours of one type; a B- begins another."""
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
