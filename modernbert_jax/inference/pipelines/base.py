"""The parts that all pipelines share: packed sequences and one compiled function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.checkpoint.params import with_arrays
from modernbert_jax.heads import ModernBertForSequenceClassification
from modernbert_jax.inference.export import Function, packed_batches, save, tokens_per_sequence
from modernbert_jax.packing import placed, segment_slots
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
        self._params, self._build = with_arrays(model)
        function, static_argnums = self._function()
        self._run = Function(self._program, function, model.config, folder, static_argnums)

    @property
    def _program(self) -> str:
        """The name of the function in an exported folder."""
        return self.task

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

    def _ids(self, truncation: bool | str, **texts: Any) -> list[int]:
        """Returns the token ids of a text, or of a pair.

        truncation: as in transformers' tokenizers, to max_length. Raises ValueError for more tokens
        than the model supports.
        """
        limit = {"truncation": truncation, "max_length": self.max_length} if truncation else {}
        ids = self.tokenizer(**{**limit, **texts})["input_ids"]
        self._check_length(len(ids), "truncation=True truncates it")
        return ids

    def _batches(
        self, ids: Sequence[Sequence[int]], show_progress_bar: bool | None
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yields packed sequences: (indices of the texts, input_ids_BL, segment_ids_BL), B = 1."""
        for batch, input_ids_BL, segment_ids_BL in packed_batches(
            ids, 1, self.batch_tokens, self.task, show_progress_bar
        ):
            yield batch[0], input_ids_BL, segment_ids_BL

    def _by_token(
        self, ids: Sequence[Sequence[int]], show_progress_bar: bool | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index of the text, the function's values at its tokens [L, ...]), in any order.

        For functions of ids and segment ids that return [B, L, ...].
        """
        for batch, input_ids_BL, segment_ids_BL in self._batches(ids, show_progress_bar):
            found = np.asarray(self._run(self._params, input_ids_BL, segment_ids_BL))[0]
            for _, _, start, i in placed([batch], lambda i: len(ids[i])):
                yield i, found[start : start + len(ids[i])]

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
        self._write(folder)
        return self._run.export(folder, self._params, tokens, self._further_args, platforms)

    def _write(self, folder: str | os.PathLike[str]) -> None:
        """Writes the checkpoint that exported functions belong to."""
        save(folder, self.model, self.tokenizer)


class LogitsPipeline(Pipeline):
    """A pipeline on the logits of a sequence classifier; what it makes of them is not compiled."""

    model_class: type = ModernBertForSequenceClassification

    @property
    def _program(self) -> str:
        return "logits"  # what one of these pipelines exports, all of them use

    def _function(self):
        def logits(params, input_ids_BL, segment_ids_BL, segments: int):
            model = self._build(params)
            return model(input_ids_BL, segment_ids=segment_ids_BL, num_segments=segments).logits

        return logits, (3,)

    def _further_args(self, sequence_length: int):
        return (segment_slots(sequence_length),)

    def share_programs(self, other: LogitsPipeline) -> None:
        """Runs the compiled programs of `other`, a pipeline with the same model."""
        self._run = other._run

    def _outputs(
        self,
        ids: Sequence[Sequence[int]],
        activation: Callable[[jax.Array], jax.Array],
        show_progress_bar: bool | None,
    ) -> np.ndarray:
        """Returns activation(logits), float32 [texts, labels].

        Raises ValueError if the activation returns another shape than it gets.
        """
        outputs = np.zeros((len(ids), self.model.config.num_labels), np.float32)
        for batch, input_ids_BL, segment_ids_BL in self._batches(ids, show_progress_bar):
            slots = segment_slots(input_ids_BL.shape[1], len(batch))
            logits_SE = self._run(self._params, input_ids_BL, segment_ids_BL, slots)[0]
            found = activation(logits_SE)  # before the unused slots go, so that shapes are few
            if found.shape != logits_SE.shape:
                raise ValueError(
                    "activation_fn: expected a score per label, got shape "
                    f"{tuple(found.shape)} for logits {tuple(logits_SE.shape)}"
                )
            outputs[batch] = np.asarray(found)[: len(batch)]
        return outputs


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
