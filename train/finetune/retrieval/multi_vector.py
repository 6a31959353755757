"""Training a multi-vector (ColBERT) model: a vector per token, and losses of MaxSim scores.

As in model.py, a batch is embedded in chunks without gradients, and each chunk runs again with the
gradient of the loss as its cotangent.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertModel
from modernbert_jax.attention import sharded
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.inference.colbert import (
    UNIT,
    Colbert,
    TokenIds,
    attended_ends,
    is_colbert,
    max_sim,
    read_colbert,
    write_colbert,
)
from modernbert_jax.inference.sentence import TOKENS, Dense, SentenceModel
from modernbert_jax.packing import fill_rows, placed, row_size
from modernbert_jax.precision import einsum
from modernbert_jax.tokenizer import absent_ids, vocab_size
from modernbert_jax.weights import decays

from ...common.sharding import DATA, MeshShape, make_mesh
from .config import RetrievalConfig
from .losses import divergence
from .model import parts_of
from .scores import Measures, ranking_scores

_OWN = "sentence."  # begins the names of the weights that follow the encoder's
_EMBEDDING = "embeddings.tok_embeddings.weight"
_LARGE = 1e30  # finite, so that no gradient is NaN


class MultiVectorEncoder:
    """Embeds texts as unit vectors per token; a device gets one packed row of `chunk` texts."""

    def __init__(
        self, config: RetrievalConfig, model: ModernBertModel, tokenizer: Any, folder: pathlib.Path
    ):
        """folder: of the checkpoint that training starts from. The tokenizer gets the prefixes."""
        self.config, self.tokenizer = config, tokenizer
        self.colbert = _colbert(config, folder, model.config.hidden_size)
        model = with_prefixes(
            model, tokenizer, (self.colbert.query_prefix, self.colbert.document_prefix)
        )
        self.model_config = model.config
        self.colbert.check(tokenizer, model.config.max_position_embeddings)
        own = {_OWN + key: jnp.asarray(x) for key, x in self.colbert.sentence.params().items()}
        self.params: dict[str, Any] = flatten(model) | own
        mesh = make_mesh(MeshShape(config.devices), jax.local_devices())
        self.everywhere = NamedSharding(mesh, P())
        self._rows, self._rows3 = (NamedSharding(mesh, P(DATA, *[None] * n)) for n in (1, 2))
        self._attention = sharded(mesh, rows=(DATA,))
        self._embed = jax.jit(self._vectors)
        self._pull = jax.jit(self._add_gradient, donate_argnums=1)
        loss = functools.partial(
            {"mnrl": contrast, "kl": distill}[config.loss], temperature=config.divisor
        )
        self._loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    @staticmethod
    def decays(path: str) -> bool:
        """Whether weight decay applies to a parameter: to matrices, not to norms and biases."""
        return not path.endswith(".bias") if path.startswith(_OWN) else decays(path)

    def tokens(self, texts: Sequence[str], query: bool) -> list[TokenIds]:
        """Tokenizes queries or documents."""
        return self.colbert.token_ids(self.tokenizer, texts, query=query, split_special_tokens=True)

    def encode(self, params: Mapping[str, Any], texts: Sequence[TokenIds]) -> list[np.ndarray]:
        """Unit vectors [tokens, E] of each text, of all its tokens, float32."""
        out: list[Any] = [None] * len(texts)
        for parts, arrays in self._passes(texts):
            vectors_BLE = np.asarray(self._embed(params, *arrays))
            for row, _, start, i in placed(parts, lambda i: len(texts[i].ids)):
                out[i] = vectors_BLE[row, start : start + len(texts[i].ids)]
        return out

    def gradient(
        self,
        params: Mapping[str, Any],
        columns: Sequence[Sequence[TokenIds]],
        targets: np.ndarray | None = None,
    ) -> tuple[Any, Any]:
        """(loss, gradients) of a batch: queries, positives, then columns of negatives.

        targets: a teacher's scores of each query's own documents [Q, C], for kl.
        """
        sides = (columns[0], [text for column in columns[1:] for text in column])
        vectors, kept = zip(*(self._padded(params, side) for side in sides), strict=True)
        loss, cotangents = self._loss(*vectors, *kept, targets)
        sums = jax.tree.map(jnp.zeros_like, dict(params))
        for texts, d_NLE in zip(sides, map(np.asarray, cotangents), strict=True):
            lengths = [len(text.ids) for text in texts]
            for parts, arrays in self._passes(texts):
                d_BLE = np.zeros((*arrays[0].shape, d_NLE.shape[-1]), np.float32)
                for row, _, start, i in placed(parts, lengths.__getitem__):
                    d_BLE[row, start : start + lengths[i]] = d_NLE[i, : lengths[i]]
                sums = self._pull(params, sums, jax.device_put(d_BLE, self._rows3), *arrays)
        return loss, sums

    def score(self, params: Mapping[str, Any], measures: Measures) -> dict[str, float]:
        """nDCG and the other scores of a search by MaxSim, empty without files for it."""
        if measures.judged is None:
            return {}
        queries, documents, relevant = measures.judged
        vectors = []
        for texts, query in ((queries, True), (documents, False)):
            tokens = self.tokens(texts, query)
            all_vectors = self.encode(params, tokens)
            vectors.append([v[t.kept] for v, t in zip(all_vectors, tokens, strict=True)])
        asked, found = vectors
        blocks = (max_sim(asked[first : first + 256], found) for first in range(0, len(asked), 256))
        return ranking_scores(blocks, relevant)

    def save(self, folder: pathlib.Path, params: Mapping[str, Any], facts: dict[str, Any]) -> None:
        """Writes a folder in PyLate's layout. facts: of the model card."""
        model = module_of(ModernBertModel, self.model_config, params)
        model.save_pretrained(folder, tokenizer=self.tokenizer, card=facts)
        modules = [
            dataclasses.replace(
                module,
                weights={k: np.asarray(params[f"{_OWN}{n}.{k}"]) for k in module.weights},
            )
            for n, module in enumerate(self.colbert.sentence.modules)
            if isinstance(module, Dense)
        ]
        sentence = dataclasses.replace(self.colbert.sentence, modules=(*modules, UNIT))
        write_colbert(folder, dataclasses.replace(self.colbert, sentence=sentence))

    def _vectors(self, params, ids_BL, segments_BL, ends_BL=None):
        own = {k.removeprefix(_OWN): x for k, x in params.items() if k.startswith(_OWN)}
        model = module_of(ModernBertModel, self.model_config, params)
        return self.colbert.vectors(model, self._attention, own, ids_BL, segments_BL, ends_BL)

    def _add_gradient(self, params, sums, cotangent_BLE, *arrays):
        _, pull = jax.vjp(lambda p: self._vectors(p, *arrays), params)
        return jax.tree.map(jnp.add, sums, pull(cotangent_BLE)[0])

    def _passes(self, texts: Sequence[TokenIds]) -> Iterator[tuple[list[np.ndarray], list[Any]]]:
        """The texts of each device's row and the packed arrays, for each forward pass."""
        ids = [text.ids for text in texts]
        for parts in parts_of(ids, self.config):
            packed = fill_rows(ids, parts)
            ends_BL = attended_ends(texts, parts, packed[0].shape[1])
            arrays = packed if ends_BL is None else (*packed, ends_BL)
            yield parts, [jax.device_put(x, self._rows) for x in arrays]

    def _padded(
        self, params: Mapping[str, Any], texts: Sequence[TokenIds]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(vectors [N, L, E], which of them count [N, L]); L is one of few numbers."""
        vectors = self.encode(params, texts)
        length = row_size(max(len(v) for v in vectors), smallest=16)
        out_NLE = np.zeros((len(texts), length, vectors[0].shape[1]), np.float32)
        kept_NL = np.zeros((len(texts), length), bool)
        for i, (v, text) in enumerate(zip(vectors, texts, strict=True)):
            out_NLE[i, : len(v)], kept_NL[i, : len(v)] = v, text.kept
        return out_NLE, kept_NL


def contrast(
    queries_QLE: jax.Array,
    documents_NME: jax.Array,
    kept_QL: jax.Array,
    kept_NM: jax.Array,
    targets: jax.Array | None = None,
    *,
    temperature: float,
) -> jax.Array:
    """Mean cross-entropy (nats) of picking document i for query i by MaxSim / temperature.

    kept_QL, kept_NM: which vectors count. The scores of one query exist at a time, so memory grows
    with the tokens of all documents. Source: the Contrastive loss of PyLate; a vector that does
    not count is left out of the maximum, where PyLate takes its product as 0.
    """

    def scores(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _max_sim(*item, documents_NME, kept_NM)

    scores_QN = jax.lax.map(jax.checkpoint(scores), (queries_QLE, kept_QL)) / temperature
    own = jnp.arange(len(queries_QLE))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores_QN, own))


def distill(
    queries_QLE: jax.Array,
    documents_NME: jax.Array,
    kept_QL: jax.Array,
    kept_NM: jax.Array,
    targets_QC: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """`losses.divergence` of the MaxSim scores of each query's own documents from a teacher's.

    documents_NME: column after column, as many in each as queries. Source: DistillKLDivLoss for
    multi-vector models, and the Distillation loss of PyLate with normalize_scores=False.
    """
    by_query = lambda x: jnp.swapaxes(x.reshape(-1, len(queries_QLE), *x.shape[1:]), 0, 1)  # noqa: E731
    items = (queries_QLE, kept_QL, by_query(documents_NME), by_query(kept_NM))
    scores_QC = jax.lax.map(jax.checkpoint(lambda item: _max_sim(*item)), items)
    return divergence(scores_QC, targets_QC, temperature)


def _max_sim(
    query_LE: jax.Array, kept_L: jax.Array, documents_NME: jax.Array, kept_NM: jax.Array
) -> jax.Array:
    """The scores [N] of documents for a query."""
    products_LNM = einsum("LE,NME->LNM", query_LE, documents_NME)
    best_LN = jnp.max(jnp.where(kept_NM[None], products_LNM, -_LARGE), axis=-1)
    return jnp.sum(jnp.where(kept_L[:, None], best_LN, 0.0), axis=0)


def with_prefixes(
    model: ModernBertModel, tokenizer: Any, prefixes: Sequence[str]
) -> ModernBertModel:
    """Adds the prefixes that the tokenizer lacks as tokens; each starts as the mean embedding.

    Returns the model, with a larger vocabulary if its own has no room. Raises ValueError if the
    tokenizer's ids have gaps, which a new token could not fill without taking another's id.
    """
    new = [p for p in dict.fromkeys(prefixes) if p and p not in tokenizer.get_vocab()]
    if not new:
        return model
    if absent := absent_ids(tokenizer):
        raise ValueError(f"tokenizer: expected ids without gaps, none has the id {absent[0]}")
    tokenizer.add_tokens(new)
    vocabulary = tokenizer.get_vocab()
    params = flatten(model)
    embedding_VD = np.asarray(params[_EMBEDDING])
    size = max(len(embedding_VD), vocab_size(tokenizer))
    used = min(len(embedding_VD), *(vocabulary[p] for p in new))
    mean_D = embedding_VD[:used].astype(np.float32).mean(0)
    grown_VD = np.concatenate(
        [embedding_VD, np.zeros((size - len(embedding_VD), len(mean_D)), embedding_VD.dtype)]
    )
    grown_VD[[vocabulary[p] for p in new]] = mean_D
    params[_EMBEDDING] = jnp.asarray(grown_VD)
    return module_of(ModernBertModel, model.config.replace(vocab_size=size), params)


def _colbert(config: RetrievalConfig, folder: pathlib.Path, hidden_size: int) -> Colbert:
    """That of the start if it is a multi-vector model, else a new one with a seeded projection."""
    lengths: dict[str, Any] = {
        "query_length": config.query_length,
        "document_length": config.max_length,
    }
    if is_colbert(folder):
        colbert = dataclasses.replace(read_colbert(folder), **lengths)
        found = colbert.sentence.dimension(hidden_size, TOKENS)
        if config.embedding_size not in (None, found):
            raise ValueError(
                f"embedding_size: expected {found}, that of {config.model}, got "
                f"{config.embedding_size}"
            )
        return colbert
    size = 128 if config.embedding_size is None else config.embedding_size
    bound = hidden_size**-0.5  # as torch initializes a Linear
    weight = np.random.default_rng(config.seed).uniform(-bound, bound, (size, hidden_size))
    dense = Dense({"weight": weight.astype(np.float32)}, "Identity", reads=TOKENS, writes=TOKENS)
    return Colbert(SentenceModel((dense, UNIT)), **lengths)
