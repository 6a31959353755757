"""Rotary position embeddings: the tables, and the rotation of q and k."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds

Rope = tuple[jax.Array, jax.Array]  # cos and sin from `rope_tables`


def rope_tables(positions_BL: jax.Array, head_dim: int, theta: float) -> Rope:
    """Returns cos and sin of the RoPE angles in float32, each [B, L, K/2]; positions in tokens."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jax.lax.platform_dependent(
        angles, cpu=_tables_once, default=lambda x: (jnp.cos(x), jnp.sin(x))
    )


def _tables_once(angles: jax.Array) -> Rope:
    """(cos, sin) of a loop, which nothing fuses with.

    XLA's CPU compiler counts both functions as cheap and drops optimization barriers before it
    fuses, so it would compute them again for every head of every layer.
    """
    both = jax.lax.map(lambda i: jax.lax.cond(i == 0, jnp.cos, jnp.sin, angles), jnp.arange(2))
    return both[0], both[1]


def apply_rope(x_BLHK: jax.Array, tables: Rope) -> jax.Array:
    """Rotates the two halves of each head (NeoX layout, not interleaved) in float32."""
    cos, sin = (t[:, :, None, :] for t in tables)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHK.dtype)


def rotated(
    attention: Callable[..., jax.Array],
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    rope: Rope | None = None,
) -> jax.Array:
    """Calls an attention function that does not rotate with q and k rotated by `rope`."""
    if rope is not None:
        q_BLHK, k_BMHK = apply_rope(q_BLHK, rope), apply_rope(k_BMHK, rope)
    return attention(q_BLHK, k_BMHK, v_BMHK, bounds, scale=scale)
