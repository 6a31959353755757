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
from modernbert_jax.inference.export import check_exported, load, whole_number
from modernbert_jax.inference.pipelines.base import LogitsPipeline
from modernbert_jax.inference.sentence import (
    ACTIVATIONS,
    ENCODER_FILE,
    MODULES_FILE,
    SETTINGS_FILE,
    activation_name,
    read_encoder,
    read_modules,
    read_settings,
    resolve_prompt,
    write_json,
    write_modules,
)
from modernbert_jax.tokenizer import AutoTokenizer, lower_case, max_tokens
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


class Reranker(LogitsPipeline):
    """`Reranker.from_pretrained(path).rank(query, documents)`: the documents, the best first.

    Scores are those of sentence-transformers' CrossEncoder. Pairs are packed, so no work is spent
    on padding. Texts longer than the model's, the tokenizer's and the files' limit are truncated,
    the longer one of a pair first.
    """

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
        say; the tokenizer follows them. batch_tokens: the most tokens in a packed sequence."""
        self.ranking: Ranking = ranking or Ranking()
        if self.ranking.max_length is not None:  # as in sentence-transformers
            tokenizer.model_max_length = self.ranking.max_length
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        default = "Sigmoid" if model.config.num_labels == 1 else "Identity"
        name = self.ranking.activation or default
        self._activation = _function(activation_fn, name)
        self._name = name if activation_fn is None else activation_fn  # None: it has none
        if not isinstance(self._name, str):
            self._name = None
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
        return cls(
            model, tokenizer, folder if exported else None, activation_fn=activation_fn,
            max_length=max_length, ranking=ranking, batch_tokens=batch_tokens,
        )  # fmt: skip

    @classmethod
    def beside(cls, pipe: LogitsPipeline, folder: pathlib.Path) -> Reranker:
        """Returns the reranker of a folder whose model `pipe` has loaded; both share programs."""
        ranking = read_ranking(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)  # its own, which follows the files
        found = cls(pipe.model, tokenizer, ranking=ranking, batch_tokens=pipe.batch_tokens)
        found.share_programs(pipe)
        return found

    def save(
        self, folder: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a folder that sentence-transformers, transformers and `from_pretrained` load.

        card: facts for the model card, as in `ModernBertModel.save_pretrained`. Raises ValueError
        for an activation_fn that is a function of your own, which these files cannot name.
        """
        settings = self._settings()
        self.model.save_pretrained(folder, tokenizer=self.tokenizer, card=card)
        self._write_settings(pathlib.Path(folder), settings)

    def _write(self, folder: str | os.PathLike[str]) -> None:
        settings = self._settings()
        super()._write(folder)
        self._write_settings(pathlib.Path(folder), settings)

    def _settings(self) -> dict[str, Any]:
        if self._name is None:
            raise ValueError(
                f"activation_fn: expected one of {', '.join(ACTIVATIONS)}, which files can name, "
                "got a function; pass its name"
            )
        return {
            "model_type": "CrossEncoder",
            "prompts": dict(self.ranking.prompts),
            "default_prompt_name": self.ranking.default_prompt_name,
            "activation_fn": f"torch.nn.{self._name}",
        }

    def _write_settings(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """Writes the files of a cross-encoder beside the model's."""
        # Releases of sentence-transformers before 6 read only this.
        config = read_json(folder / CONFIG_FILE, MAX_MODEL_JSON)
        config.pop(_OLD_ACTIVATION, None)
        config["sentence_transformers"] = {"activation_fn": settings["activation_fn"]}
        write_json(folder / CONFIG_FILE, config)
        lengths = {"max_seq_length": self.max_length, "do_lower_case": self.ranking.lower_case}
        write_json(folder / ENCODER_FILE, _SETTINGS | lengths)
        kind = "sentence_transformers.base.modules.transformer.Transformer"
        write_modules(folder, [("", kind)])
        write_json(folder / SETTINGS_FILE, settings)

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
        function = self._activation if activation_fn is None else _function(activation_fn, "")
        softmax = apply_softmax and self.model.config.num_labels > 1
        scores = self._outputs(
            ids,
            (lambda x: jax.nn.softmax(function(x), axis=-1)) if softmax else function,
            show_progress_bar,
        )
        if scores.shape[-1] == 1:
            scores = scores[:, 0]
        return scores[0] if single else scores

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
