"""Text classification: labels of a text or a pair of texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.pipelines.base import LogitsPipeline, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextClassification(LogitsPipeline):
    """`pipe("No fever.")`: [{"label", "score"}], as transformers' TextClassificationPipeline.

    Scores are a softmax over the labels; a sigmoid per label for a single label or a multi-label
    model; the plain output for a regression.
    """

    task: str = "text-classification"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        top_k: int | None | str = "",
        batch_tokens: int | None = None,
    ):
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        self.top_k: int | None | str = _count(top_k)

    def _activation(self, logits: jax.Array) -> jax.Array:
        config = self.model.config
        if config.problem_type == "regression":
            return logits
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return jax.nn.sigmoid(logits)
        return jax.nn.softmax(logits, -1)

    def __call__(
        self,
        inputs: str | dict[str, str] | Sequence[str | dict[str, str]],
        *,
        top_k: int | None | str = "",
        truncation: bool | str = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Returns the labels of a text, a pair {"text", "text_pair"}, or a list of either.

        top_k: the number of labels, None for all, as a list per text; if omitted, the best label
        alone (or the top_k of the constructor). truncation: as in transformers' tokenizers, to the
        smaller of the model's and the tokenizer's limit. Raises ValueError for a text longer than
        the model supports, unless `truncation` truncates it.
        """
        given, top_k = top_k, self.top_k if top_k == "" else _count(top_k)
        single = isinstance(inputs, str | dict)
        items = [inputs] if single else list(inputs)
        ids = [self._encode(item, truncation) for item in items]
        results: list[Any] = []
        for scores_E in self._outputs(ids, self._activation, show_progress_bar):
            labels = [
                {"label": self.model.config.id2label[int(e)], "score": float(scores_E[e])}
                for e in np.argsort(-scores_E, kind="stable")
            ]
            results.append(labels[0] if isinstance(top_k, str) else labels[:top_k])
        if isinstance(inputs, str) and given == "":
            return results  # a list of one, as in transformers
        return results[0] if single else results

    def _encode(self, item: str | dict[str, str], truncation: bool | str) -> list[int]:
        pair: Any = {"text": item} if isinstance(item, str) else item
        if not isinstance(pair, dict) or not {"text"} <= set(pair) <= {"text", "text_pair"}:
            raise TypeError(
                'inputs: expected texts or pairs {"text": ..., "text_pair": ...}, got a '
                + type(item).__name__
                + (f" with {', '.join(map(str, pair))}" if isinstance(pair, dict) else "")
            )
        texts_of(pair.values())
        return self._ids(truncation, **pair)


def _count(top_k: Any) -> int | None | str:
    """Returns a checked top_k; None is all labels, "" the best label alone."""
    return top_k if top_k is None or top_k == "" else whole_number("top_k", top_k, 0)
