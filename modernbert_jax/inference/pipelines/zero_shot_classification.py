"""Zero-shot classification: an NLI model scores labels that it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modernbert_jax.inference.pipelines.base import LogitsPipeline, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ZeroShotClassification(LogitsPipeline):
    """`pipe("No fever.", ["a symptom", "a drug"])`: the labels, the most probable first.

    Each label makes a hypothesis, and an NLI model, whose label "entailment" config.json names,
    judges whether it follows from the text. Results are those of transformers'
    ZeroShotClassificationPipeline: {"sequence", "labels", "scores"}. A long text is truncated, a
    hypothesis never.
    """

    task: str = "zero-shot-classification"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        batch_tokens: int | None = None,
    ):
        """Raises ValueError for a model without a label that begins with "entail" beside others."""
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        names = model.config.id2label
        found = [n for n, name in enumerate(names) if name.lower().startswith("entail")]
        if not found or len(names) < 2:
            raise ValueError(
                "model: expected an NLI model, whose id2label names entailment and at least one "
                f"other label, got {', '.join(names)}"
            )
        self._entailment = found[0]
        # transformers' rule: it does not look for the name of the contradiction.
        self._contradiction = len(names) - 1 if self._entailment == 0 else 0

    def __call__(
        self,
        sequences: str | Sequence[str],
        candidate_labels: str | Sequence[str],
        *,
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        show_progress_bar: bool | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Returns the scores of the labels for a text, or a list of those for each text.

        candidate_labels: a list, or a text in which commas separate them. hypothesis_template: {}
        stands for the label. multi_label: whether several labels may hold; if so, a score is the
        probability of entailment against that of contradiction (the model's first label, or its
        last if entailment is the first), as it is for a single label, and otherwise a softmax of
        entailment over the labels. Raises ValueError for an empty text, no labels, a template
        without {}, and a hypothesis that leaves no room for a text.
        """
        texts = texts_of(sequences)
        if isinstance(candidate_labels, str):
            candidate_labels = [x.strip() for x in candidate_labels.split(",") if x.strip()]
        labels = texts_of(candidate_labels)
        if not labels or not texts or not all(texts):
            raise ValueError(
                "sequences, candidate_labels: expected at least one label and one text, no text "
                "empty"
            )
        hypotheses = self._hypotheses(hypothesis_template, labels)
        ids: list[list[int]] = []
        for text in texts:
            ids += self.tokenizer(
                [text] * len(labels), hypotheses, truncation="only_first",
                max_length=self.max_length,
            )["input_ids"]  # fmt: skip
        logits = self._outputs(ids, lambda x: x, show_progress_bar)
        logits_TNE = logits.reshape(len(texts), len(labels), -1).astype(np.float64)
        if multi_label or len(labels) == 1:
            two_TN2 = logits_TNE[..., [self._contradiction, self._entailment]]
            scores_TN = _softmax(two_TN2)[..., 1]
        else:
            scores_TN = _softmax(logits_TNE[..., self._entailment])
        found = []
        for text, scores_N in zip(texts, scores_TN, strict=True):
            order = np.argsort(-scores_N, kind="stable")
            found.append(
                {
                    "sequence": text,
                    "labels": [labels[n] for n in order],
                    "scores": scores_N[order].tolist(),
                }
            )
        return found[0] if isinstance(sequences, str) else found

    def _hypotheses(self, template: str, labels: Sequence[str]) -> list[str]:
        try:
            hypotheses = [template.format(label) for label in labels]
        except (LookupError, ValueError, AttributeError):  # such as {name}, {1} or a single brace
            hypotheses = [template]
        if hypotheses[0] == template:
            raise ValueError(
                "hypothesis_template: expected a text with {} in place of the label, got none"
            )
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        for number, hypothesis in enumerate(hypotheses, start=1):
            tokens = len(self.tokenizer(hypothesis, add_special_tokens=False)["input_ids"])
            if tokens >= room:
                raise ValueError(
                    f"candidate_labels: expected hypotheses of less than {room:,} tokens, number "
                    f"{number} has {tokens:,}; shorten it"
                )
        return hypotheses


def _softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
