"""Texts to vectors: Embedder packs texts of any lengths into full rows."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax.attention import attention as default_attention, sharded
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.heads import pool
from modernbert_jax.inference.export import Function, batch_tokens_here, load, save
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import batch_rows, fill_rows, segment_slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What mteb passes to `encode` beside the texts.
MTEB = {"task_metadata", "hf_split", "hf_subset", "prompt_type", "batch_size", "precision"}


@dataclasses.dataclass
class Embedder:
    """Texts to vectors, packed into full rows: `Embedder.from_pretrained(path).encode(texts)`.

    pooling: "mean" or "cls" over each text. layer: -1 is the last, 0 the embeddings, as in
    hidden_states. normalize: to length 1. max_length in tokens, longer texts are cut. device: which
    one computes, by default jax's first. mesh: each device of its axis "data" takes a row. An
    instance is a model for `mteb.evaluate` as it is.
    """

    model: ModernBertModel
    tokenizer: PreTrainedTokenizerFast
    pooling: str = "mean"
    layer: int = -1
    normalize: bool = True
    max_length: int = 8192
    device: Any = None
    mesh: Mesh | None = None
    folder: str | os.PathLike[str] | None = None  # where exported functions may be
    # mteb files its results under this; set an mteb.ModelMeta to give them a name.
    mteb_model_meta: Any = None

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling: expected mean or cls, got {self.pooling!r}")
        layers = self.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer: expected {-layers - 1} to {layers}, got {self.layer}")
        self.max_length = min(self.max_length, self.model.config.max_position_embeddings)
        # Whatever the mesh's axis types: these arrays are the compiler's to place.
        mesh = self.mesh and Mesh(self.mesh.devices, self.mesh.axis_names)
        if self.device is not None:
            if mesh is not None:
                raise ValueError("device, mesh: expected one of them, got both")
            mesh = Mesh(np.array([self.device]), ("data",))
        attention = default_attention if mesh is None else sharded(mesh, rows="data")
        self._rows = 1 if mesh is None else mesh.shape["data"]
        self._where = mesh and NamedSharding(mesh, PartitionSpec("data", None))
        self._params = flatten(self.model)
        if mesh is not None:
            self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        config, layer = self.model.config, self.layer % (layers + 1)
        pooling, normalize = self.pooling, self.normalize

        def embed(params, ids_BL, segments_BL, segments: int):
            model = module_of(ModernBertModel, config, params)
            last = layer == layers
            out = model(
                ids_BL, segment_ids=segments_BL, attention=attention,
                output_hidden_states=not last,
            )  # fmt: skip
            hidden_BLD = out.last_hidden_state if last else out.hidden_states[layer]
            vectors_BSD = pool(hidden_BLD, segments_BL, segments, pooling)
            return unit(vectors_BSD) if normalize else vectors_BSD

        name = f"embed-{pooling}-{layer}{'-unit' if normalize else ''}"
        self._embed = Function(name, embed, config, None if mesh else self.folder, (3,))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: Any = None,
        revision: str | None = None,
        compile_cache: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Embedder:
        """The encoder of a checkpoint with its tokenizer.

        options: the fields. compile_cache: a folder that keeps compiled programs for later
        processes.
        """
        model, tokenizer, folder = load(
            ModernBertModel,
            path_or_repo,
            None,
            {"dtype": dtype, "revision": revision},
            compile_cache,
        )
        return cls(model, tokenizer, folder=folder, **options)

    @property
    def dimension(self) -> int:
        """Numbers a vector."""
        return self.model.config.hidden_size

    def encode(
        self,
        texts: str | Iterable[Any],
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        **more: Any,
    ) -> np.ndarray:
        """Vectors [texts, D], float32, in the order of `texts`; [D] for a single text.

        texts: one, several, or batches {"text": [...]} as mteb hands them over, whose further
        keywords (MTEB) change nothing; others raise TypeError. batch_tokens: of a row, and there is
        a row a device; by default 16,384, on a CPU 512. Sizes of rows come from a short list, so
        that compilations grow with the logarithm of the lengths.
        """
        if unknown := sorted(set(more) - MTEB):
            raise TypeError(
                f"{', '.join(unknown)}: expected batch_tokens and show_progress_bar; pooling, "
                "layer, normalize and max_length belong to Embedder itself, results are NumPy's"
            )
        batch_tokens = batch_tokens or batch_tokens_here()
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else _flat(texts)
        ids = []
        for first in range(0, len(items), 512):
            ids += self.tokenizer(
                items[first : first + 512], truncation=True, max_length=self.max_length
            )["input_ids"]
        out = np.zeros((len(ids), self.dimension), np.float32)
        batches = list(batch_rows([len(i) for i in ids], self._rows, batch_tokens))
        for rows in progress("embedding", batches, len(ids), show_progress_bar):
            input_ids, segment_ids = fill_rows(ids, rows)
            slots = segment_slots(input_ids.shape[1], max(len(row) for row in rows))
            if self._where is not None:
                input_ids, segment_ids = jax.device_put((input_ids, segment_ids), self._where)
            vectors = self._embed(self._params, input_ids, segment_ids, slots)
            for row, vectors_SD in zip(rows, np.asarray(vectors), strict=True):
                out[row] = vectors_SD[: len(row)]
        return out[0] if single else out

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosines of all vectors `a` [M, D] with all vectors `b` [N, D]: [M, N]."""
        return _unit(a) @ _unit(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosines of the vectors `a` [N, D] with those of `b` in the same place: [N]."""
        return (_unit(a) * _unit(b)).sum(-1)

    def export(
        self,
        folder: str | os.PathLike[str],
        tokens: Sequence[int] = (64, 512),
        platforms: Sequence[str] | None = None,
    ) -> list[int]:
        """Writes the model and its function for one text of so many tokens; the rows' sizes.

        `Embedder.from_pretrained(folder)` with the same options then uses them. platforms: "cpu",
        "cuda", "tpu"; by default the one at hand.
        """
        save(folder, self.model, self.tokenizer)
        more = lambda size: (segment_slots(size),)  # noqa: E731
        return self._embed.export(folder, self._params, tokens, more, platforms)


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors [..., D] of length 1; zeros stay zeros."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def _unit(vectors: Any) -> np.ndarray:
    return np.asarray(unit(jnp.atleast_2d(np.asarray(vectors, np.float32))))


def _flat(texts: Iterable[Any]) -> list[str]:
    items: list[str] = []
    for item in texts:
        items += item["text"] if isinstance(item, dict) else [item]
    return items


def progress(
    what: str, batches: list[list[list[int]]], total: int, show: bool | None
) -> Iterator[list[list[int]]]:
    """The batches, counting texts (or windows) on stderr: where it is a terminal, or as asked."""
    if not (sys.stderr.isatty() if show is None else show):
        yield from batches
        return
    done = 0
    for batch in batches:
        print(f"\r{what}: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)
        yield batch
        done += sum(len(row) for row in batch)
    print(f"\r{what}: {done:,} of {total:,}", file=sys.stderr)
