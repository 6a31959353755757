"""Embeds texts: Embedder packs texts of any lengths into full sequences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax.attention import attention as default_attention, check, sharded
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.heads import pool
from modernbert_jax.inference.export import (
    Function,
    load,
    packed_batches,
    save,
    tokens_per_sequence,
    whole_number,
)
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import segment_slots
from modernbert_jax.tokenizer import check_ids, max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass
class Embedder:
    """Turns texts into vectors: `Embedder.from_pretrained(path).encode(texts)`.

    pooling: "mean" or "cls" over each text. layer: the hidden states to pool; -1 is the last layer,
    0 the embeddings. normalize: scales vectors to length 1. max_length: in tokens, at most the
    model's and the tokenizer's limits; longer texts are truncated. device: computes, by default
    jax's first device. mesh: each device of its axis "data" gets one packed sequence per step. An
    instance is a model for `mteb.evaluate`.
    """

    model: ModernBertModel
    tokenizer: PreTrainedTokenizerFast
    pooling: str = "mean"
    layer: int = -1
    normalize: bool = True
    max_length: int = 8192
    device: Any = None
    mesh: Mesh | None = None
    folder: str | os.PathLike[str] | None = None  # of functions that this user exported
    mteb_model_meta: Any = None  # mteb files results under the name in an mteb.ModelMeta

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling: expected mean or cls, got {self.pooling!r}")
        layers = self.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer: expected {-layers - 1} to {layers}, got {self.layer}")
        check_ids(self.tokenizer, self.model.config.vocab_size)
        limit = whole_number("max_length", self.max_length, 1)
        limit = min(limit, self.model.config.max_position_embeddings)
        self.max_length = max_tokens(self.tokenizer, limit)
        # A new mesh, because the axes may be explicit and these arrays are placed by the compiler.
        mesh = self.mesh and Mesh(self.mesh.devices, self.mesh.axis_names)
        if self.device is not None:
            if mesh is not None:
                raise ValueError("device, mesh: expected one of them, got both")
            mesh = Mesh(np.array([self.device]), ("data",))
        attention = default_attention if mesh is None else sharded(mesh, rows="data")
        if mesh is not None:  # may consist of other devices than the default one
            config = self.model.config
            check(mesh.local_devices[0], dtype=config.dtype, head_dim=config.head_dim)
        self._sequences = 1 if mesh is None else mesh.shape["data"]
        self._sharding = mesh and NamedSharding(mesh, PartitionSpec("data", None))
        self._params = flatten(self.model)
        if mesh is not None:
            self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        config, layer = self.model.config, self.layer % (layers + 1)
        pooling, normalize = self.pooling, self.normalize

        def embed(params, input_ids_BL, segment_ids_BL, segments: int):
            model = module_of(ModernBertModel, config, params)
            last = layer == layers
            out = model(
                input_ids_BL, segment_ids=segment_ids_BL, attention=attention,
                output_hidden_states=not last,
            )  # fmt: skip
            hidden_BLD = out.last_hidden_state if last else out.hidden_states[layer]
            vectors_BSD = pool(hidden_BLD, segment_ids_BL, segments, pooling)
            return unit(vectors_BSD) if normalize else vectors_BSD

        name = f"embed-{pooling}-{layer}{'-unit' if normalize else ''}"
        self._embed = Function(name, embed, config, None if mesh else self.folder, (3,))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        pooling: str = "mean",
        layer: int = -1,
        normalize: bool = True,
        max_length: int = 8192,
        device: Any = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        revision: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        exported: bool = False,
    ) -> Embedder:
        """Loads the encoder and the tokenizer of a checkpoint.

        dtype, revision: as in `ModernBertModel.from_pretrained`. compile_cache: a folder that keeps
        compiled programs for later processes. exported: use the functions that you have exported
        into this local folder; other people's are refused. The other arguments are the fields of
        the class.
        """
        options = {"dtype": dtype, "revision": revision}
        model, tokenizer, folder = load(
            ModernBertModel, path_or_repo, None, options, compile_cache, exported
        )
        return cls(model, tokenizer, pooling, layer, normalize, max_length, device, mesh, folder)

    @property
    def dimension(self) -> int:
        """The embedding dimension."""
        return self.model.config.hidden_size

    def encode(
        self,
        texts: str | Iterable[Any],
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        task_metadata: Any = None,
        hf_split: Any = None,
        hf_subset: Any = None,
        prompt_type: Any = None,
        batch_size: Any = None,
        precision: Any = None,
        **unsupported: Any,
    ) -> np.ndarray:
        """Returns vectors [texts, D], float32, in the order of `texts`; [D] for a single text.

        texts: one text, several, or batches {"text": [...]} as mteb passes them. batch_tokens: per
        packed sequence, of which each device gets one; by default 16,384, on a CPU 512. Sequence
        lengths come from a short list, so that few programs are compiled. show_progress_bar: None
        shows it in a terminal only. mteb also passes task_metadata, hf_split, hf_subset,
        prompt_type, batch_size and precision, which have no effect. Raises TypeError for other
        arguments.
        """
        if unsupported:
            raise TypeError(
                f"{', '.join(sorted(unsupported))}: expected batch_tokens and show_progress_bar; "
                "pass pooling, layer, normalize and max_length to Embedder; results are NumPy's"
            )
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else _flat(texts)
        ids: list[list[int]] = []
        for first in range(0, len(items), 512):
            ids += self.tokenizer(
                items[first : first + 512], truncation=True, max_length=self.max_length
            )["input_ids"]
        out = np.zeros((len(ids), self.dimension), np.float32)
        for batch, input_ids, segment_ids in packed_batches(
            ids,
            self._sequences,
            tokens_per_sequence(batch_tokens),
            "embedding",
            show_progress_bar,
        ):
            slots = segment_slots(input_ids.shape[1], max(map(len, batch)))
            if self._sharding is not None:
                input_ids, segment_ids = jax.device_put((input_ids, segment_ids), self._sharding)
            vectors_BSD = np.asarray(self._embed(self._params, input_ids, segment_ids, slots))
            for indices, vectors_SD in zip(batch, vectors_BSD, strict=True):
                out[indices] = vectors_SD[: len(indices)]
        return out[0] if single else out

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Returns the cosines of all vectors `a` [M, D] with all vectors `b` [N, D]: [M, N]."""
        return _unit(a) @ _unit(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Returns the cosine of each vector of `a` [N, D] with the same one of `b` [N, D]: [N]."""
        return (_unit(a) * _unit(b)).sum(-1)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model and its function for one text of up to each number of tokens.

        Returns the sequence lengths. `Embedder.from_pretrained(folder, exported=True)` with the
        same options uses the functions. platforms: "cpu", "cuda", "tpu"; by default the platform of
        this process.
        """
        save(folder, self.model, self.tokenizer)
        slots = lambda size: (segment_slots(size),)  # noqa: E731
        return self._embed.export(folder, self._params, tokens, slots, platforms)


def unit(vectors: jax.Array) -> jax.Array:
    """Scales vectors [..., D] to length 1; zeros stay zeros."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def _unit(vectors: Any) -> np.ndarray:
    return np.asarray(unit(jnp.atleast_2d(np.asarray(vectors, np.float32))))


def _flat(texts: Iterable[Any]) -> list[str]:
    items: list[str] = []
    for item in texts:
        items += item["text"] if isinstance(item, dict) else [item]
    return items
