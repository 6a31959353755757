"""The bi-encoder: vectors of texts, and the gradient of a loss over large batches.

A batch may need more memory than the devices have. Its texts are embedded in chunks without
gradients, then the gradient of the loss with respect to the embeddings is computed, and each chunk
runs again with this as its cotangent. The result is the same gradient. Source: gradient caching,
arXiv 2101.06983.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig, ModernBertModel
from modernbert_jax.attention import sharded
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.heads import pool
from modernbert_jax.inference.sentence import unit
from modernbert_jax.packing import fill_rows

from ...common.sharding import DATA, MeshShape, make_mesh
from .config import RetrievalConfig
from .losses import loss_of


def parts_of(
    texts: Sequence[Sequence[int] | np.ndarray], config: RetrievalConfig
) -> Iterator[list[np.ndarray]]:
    """Yields the indices of each device's texts, of similar lengths, for each forward pass."""
    order = np.argsort([-len(ids) for ids in texts], kind="stable")
    for first in range(0, len(order), config.devices * config.chunk):
        some = order[first : first + config.devices * config.chunk]
        yield [some[d :: config.devices] for d in range(config.devices)]


class Encoder:
    """Embeds texts as unit vectors; each device gets one packed row of at most `chunk` texts."""

    def __init__(self, config: RetrievalConfig, model_config: ModernBertConfig):
        self.config, self.model_config = config, model_config
        self.mesh = make_mesh(MeshShape(config.devices), jax.local_devices())
        self.rows = NamedSharding(self.mesh, P(DATA, None))
        self.everywhere = NamedSharding(self.mesh, P())
        self.attention = sharded(self.mesh, rows=(DATA,))
        self.embed = jax.jit(self._embed)
        self.pull = jax.jit(self._pull, donate_argnums=3)
        self.loss = jax.jit(jax.value_and_grad(loss_of(config)))

    def _embed(self, params, ids_BL, segments_BL):
        model = module_of(ModernBertModel, self.model_config, params)
        out = model(ids_BL, segment_ids=segments_BL, attention=self.attention)
        pooled_BSD = pool(
            out.last_hidden_state, segments_BL, self.config.chunk, self.config.pooling
        )
        return unit(pooled_BSD)

    def _pull(self, params, ids_BL, segments_BL, sums, cotangent_BSD):
        _, pull = jax.vjp(lambda p: self._embed(p, ids_BL, segments_BL), params)
        return jax.tree.map(jnp.add, sums, pull(cotangent_BSD)[0])

    def groups(self, texts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, jax.Array, jax.Array]]:
        """(which texts, input_ids, segment_ids) of each forward pass; -1 is an empty slot."""
        out = []
        for parts in parts_of(texts, self.config):
            ids, segments = fill_rows(texts, parts)
            put = lambda x: jax.device_put(x, self.rows)  # noqa: E731
            which = np.full((self.config.devices, self.config.chunk), -1)
            for row, part in enumerate(parts):
                which[row, : len(part)] = part
            out.append((which, put(ids), put(segments)))
        return out

    def encode(self, params, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors [texts, D], float32."""
        out = np.zeros((len(texts), self.model_config.hidden_size), np.float32)
        for which, ids, segments in self.groups(texts):
            out[which[which >= 0]] = np.asarray(self.embed(params, ids, segments))[which >= 0]
        return out

    def gradient(
        self,
        params,
        columns: Sequence[Sequence[np.ndarray]],
        targets: np.ndarray | None = None,
    ):
        """(loss, gradients) of a batch: the texts of each column, and the targets of its examples.

        The loss sees the vectors of all devices, so each example is compared with all others.
        """
        texts = [ids for column in columns for ids in column]
        ends = np.cumsum([len(column) for column in columns])
        vectors = np.split(self.encode(params, texts), ends[:-1])
        loss, d_columns = self.loss(vectors, targets)
        d_vectors = np.concatenate(d_columns)
        sums = jax.tree.map(jnp.zeros_like, params)
        for which, ids, segments in self.groups(texts):
            cotangent = np.where(which[..., None] >= 0, d_vectors[which], 0.0).astype(np.float32)
            cotangent = jax.device_put(cotangent, NamedSharding(self.mesh, P(DATA, None, None)))
            sums = self.pull(params, ids, segments, sums, cotangent)
        return loss, sums
