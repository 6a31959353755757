"""Multi-vector (ColBERT) models: one vector per token, and MaxSim between two texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.checkpoint.params import with_arrays
from modernbert_jax.inference.colbert import (
    Colbert,
    TokenIds,
    attended_ends,
    max_sim,
    read_colbert,
    write_colbert,
)
from modernbert_jax.inference.export import load, packed_batches, tokens_per_sequence
from modernbert_jax.inference.pipelines.text_ranking import ranked
from modernbert_jax.inference.placement import Placement
from modernbert_jax.inference.sentence import TOKENS, resolve_prompt
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import placed, row_size
from modernbert_jax.tokenizer import check_ids, lower_case

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass
class MultiVectorEmbedder:
    """Turns texts into a vector per token: `MultiVectorEmbedder.from_pretrained(path)`.

    Loads and saves the folders of PyLate, with its vectors. `encode_query` and `encode_document`
    give vectors of length 1, `similarity` their MaxSim, and `rank` sorts documents for a query.
    colbert: how texts become vectors, as the files describe it. device: computes, by default jax's
    first device. mesh: each device of its axis "data" gets one packed sequence per step. Raises
    ValueError for a tokenizer or lengths that do not fit the model.
    """

    model: ModernBertModel
    tokenizer: PreTrainedTokenizerFast
    colbert: Colbert
    device: Any = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        config, colbert = self.model.config, self.colbert
        self._dimension = colbert.sentence.dimension(config.hidden_size, TOKENS)
        check_ids(self.tokenizer, config.vocab_size)
        colbert.check(self.tokenizer, config.max_position_embeddings)
        if colbert.sentence.lower_case:
            lower_case(self.tokenizer)
        self._placement = place = Placement(self.device, self.mesh, config)
        own = {key: jnp.asarray(array) for key, array in colbert.sentence.params().items()}
        arrays, build = with_arrays(self.model)
        self._params = place.put_params((arrays, own))

        def embed(params, input_ids_BL, segment_ids_BL, ends_BL=None):
            encoder, own = params
            model = build(encoder)
            return colbert.vectors(
                model, place.attention, own, input_ids_BL, segment_ids_BL, ends_BL
            )

        self._embed = jax.jit(embed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        query_length: int | None = None,
        document_length: int | None = None,
        device: Any = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        revision: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
    ) -> MultiVectorEmbedder:
        """Loads a model that PyLate, or `finetune --task retrieval --multi-vector`, has saved.

        query_length, document_length: in tokens, instead of the files' lengths. dtype, revision,
        compile_cache: as in `Embedder.from_pretrained`. The other arguments are the fields of the
        class. Raises ValueError for what the files say and is not supported.
        """
        folder = resolve(path_or_repo, revision)
        colbert = read_colbert(folder)
        lengths = {"query_length": query_length, "document_length": document_length}
        given = {name: length for name, length in lengths.items() if length is not None}
        colbert = dataclasses.replace(colbert, **given)
        inner = folder / colbert.sentence.encoder
        model, tokenizer, _ = load(ModernBertModel, inner, None, {"dtype": dtype}, compile_cache)
        return cls(model, tokenizer, colbert, device, mesh)

    @property
    def dimension(self) -> int:
        """The embedding dimension, of each token."""
        return self._dimension

    def encode_query(self, inputs: Any, **options: Any) -> Any:
        """Returns the vectors [tokens, E] of each query, float32, as `encode` does."""
        return self.encode(inputs, is_query=True, **options)

    def encode_document(self, inputs: Any, **options: Any) -> Any:
        """Returns the vectors [tokens, E] of each document, float32, as `encode` does."""
        return self.encode(inputs, is_query=False, **options)

    def encode(
        self,
        inputs: Any,
        *,
        is_query: bool,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Returns a list of vectors [tokens, E], float32; without the list for a single text.

        inputs: a text, or several. A query has vectors of all its tokens, and with query expansion
        of query_length tokens; a document those of its tokens that are not in the skiplist. prompt:
        put before each text, behind the prefix; prompt_name: one of the model's prompts, by default
        "query" or "document" if it has that one, else its default prompt. batch_tokens,
        show_progress_bar: as in `Embedder.encode`. Raises TypeError for inputs that are no texts.
        """
        single = isinstance(inputs, str)
        texts = [inputs] if single else list(inputs)
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise TypeError(
                    f"inputs: expected texts, number {number} is a {type(text).__name__}"
                )
        begin = self.prompt(is_query, prompt, prompt_name)
        tokens: list[TokenIds] = []
        for first in range(0, len(texts), 512):
            some = [begin + text for text in texts[first : first + 512]]
            tokens += self.colbert.token_ids(self.tokenizer, some, query=is_query)
        vectors = self._run(tokens, batch_tokens, show_progress_bar)
        return vectors[0] if single else vectors

    def prompt(
        self, is_query: bool, prompt: str | None = None, prompt_name: str | None = None
    ) -> str:
        """Returns what `encode` puts before each text."""
        sentence = self.colbert.sentence
        task = "query" if is_query else "document"
        default = task if task in sentence.prompts else sentence.default_prompt_name
        return resolve_prompt(sentence.prompts, default, prompt, prompt_name)

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles the functions for packed sequences of up to each number of tokens."""
        place = self._placement
        for size in sorted({row_size(count) for count in tokens}):
            zeros_BL = np.zeros((place.sequences, size), np.int32)
            for arrays in ([zeros_BL] * 2, [zeros_BL] * 3):  # all tokens are attended to, or not
                self._embed(self._params, *place.put_rows(*arrays)).block_until_ready()

    def _run(
        self, tokens: list[TokenIds], batch_tokens: int | None, show_progress_bar: bool | None
    ) -> list[np.ndarray]:
        place = self._placement
        out: list[Any] = [None] * len(tokens)
        for batch, *packed in packed_batches(
            [text.ids for text in tokens], place.sequences, tokens_per_sequence(batch_tokens),
            "embedding", show_progress_bar,
        ):  # fmt: skip
            ends_BL = attended_ends(tokens, batch, packed[0].shape[1])
            arrays = packed if ends_BL is None else [*packed, ends_BL]
            vectors_BLE = np.asarray(self._embed(self._params, *place.put_rows(*arrays)))
            for row, _, start, i in placed(batch, lambda i: len(tokens[i].ids)):
                vectors_LE = vectors_BLE[row, start : start + len(tokens[i].ids)]
                out[i] = vectors_LE[tokens[i].kept]
        return out

    def similarity(self, queries: Any, documents: Any) -> np.ndarray:
        """Returns the MaxSim of all queries with all documents, [queries, documents], float32.

        queries, documents: vectors as `encode` returns them. Each of a query's vectors counts with
        its largest product with one of the document's, negative or not.
        """
        return max_sim(_vectors("queries", queries), _vectors("documents", documents))

    def similarity_pairwise(self, queries: Any, documents: Any) -> np.ndarray:
        """Returns the MaxSim of each query with the document of its number, [queries]."""
        some, others = _vectors("queries", queries), _vectors("documents", documents)
        if len(some) != len(others):
            raise ValueError(
                f"queries, documents: expected as many, got {len(some)} and {len(others)}"
            )
        pairs = zip(some, others, strict=True)
        return np.array([max_sim([a], [b])[0, 0] for a, b in pairs], np.float32)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Returns [{"corpus_id", "score"}] of the documents, the best first, and ties in order.

        top_k: the number of documents, by default all. return_documents: adds "text". options:
        batch_tokens and show_progress_bar of `encode`.
        """
        query_LE = self.encode_query(query, **options)
        scores = self.similarity(query_LE, self.encode_document(documents, **options))
        return ranked(scores[0], documents, top_k, return_documents)

    def save(
        self, folder: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a folder that PyLate, sentence-transformers and `from_pretrained` load.

        card: facts for the model card, as in `ModernBertModel.save_pretrained`.
        """
        self.model.save_pretrained(folder, tokenizer=self.tokenizer, card=card)
        write_colbert(folder, self.colbert)


def _vectors(name: str, given: Any) -> list[np.ndarray]:
    """Returns the vectors of several texts, or of one, as a list. Raises ValueError for others."""
    one = getattr(given, "ndim", None) == 2
    texts = [np.asarray(x, np.float32) for x in ([given] if one else given)]
    sizes = {x.shape[1] if x.ndim == 2 else None for x in texts}
    if None in sizes or len(sizes) > 1:
        raise ValueError(
            f"{name}: expected arrays [tokens, E] with one E, got shapes "
            f"{', '.join(str(x.shape) for x in texts[:3])}"
        )
    return texts
