"""Feature extraction: the last hidden state of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.pipelines.base import Pipeline, texts_of
from modernbert_jax.model import ModernBertModel

_TOKENIZER_OPTIONS = ("truncation", "max_length", "add_special_tokens")


class FeatureExtraction(Pipeline):
    """`pipe("No fever.")`: the last hidden state of each token, special tokens included.

    Results are those of transformers' FeatureExtractionPipeline: nested lists [1, tokens, hidden
    size] for a text, and a list of those for a list of texts. For one vector per text use Embedder.
    """

    model_class: type = ModernBertModel
    task: str = "feature-extraction"

    def _function(self):
        def hidden(params, input_ids_BL, segment_ids_BL):
            out = self._build(params)(input_ids_BL, segment_ids=segment_ids_BL)
            return out.last_hidden_state.astype(jnp.float32)

        return hidden, ()

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        truncation: bool | str | None = None,
        return_tensors: bool = False,
        tokenize_kwargs: Mapping[str, Any] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any] | Any:
        """Returns the hidden states of a text, or a list of those of each text.

        truncation: as in transformers' tokenizers, to the smaller of the model's and the
        tokenizer's limit. return_tensors: float32 NumPy arrays [1, tokens, hidden size] instead of
        lists. tokenize_kwargs: truncation, max_length (with truncation; at most that limit) and
        add_special_tokens. Raises TypeError for another of them, ValueError for a text longer than
        the model supports, unless `truncation` truncates it.
        """
        texts = texts_of(inputs)
        options = dict(tokenize_kwargs or {})
        if unknown := sorted(options.keys() - set(_TOKENIZER_OPTIONS)):
            raise TypeError(
                f"tokenize_kwargs: expected {', '.join(_TOKENIZER_OPTIONS)}, got "
                f"{', '.join(map(str, unknown))}"
            )
        if truncation is not None and "truncation" in options:
            raise ValueError("truncation: expected once, got it in tokenize_kwargs too")
        cut = options.pop("truncation", truncation) or False
        if "max_length" in options:
            if not cut:
                raise ValueError("max_length: expected truncation=True beside it, got none")
            length = whole_number("max_length", options["max_length"], 1, self.max_length)
            options["max_length"] = length
        ids = [self._ids(cut, text=text, **options) for text in texts]
        results: list[Any] = [None] * len(ids)
        for i, hidden_LD in self._by_token(ids, show_progress_bar):
            results[i] = hidden_LD[None] if return_tensors else hidden_LD[None].tolist()
        return results[0] if isinstance(inputs, str) else results
