"""Attention for rows whose tokens are split over a mesh axis (context parallelism).

A device holds L/n consecutive tokens of each row. In a local layer it receives the keys and values
of `window` tokens from each neighbor; in a global layer it gathers those of the row. The transposes
of both, which JAX derives, return dk and dv to the devices that the keys came from.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.rope import Rope, apply_rope


def context_parallel(attention: Callable[..., jax.Array], axis: str) -> Callable[..., jax.Array]:
    """Wraps an attention function for tokens that are split over the mesh axis `axis`.

    The result must be called inside `jax.shard_map` over that axis: q, k and v are a device's part
    [B, L/n, H, K] and so is the output, while `bounds` describes the complete rows, [B, L]. Raises
    ValueError if the parts do not make up the row.
    """

    def run(q_BLHK, k_BLHK, v_BLHK, bounds: Bounds, *, scale: float, rope: Rope | None = None):
        if rope is not None:
            q_BLHK, k_BLHK = apply_rope(q_BLHK, rope), apply_rope(k_BLHK, rope)
        parts, length = jax.lax.axis_size(axis), q_BLHK.shape[1]
        if parts * length != bounds.lo_BL.shape[1]:
            raise ValueError(
                f"attention: expected 1/{parts} of rows of {bounds.lo_BL.shape[1]} tokens (mesh "
                f"axis {axis}), got {length}"
            )
        start = jax.lax.axis_index(axis) * length
        window = bounds.window
        if window is None or window > length:
            k, v = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_BLHK, v_BLHK))
            return attention(q_BLHK, k, v, _of_queries(bounds, start, length), scale=scale)
        # With queries of zeros in the halo, queries and keys are the same tokens, as all kernels
        # expect. Their output is dropped, so that they add nothing to dk and dv.
        q = _pad(q_BLHK, window)
        k, v = (_with_halo(x, window, axis) for x in (k_BLHK, v_BLHK))
        bounds = _with_halo_bounds(bounds, start, length)
        out = attention(q, k, v, bounds, scale=scale)
        return out[:, window : window + length]

    if hasattr(attention, "heads_in_a_block"):  # meant for TPUs, see `row_major`
        run.heads_in_a_block = lambda q_BLHK, bounds: 0
    return run


def _slice(x_BL: jax.Array, start, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BL, start, length, axis=1)


def _pad(x_BL: jax.Array, n: int) -> jax.Array:
    """Adds n zeros before and after the tokens."""
    return jnp.pad(x_BL, ((0, 0), (n, n), *((0, 0),) * (x_BL.ndim - 2)))


def _of_queries(bounds: Bounds, start, length: int) -> Bounds:
    """Returns the bounds of queries `start` to `start + length` among all keys of the rows."""
    lo, hi = (_slice(x, start, length) for x in (bounds.lo_BL, bounds.hi_BL))
    key_lo, key_hi = (jnp.clip(x - start, 0, length) for x in (bounds.lo_BL, bounds.hi_BL))
    return Bounds(lo, hi, key_lo_BM=key_lo, key_hi_BM=key_hi)


def _with_halo_bounds(bounds: Bounds, start, length: int) -> Bounds:
    """Returns the bounds of `length` tokens and the halo around them; none beyond the row's ends.

    In padding, where lo equals hi, both stay equal.
    """
    window = bounds.window or 0
    size = length + 2 * window
    lo, hi = (
        jnp.clip(_slice(_pad(x, window), start, size) - start + window, 0, size)
        for x in (bounds.lo_BL, bounds.hi_BL)
    )
    return Bounds(lo, hi, window)


def _with_halo(x_BLHK: jax.Array, window: int, axis: str) -> jax.Array:
    """Adds the last tokens of the previous part and the first of the next; zeros at the ends."""
    if not window:
        return x_BLHK
    n = jax.lax.axis_size(axis)
    before = jax.lax.ppermute(x_BLHK[:, -window:], axis, [(i, i + 1) for i in range(n - 1)])
    after = jax.lax.ppermute(x_BLHK[:, :window], axis, [(i + 1, i) for i in range(n - 1)])
    return jnp.concatenate([before, x_BLHK, after], axis=1)
