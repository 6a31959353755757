"""The parts that all pipelines share: packed sequences and one compiled function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.inference.export import Function, packed_batches, save, tokens_per_sequence
from modernbert_jax.tokenizer import check_ids, max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Pipeline:
    """Tokenizes and packs texts, and runs one compiled function on them."""

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
        """folder: of functions that this user exported. batch_tokens: the most tokens in a packed
        sequence, by default 16,384, on a CPU 512. Raises ValueError if the tokenizer has ids that
        the model lacks."""
        check_ids(tokenizer, model.config.vocab_size)
        self.model: Any = model
        self.tokenizer: PreTrainedTokenizerFast = tokenizer
        self.batch_tokens: int = tokens_per_sequence(batch_tokens)
        self.longest: int = model.config.max_position_embeddings
        # As in transformers, the tokenizer's limit decides where texts are cut, and refuses none.
        self.max_length: int = max_tokens(tokenizer, self.longest)
        self._params = flatten(model)
        function, static_argnums = self._function()
        self._run = Function(self.task, function, model.config, folder, static_argnums)

    def _function(self) -> tuple[Callable[..., jax.Array], tuple[int, ...]]:
        """Returns f(params, input_ids_BL, segment_ids_BL, ...) and which arguments are ints."""
        raise NotImplementedError

    def _further_args(self, sequence_length: int) -> tuple[Any, ...]:
        """Returns the arguments that follow the ids in a call with one text."""
        return ()

    def _check_length(self, tokens: int, remedy: str) -> None:
        if tokens > self.longest:
            raise ValueError(
                f"text: expected at most {self.longest:,} tokens, got {tokens:,}; {remedy}"
            )

    def _batches(
        self, ids: Sequence[Sequence[int]], show_progress_bar: bool | None
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yields packed sequences: (indices of the texts, input_ids_BL, segment_ids_BL), B = 1."""
        for batch, input_ids_BL, segment_ids_BL in packed_batches(
            ids, 1, self.batch_tokens, self.task, show_progress_bar
        ):
            yield batch[0], input_ids_BL, segment_ids_BL

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles the function for sequences of up to each number of tokens."""
        self._run.warm_up(self._params, tokens, self._further_args)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model and its function for one text of up to each number of tokens.

        Returns the sequence lengths. `pipeline(task, folder, exported=True)` uses the functions.
        platforms: "cpu", "cuda", "tpu"; by default the platform of this process.
        """
        save(folder, self.model, self.tokenizer)
        return self._run.export(folder, self._params, tokens, self._further_args, platforms)


def texts_of(inputs: Any) -> list[str]:
    """Returns a text, or several, as a list. Raises TypeError for anything else."""
    if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs: expected a text or a list of texts, got a {type(inputs).__name__}"
        )
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise TypeError(f"inputs: expected texts, number {number} is a {type(text).__name__}")
    return texts


def label_of(config: Any, index: int) -> str:
    """Returns the name of a label, LABEL_0 and so on if the model has no names."""
    return config.id2label[index] if config.id2label else f"LABEL_{index}"
