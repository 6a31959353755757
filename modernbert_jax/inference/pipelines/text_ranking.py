"""Text ranking: a cross-encoder scores pairs of texts, as sentence-transformers' CrossEncoder."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.checkpoint.files import CONFIG_FILE
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.heads import ModernBertForSequenceClassification
from modernbert_jax.inference.export import check_exported, load, whole_number
from modernbert_jax.inference.pipelines.base import Pipeline
from modernbert_jax.inference.sentence import (
    ACTIVATIONS,
    MODULES_FILE,
    SETTINGS_FILE,
    activation_name,
    read_encoder,
    read_modules,
    read_settings,
    resolve_prompt,
    write_json,
)
from modernbert_jax.packing import segment_slots
from modernbert_jax.tokenizer import lower_case, max_tokens
from modernbert_jax.untrusted import MAX_MODEL_JSON, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Pair = Sequence[str]
# The settings of the Transformer module that mean what this class computes.
_SETTINGS = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}
# Where the activation was stored before release 4, and since then before release 6.
_OLD_ACTIVATION = "sbert_ce_default_activation_function"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What the files say beside the model. activation: a key of ACTIVATIONS, None if not stated."""

    activation: str | None = None
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None


def read_ranking(folder: pathlib.Path) -> Ranking:
    """Reads the files of a cross-encoder. Raises ValueError for what is not supported."""
    entries = read_modules(folder) if (folder / MODULES_FILE).exists() else [("Transformer", "")]
    if entries != [("Transformer", "")]:
        found = ", ".join(kind for kind, _ in entries)
        raise ValueError(f"{folder / MODULES_FILE}: expected one Transformer alone, got {found}")
    settings = read_settings(folder / SETTINGS_FILE, "CrossEncoder")
    config = read_json(folder / CONFIG_FILE, MAX_MODEL_JSON)
    own = config.get("sentence_transformers")
    places = (
        (SETTINGS_FILE, "activation_fn", settings.pop("activation_fn")),
        (CONFIG_FILE, "activation_fn", own.get("activation_fn") if isinstance(own, dict) else None),
        (CONFIG_FILE, _OLD_ACTIVATION, config.get(_OLD_ACTIVATION)),
    )
    names = [
        activation_name(f"{folder / file}: {key}", value)
        for file, key, value in places
        if value is not None
    ]
    settings.pop("similarity")
    return Ranking(names[0] if names else None, **settings, **read_encoder(folder, _SETTINGS))


class Reranker(Pipeline):
    """`Reranker.from_pretrained(path).rank(query, documents)`: the documents, the best first.

    Scores are those of sentence-transformers' CrossEncoder. Pairs are packed, so no work is spent
    on padding. Texts longer than the model's, the tokenizer's and the files' limit are truncated,
    the longer one of a pair first.
    """

    model_class: type = ModernBertForSequenceClassification
    task: str = "text-ranking"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        activation_fn: str | Callable[[jax.Array], jax.Array] | None = None,
        max_length: int | None = None,
        ranking: Ranking | None = None,
        batch_tokens: int | None = None,
    ):
        """folder: of functions that this user exported. activation_fn: turns logits into scores, a
        function or a name ("Sigmoid", "Identity"); by default that of the files, and without one
        Sigmoid for one label and Identity for more. max_length: in tokens. ranking: what the files
        say. batch_tokens: the most tokens in a packed sequence."""
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        self.ranking: Ranking = ranking or Ranking()
        default = "Sigmoid" if model.config.num_labels == 1 else "Identity"
        self._activation = _function(activation_fn, self.ranking.activation or default)
        if max_length is not None:
            limit = whole_number("max_length", max_length, 1)
            self.max_length = max_tokens(tokenizer, min(limit, self.max_length))
        if self.ranking.lower_case:
            lower_case(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        activation_fn: str | Callable[[jax.Array], jax.Array] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        dtype: Any = None,
        revision: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        exported: bool = False,
    ) -> Reranker:
        """Loads a cross-encoder: a sequence classifier, of sentence-transformers or any other.

        dtype, revision, compile_cache, exported: as in `Embedder.from_pretrained`. The other
        arguments are those of the class. Raises ValueError for what the files say and is not
        supported.
        """
        if exported:
            check_exported(path_or_repo)
        folder = resolve(path_or_repo, revision)
        ranking = read_ranking(folder)
        options = {"dtype": dtype}
        model, tokenizer, _ = load(cls.model_class, folder, None, options, compile_cache)
        if ranking.max_length is not None:  # as in sentence-transformers
            tokenizer.model_max_length = ranking.max_length
        return cls(
            model, tokenizer, folder if exported else None, activation_fn=activation_fn,
            max_length=max_length, ranking=ranking, batch_tokens=batch_tokens,
        )  # fmt: skip

    def _function(self):
        config = self.model.config

        def logits(params, input_ids_BL, segment_ids_BL, segments: int):
            model = module_of(ModernBertForSequenceClassification, config, params)
            return model(input_ids_BL, segment_ids=segment_ids_BL, num_segments=segments).logits

        return logits, (3,)

    def _further_args(self, sequence_length: int):
        return (segment_slots(sequence_length),)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model, its settings and its function, as `Pipeline.export`.

        Reranker.from_pretrained(folder, exported=True) uses the function.
        """
        sizes = super().export(folder, tokens, platforms)
        ranking = self.ranking
        settings = {
            "model_type": "CrossEncoder",
            "prompts": dict(ranking.prompts),
            "default_prompt_name": ranking.default_prompt_name,
        }
        if ranking.activation is not None:
            settings["activation_fn"] = f"torch.nn.{ranking.activation}"
        write_json(pathlib.Path(folder) / SETTINGS_FILE, settings)
        return sizes

    def predict(
        self,
        inputs: Pair | Sequence[Pair],
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
        *,
        activation_fn: str | Callable[[jax.Array], jax.Array] | None = None,
        apply_softmax: bool = False,
    ) -> np.ndarray:
        """Returns float32 scores [pairs], or [pairs, labels]; without the first axis for one pair.

        inputs: a pair of texts, or several. prompt: put before the first text of each; prompt_name:
        one of the model's, by default its default prompt. activation_fn: instead of the model's.
        apply_softmax: over the labels, after the activation. Raises TypeError for what is no pair.
        """
        single = len(inputs) > 0 and isinstance(inputs[0], str)
        pairs: Any = [inputs] if single else inputs
        for number, pair in enumerate(pairs, start=1):
            two = isinstance(pair, list | tuple) and len(pair) == 2
            if not two or not all(isinstance(text, str) for text in pair):
                raise TypeError(
                    f"inputs: expected pairs of texts, number {number} is a {type(pair).__name__}"
                )
        known = self.ranking.prompts
        begin = resolve_prompt(known, self.ranking.default_prompt_name, prompt, prompt_name)
        ids: list[list[int]] = []
        for first in range(0, len(pairs), 512):
            some = pairs[first : first + 512]
            ids += self.tokenizer(
                [begin + pair[0] for pair in some], [pair[1] for pair in some],
                truncation=True, max_length=self.max_length,
            )["input_ids"]  # fmt: skip
        logits_PE = np.zeros((len(ids), self.model.config.num_labels), np.float32)
        for batch, input_ids_BL, segment_ids_BL in self._batches(ids, show_progress_bar):
            slots = segment_slots(input_ids_BL.shape[1], len(batch))
            logits_BSE = self._run(self._params, input_ids_BL, segment_ids_BL, slots)
            logits_PE[batch] = np.asarray(logits_BSE)[0, : len(batch)]
        function = self._activation if activation_fn is None else _function(activation_fn, "")
        scores: Any = function(jax.numpy.asarray(logits_PE))
        if scores.shape[-1] == 1:
            scores = scores[:, 0]
        elif apply_softmax:
            scores = jax.nn.softmax(scores, axis=-1)
        return np.asarray(scores[0] if single else scores)

    __call__ = predict

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Returns [{"corpus_id", "score"}] of the documents, the best first, and ties in order.

        top_k: the number of documents, by default all. return_documents: adds "text". options: of
        `predict`. Raises ValueError for a model with several labels.
        """
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"rank: expected a model with 1 label, got {self.model.config.num_labels}; predict "
                "returns a score per label"
            )
        scores = self.predict([(query, document) for document in documents], **options)
        return ranked(scores, documents, top_k, return_documents)


def ranked(
    scores_N: np.ndarray, documents: Sequence[str], top_k: int | None, return_documents: bool
) -> list[dict[str, Any]]:
    """Returns [{"corpus_id", "score"}], and "text" if asked for, of the `top_k` best documents."""
    count = None if top_k is None else whole_number("top_k", top_k, 0)
    return [
        {"corpus_id": int(i), "score": float(scores_N[i])}
        | ({"text": documents[i]} if return_documents else {})
        for i in np.argsort(-scores_N, kind="stable")[:count]
    ]


def _function(given: Any, name: str) -> Callable[[jax.Array], jax.Array]:
    if callable(given):
        function: Any = given
        return function
    name = name if given is None else given
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation_fn: expected a function or {', '.join(ACTIVATIONS)}, got {given!r}"
        )
    return ACTIVATIONS[name]
