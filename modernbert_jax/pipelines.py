"""Texts in, answers out: FillMask, in transformers' form, and Embedder, texts to vectors."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax.attention import attention as default_attention, sharded
from modernbert_jax.heads import ModernBertForMaskedLM, pool
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import row_size
from modernbert_jax.tokenizer import AutoTokenizer, Tokenizer


def pipeline(
    task: str,
    model: Any = None,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    **options: Any,
) -> "FillMask":
    """transformers' entry, for the tasks here: "fill-mask".

    model: a folder, a hub id, or a ModernBertForMaskedLM with a tokenizer beside it. options: those
    of `from_pretrained` (dtype, ...) and top_k. Raises ValueError for another task.
    """
    if task != "fill-mask":
        raise ValueError(f"task: expected fill-mask, got {task!r}; Embedder makes vectors")
    top_k = options.pop("top_k", 5)
    return FillMask(*_loaded(ModernBertForMaskedLM, model, tokenizer, options), top_k)


def _loaded(cls: type, model: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    if isinstance(model, str | os.PathLike):
        tokenizer = model if tokenizer is None else tokenizer
        model = cls.from_pretrained(model, **options)  # type: ignore[attr-defined]
    if not isinstance(model, cls):
        raise TypeError(
            f"model: expected a folder, a hub id or a {cls.__name__}, got {type(model).__name__}"
        )
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError("tokenizer: expected a folder, a hub id or a Tokenizer, got none of them")
    return model, tokenizer


class FillMask:
    """`pipe("[MASK] is a disease.")`: the likeliest tokens in the place of each [MASK].

    Source: transformers' FillMaskPipeline, whose results these are: a list of {"score", "token",
    "token_str", "sequence"} for a text with one mask, one such list a mask for several, and a list
    of those for a list of texts (but for a list of one, as there).
    """

    def __init__(self, model: ModernBertForMaskedLM, tokenizer: Tokenizer, top_k: int = 5):
        self.model, self.tokenizer, self.top_k = model, tokenizer, top_k
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: expected a mask token, found none")
        graph, self._state = nnx.split(model)

        @jax.jit
        def probabilities(state, ids_BL, mask_BL, places_BP):
            model = nnx.merge(graph, state)
            out = model(ids_BL, attention_mask=mask_BL, predict_positions=places_BP)
            return jax.nn.softmax(out.logits, axis=-1)

        self._probabilities = probabilities

    def __call__(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
    ) -> list[Any]:
        """Fills the masks of a text, or of each of a list of texts.

        top_k: how many tokens. targets: only these words are scored; of one that is no token the
        first is taken. Raises ValueError for a text without a mask, or longer than the model.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        wanted = None if targets is None else self._targets(targets)
        results = [self._fill(text, top_k or self.top_k, wanted) for text in texts]
        return results[0] if len(texts) == 1 else results

    def _fill(self, text: str, top_k: int, targets: np.ndarray | None) -> list[Any]:
        tokenizer = self.tokenizer
        ids = np.asarray(tokenizer(text)["input_ids"])
        longest = self.model.config.max_position_embeddings
        if len(ids) > longest:
            raise ValueError(f"text: {len(ids):,} tokens, the model takes {longest:,}; shorten it")
        places = np.flatnonzero(ids == tokenizer.mask_token_id)
        if not len(places):
            raise ValueError(
                f"text: expected {tokenizer.mask_token} where a word is to be found, got none"
            )
        size, count = row_size(len(ids)), 2 ** (len(places) - 1).bit_length()  # few shapes
        padded, mask = np.full((1, size), tokenizer.pad_token_id or 0), np.zeros((1, size), int)
        padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        asked = np.resize(places, (1, count))
        p_PV = np.asarray(self._probabilities(self._state, padded, mask, asked))[0, : len(places)]
        p_PV = p_PV if targets is None else p_PV[:, targets]
        rows = []
        for place, p_V in zip(places, p_PV, strict=True):
            best = np.argsort(-p_V, kind="stable")[:top_k]
            row = []
            for index in best:
                token = int(index if targets is None else targets[index])
                filled = ids.copy()
                filled[place] = token
                # With one mask the text alone; with more, the others must stay to be seen.
                sequence = tokenizer.decode(
                    filled[filled != tokenizer.pad_token_id].tolist(),
                    skip_special_tokens=len(places) == 1,
                )
                row.append(
                    {
                        "score": float(p_V[index]),
                        "token": token,
                        "token_str": tokenizer.decode([token]),
                        "sequence": sequence,
                    }
                )
            rows.append(row)
        return rows[0] if len(rows) == 1 else rows

    def _targets(self, targets: str | Sequence[str]) -> np.ndarray:
        vocabulary = self.tokenizer.get_vocab()
        ids = []
        for target in [targets] if isinstance(targets, str) else targets:
            known = vocabulary.get(target)
            pieces = [known] if known is not None else self.tokenizer.encode(
                target, add_special_tokens=False
            )[:1]  # fmt: skip
            ids += pieces
        if not ids:
            raise ValueError("targets: expected at least one word of the vocabulary, got none")
        return np.unique(ids)


@dataclasses.dataclass
class Embedder:
    """Texts to vectors, packed into full rows: `Embedder.from_pretrained(path).encode(texts)`.

    pooling: "mean" or "cls" over each text. layer: -1 is the last, 0 the embeddings, as in
    hidden_states. normalize: to length 1. max_length in tokens, longer texts are cut. mesh: each
    device of its axis "data" takes a row.
    """

    model: ModernBertModel
    tokenizer: Tokenizer
    pooling: str = "mean"
    layer: int = -1
    normalize: bool = True
    max_length: int = 8192
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling: expected mean or cls, got {self.pooling!r}")
        layers = self.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"layer: expected {-layers - 1} to {layers}, got {self.layer}")
        self.max_length = min(self.max_length, self.model.config.max_position_embeddings)
        graph, self._state = nnx.split(self.model)
        if (
            self.mesh is not None
        ):  # whatever its axis types: these arrays are the compiler's to place
            self.mesh = Mesh(self.mesh.devices, self.mesh.axis_names)
        self._rows = 1 if self.mesh is None else self.mesh.shape["data"]
        attention = default_attention if self.mesh is None else sharded(self.mesh, rows="data")
        last = self.layer in (-1, layers)

        def embed(state, ids_BL, segments_BL, segments: int):
            model = nnx.merge(graph, state)
            out = model(
                ids_BL, segment_ids=segments_BL, attention=attention,
                output_hidden_states=not last,
            )  # fmt: skip
            hidden_BLD = out.last_hidden_state if last else out.hidden_states[self.layer]
            vectors_BSD = pool(hidden_BLD, segments_BL, segments, self.pooling)
            if self.normalize:
                squares = jnp.sum(vectors_BSD**2, axis=-1, keepdims=True)
                vectors_BSD *= jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
            return vectors_BSD

        self._embed: Callable[..., jax.Array] = jax.jit(embed, static_argnums=3)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike, *, dtype: Any = None, **options: Any
    ) -> "Embedder":
        """The encoder of a checkpoint with its tokenizer. options: the fields."""
        model, tokenizer = _loaded(ModernBertModel, path_or_repo, None, {"dtype": dtype})
        return cls(model, tokenizer, **options)

    @property
    def dimension(self) -> int:
        """Numbers a vector."""
        return self.model.config.hidden_size

    def encode(
        self,
        texts: str | Sequence[str],
        batch_tokens: int = 16_384,
        show_progress_bar: bool | None = None,
        **_: Any,
    ) -> np.ndarray:
        """Vectors [texts, D], float32, in the order of `texts`; [D] for a single text.

        batch_tokens: of a row, and there is a row a device. Sizes of rows and numbers of texts in
        one come from short lists, so that compilations grow with the logarithm of both.
        """
        single = isinstance(texts, str)
        items = [texts] if single else list(texts)
        ids = []
        for first in range(0, len(items), 512):
            ids += self.tokenizer(
                items[first : first + 512], truncation=True, max_length=self.max_length
            )["input_ids"]
        out = np.zeros((len(ids), self.dimension), np.float32)
        batches = list(_batches([len(i) for i in ids], self._rows, batch_tokens))
        for batch in _progress(batches, len(ids), show_progress_bar):
            size = row_size(max(sum(len(ids[i]) for i in row) for row in batch))
            count = 2 ** (max(len(row) for row in batch) - 1).bit_length()
            tokens, segments = np.zeros((2, self._rows, size), np.int32)
            for r, row in enumerate(batch):
                joined = np.concatenate([ids[i] for i in row]) if row else np.zeros(0, np.int32)
                tokens[r, : len(joined)] = joined
                numbers = np.repeat(np.arange(1, len(row) + 1), [len(ids[i]) for i in row])
                segments[r, : len(joined)] = numbers
            vectors = self._embed(self._state, self._place(tokens), self._place(segments), count)
            for r, row in enumerate(np.asarray(vectors)):
                out[batch[r]] = row[: len(batch[r])]
        return out[0] if single else out

    def _place(self, array: np.ndarray) -> Any:
        if self.mesh is None:
            return array
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec("data", None)))


def _batches(lengths: Sequence[int], rows: int, batch_tokens: int):
    """Lists of `rows` lists of texts: alike in length, each row at most batch_tokens (or one)."""
    batch: list[list[int]] = [[]]
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch[-1] and filled + lengths[i] > batch_tokens:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            filled = 0
        batch[-1].append(i)
        filled += lengths[i]
    if batch[0]:
        yield batch + [[] for _ in range(rows - len(batch))]


def _progress(batches: list[list[list[int]]], total: int, show: bool | None):
    """The batches, with a count of texts on stderr: where it is a terminal, or as asked."""
    if not (sys.stderr.isatty() if show is None else show):
        yield from batches
        return
    done = 0
    for batch in batches:
        print(f"\rembedding {done:,} of {total:,} texts", end="", file=sys.stderr, flush=True)
        yield batch
        done += sum(len(row) for row in batch)
    print(f"\rembedded {done:,} of {total:,} texts ", file=sys.stderr)
