"""The attention mask as two integers per query: the interval of keys that it sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Query i sees the keys lo_BL[i] <= j < hi_BL[i], and none if both are equal (padding).

    The relation is symmetric: key j is seen by the queries in its own interval. Only where the
    queries are a part of the row (L < M, see `context`), or some tokens are not attended to, do the
    keys have intervals of their own, key_lo_BM and key_hi_BM, in indices of queries. `window` is
    the radius that the interval already includes (None for a global layer); it is static, so that
    an implementation can choose its tiles by it. `whole` is static too and promises that every row
    is one segment without padding.
    """

    lo_BL: jax.Array
    hi_BL: jax.Array
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    whole: bool = dataclasses.field(default=False, metadata={"static": True})
    key_lo_BM: jax.Array | None = None
    key_hi_BM: jax.Array | None = None

    @property
    def of_keys(self) -> "Bounds":
        """The same relation seen from the keys: the interval of queries that see each key."""
        if self.key_lo_BM is None or self.key_hi_BM is None:
            return self
        return Bounds(self.key_lo_BM, self.key_hi_BM, self.window)

    def as_mask(self, key_length: int | None = None) -> jax.Array:
        """Returns the dense mask_BLM; for tests, plots and the reference only."""
        length = self.lo_BL.shape[1] if key_length is None else key_length
        j = jnp.arange(length, dtype=jnp.int32)[None, None, :]
        return (self.lo_BL[..., None] <= j) & (j < self.hi_BL[..., None])


def make_bounds(
    segment_ids: jax.Array | np.ndarray, window: int | None = None, *, whole: bool = False
) -> Bounds:
    """Builds the bounds of packed rows: a query sees its segment, at most `window` tokens away.

    segment_ids: [B, L]; a segment is a maximal run of equal nonzero ids, and 0 is padding, which
    sees nothing and is not seen. window: a radius, inclusive on both sides (64 for Hugging Face's
    local_attention=128); with 0 a token sees only itself. whole: a promise that all ids are equal
    and not 0. Raises ValueError for a negative window and, for NumPy arrays, for ids that are
    negative or decrease along a row.
    """
    if window is not None and window < 0:
        raise ValueError(f"window: expected None or a radius of at least 0 tokens, got {window}")
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids: expected shape [B, L], got {segment_ids.shape}")
    check_segment_ids(segment_ids)
    ids_BL = jnp.asarray(segment_ids, jnp.int32)
    length = ids_BL.shape[1]
    i_1L = jnp.arange(length, dtype=jnp.int32)[None, :]
    changes = ids_BL[:, 1:] != ids_BL[:, :-1]
    edge = jnp.ones_like(ids_BL[:, :1], dtype=bool)
    starts = jnp.concatenate([edge, changes], axis=1)
    ends = jnp.concatenate([changes, edge], axis=1)
    lo_BL = jax.lax.cummax(jnp.where(starts, i_1L, 0), axis=1)
    hi_BL = jax.lax.cummin(jnp.where(ends, i_1L + 1, length), axis=1, reverse=True)
    if window is not None:
        lo_BL = jnp.maximum(lo_BL, i_1L - window)
        hi_BL = jnp.minimum(hi_BL, i_1L + window + 1)
    padding = ids_BL == 0
    return Bounds(jnp.where(padding, i_1L, lo_BL), jnp.where(padding, i_1L, hi_BL), window, whole)


def host_array(name: str, x: Any) -> np.ndarray | None:
    """Returns a list or a NumPy array as an array; None for jax arrays, whose values may not exist.

    To read a value of an array on a device would wait for the device, and a tracer has none.
    """
    if isinstance(x, jax.Array):
        return None
    refuse_traced_list(name, x)
    try:
        return np.asarray(x)
    except ValueError:
        raise ValueError(f"{name}: expected lists of one length, got several; pad them") from None


def refuse_traced_list(name: str, x: Any) -> None:
    """Raises TypeError for lists inside a compiled function, where each number is an argument."""
    first = x
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if first is not x and isinstance(first, jax.core.Tracer):  # type: ignore[attr-defined]
        raise TypeError(
            f"{name}: expected an array in a compiled function, got lists, whose numbers would be "
            'an argument each; call the tokenizer with return_tensors="np"'
        )


def check_segment_ids(segment_ids: Any) -> None:
    """Raises ValueError for ids [..., L] that are no integers, negative, or decrease along a row.

    The values of jax arrays are not read.
    """
    ids = host_array("segment_ids", segment_ids)
    dtype = segment_ids.dtype if ids is None else ids.dtype
    if np.dtype(dtype).kind not in "iub":
        raise ValueError(f"segment_ids: expected integers, got {dtype}")
    if ids is None or not ids.size:
        return
    ids_BL = ids.reshape(-1, ids.shape[-1])
    for worst in (ids_BL.min(), ids_BL.max()):
        if not 0 <= worst < 2**31:
            raise ValueError(
                f"segment_ids: expected ids of 0 (padding) to {2**31 - 1}, got {worst}"
            )
    so_far_BL = np.maximum.accumulate(ids_BL, axis=1)
    falls_BL = (ids_BL > 0) & (ids_BL < so_far_BL)
    if falls_BL.any():
        row, i = (int(x[0]) for x in np.nonzero(falls_BL))
        raise ValueError(
            f"segment_ids: expected ids that rise along a row, row {row} has {ids_BL[row, i]} "
            f"after {so_far_BL[row, i]} at token {i}"
        )


def check_mask(attention_mask: Any) -> None:
    """Raises ValueError for a mask [..., L] with other values than 0 and 1.

    The values of jax arrays are not read.
    """
    mask = host_array("attention_mask", attention_mask)
    if mask is not None and (odd := mask[(mask != 0) & (mask != 1)]).size:
        raise ValueError(
            f"attention_mask: expected 1 for tokens and 0 for padding, got {odd.flat[0]}"
        )


def has_holes(attention_mask: Any) -> Any:
    """Returns for each row of a mask [B, L] whether its ones are more than one run, [B]."""
    mask = attention_mask != 0
    starts = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return starts > 1


def make_segment_ids(
    shape: tuple[int, ...],
    attention_mask: jax.Array | np.ndarray | None = None,
    segment_ids: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Builds segment_ids_BL from whichever inputs a caller has; without any, all ones.

    shape: [B, L], the shape of input_ids. attention_mask: 1 for tokens and 0 for padding; it sets
    the ids of padding to 0. Raises ValueError for other shapes and, for lists and NumPy arrays, for
    a mask with holes and no segment_ids: its tokens would not be one interval. In a jax array,
    whose values are not read, the runs between holes become separate segments.
    """
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"input_ids: expected shape [B, L] with at least one token, got {tuple(shape)}"
        )
    for name, x in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if x is not None and np.shape(x) != shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids {tuple(shape)}, got {np.shape(x)}"
            )
    if attention_mask is not None:
        check_mask(attention_mask)
    if segment_ids is not None:
        check_segment_ids(segment_ids)
        ids_BL = jnp.asarray(segment_ids, jnp.int32)
        if attention_mask is None:
            return ids_BL
        return jnp.where(jnp.asarray(attention_mask) != 0, ids_BL, 0)
    if attention_mask is None:
        return jnp.ones(shape, jnp.int32)
    mask = host_array("attention_mask", attention_mask)
    if mask is not None and (holes_B := has_holes(mask)).any():
        raise ValueError(
            "attention_mask: expected one run of ones per sequence (padding on the left or "
            f"right), sequence {int(np.argmax(holes_B))} has holes; pass segment_ids for packed "
            "sequences"
        )
    return (jnp.asarray(attention_mask) != 0).astype(jnp.int32)


def tile_bounds(
    bounds: Bounds, tile_q: int, tile_k: int, num_tiles_q: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the key tiles that each query tile visits: the first and one past the last, [B, T].

    T is the number of query tiles (L / tile_q, rounded up, or `num_tiles_q`). A tile whose queries
    see nothing gets (0, 0). The mask is symmetric, so the same call with the sizes swapped returns
    the query tiles that each key tile visits.
    """
    length = bounds.lo_BL.shape[1]
    tiles = -(-length // tile_q) if num_tiles_q is None else num_tiles_q
    tail = ((0, 0), (0, tiles * tile_q - length))
    some_BL = bounds.lo_BL < bounds.hi_BL
    lo_BL = jnp.pad(jnp.where(some_BL, bounds.lo_BL, length), tail, constant_values=length)
    hi_BL = jnp.pad(jnp.where(some_BL, bounds.hi_BL, 0), tail)
    lo_BT = jnp.min(lo_BL.reshape(-1, tiles, tile_q), axis=-1) // tile_k
    hi_BT = -(-jnp.max(hi_BL.reshape(-1, tiles, tile_q), axis=-1) // tile_k)
    some_BT = hi_BT > 0
    return jnp.where(some_BT, lo_BT, 0), jnp.where(some_BT, hi_BT, 0)
