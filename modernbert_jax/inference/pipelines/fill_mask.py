"""Fill-mask: the most probable tokens at each [MASK]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.heads import ModernBertForMaskedLM
from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.pipelines.base import Pipeline, texts_of
from modernbert_jax.packing import segment_slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class FillMask(Pipeline):
    """`pipe("[MASK] is a disease.")`: the most probable tokens at each [MASK].

    Results are those of transformers' FillMaskPipeline: a list of {"score", "token", "token_str",
    "sequence"} for a text with one mask, one such list per mask for several masks, and a list of
    those for a list of texts (but a list of one text gives the result of that text).
    """

    model_class: type = ModernBertForMaskedLM
    task: str = "fill-mask"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        top_k: int | None = None,
        batch_tokens: int | None = None,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: expected a mask token, found none")
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        self.top_k: int = self._count(5 if top_k is None else top_k)

    def _function(self):
        def probabilities(params, input_ids_BL, segment_ids_BL, positions_BP):
            model = self._build(params)
            out = model(input_ids_BL, segment_ids=segment_ids_BL, predict_positions=positions_BP)
            return jax.nn.softmax(out.logits, axis=-1)

        return probabilities, ()

    def _further_args(self, sequence_length: int):
        return (np.zeros((1, segment_slots(sequence_length)), np.int32),)

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any]:
        """Fills the masks of a text, or of each text of a list.

        top_k: number of tokens, by default 5. targets: scores only these words; a word that is not
        one token is represented by its first. Raises ValueError for a text without a mask, or
        longer than the model supports, and for a top_k beyond the vocabulary.
        """
        texts = texts_of(inputs)
        count = self.top_k if top_k is None else self._count(top_k)
        target_ids = None if targets is None else self._target_ids(targets)
        ids = self.tokenizer(texts)["input_ids"] if texts else []
        mask = self.tokenizer.mask_token_id
        positions = [[n for n, i in enumerate(text) if i == mask] for text in ids]
        for text, found in zip(ids, positions, strict=True):
            self._check_length(len(text), "shorten it")
            if not found:
                raise ValueError(
                    f"text: expected {self.tokenizer.mask_token} in place of a word, got none"
                )
        results: list[Any] = [None] * len(ids)
        for batch, input_ids_BL, segment_ids_BL in self._batches(ids, show_progress_bar):
            starts = np.cumsum([0] + [len(ids[i]) for i in batch])
            flat = [s + p for s, i in zip(starts, batch, strict=False) for p in positions[i]]
            # Padded to a power of two, so that few programs are compiled.
            slots = segment_slots(input_ids_BL.shape[1], len(flat))
            padded_BP = np.resize(flat, (1, slots)).astype(np.int32)
            p_PV = np.asarray(self._run(self._params, input_ids_BL, segment_ids_BL, padded_BP))[0]
            splits = np.cumsum([len(positions[i]) for i in batch])[:-1]
            for i, part_PV in zip(batch, np.split(p_PV[: len(flat)], splits), strict=True):
                results[i] = self._answer(ids[i], positions[i], part_PV, count, target_ids)
        return results[0] if len(results) == 1 else results

    def _count(self, top_k: Any) -> int:
        return whole_number("top_k", top_k, 0, self.model.config.vocab_size)

    def _answer(self, ids, positions, p_PV, top_k: int, target_ids: np.ndarray | None) -> list[Any]:
        if target_ids is not None:
            p_PV = p_PV[:, target_ids]
        tokenizer, answers = self.tokenizer, []
        for position, p_V in zip(positions, p_PV, strict=True):
            answer = []
            for index in np.argsort(-p_V, kind="stable")[:top_k]:
                token = int(index if target_ids is None else target_ids[index])
                filled = [token if n == position else i for n, i in enumerate(ids)]
                answer.append(
                    {
                        "score": float(p_V[index]),
                        "token": token,
                        "token_str": tokenizer.decode([token]),
                        # With several masks the special tokens stay, to show the other masks.
                        "sequence": tokenizer.decode(
                            [i for i in filled if i != tokenizer.pad_token_id],
                            skip_special_tokens=len(positions) == 1,
                        ),
                    }
                )
            answers.append(answer)
        return answers[0] if len(answers) == 1 else answers

    def _target_ids(self, targets: str | Sequence[str]) -> np.ndarray:
        vocabulary = self.tokenizer.get_vocab()
        ids = []
        for number, target in enumerate(texts_of(targets), start=1):
            if target in vocabulary:
                ids.append(vocabulary[target])
            elif first := self.tokenizer.encode(target, add_special_tokens=False)[:1]:
                ids += first
            else:
                raise ValueError(f"targets: expected words, number {number} has no token")
        if not ids:
            raise ValueError("targets: expected at least one word, got none")
        return np.unique(ids)
