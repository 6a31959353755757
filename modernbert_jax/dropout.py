"""Dropout whose bits are a hash of a key and of the element's position.

jax.random's bits cost a TPU more than three times as much as the product that they follow, since
threefry runs twenty rounds per element. A hash of two multiplications is fused into that product,
takes no memory, and gives the same bits on every mesh, with or without scan and rematerialization.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# The multipliers of the 32-bit mixer "lowbias32" (https://github.com/skeeto/hash-prospector), found
# by search for the least bias of its avalanche, and an odd number close to 2^32 / golden ratio.
_FIRST, _SECOND, _STRIDE = (np.uint32(n) for n in (0x7FEB352D, 0x846CA68B, 0x9E3779B9))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity if `key` is None or the rate is 0.

    key: a jax.random key, or one for each index of the first axis of x.
    """
    if key is None or not rate:
        return x

    return _drop(rate, x, jax.random.key_data(key))


def fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """Derives the key (or keys) of one use of dropout; None (no dropout) stays None."""
    if key is None or not key.ndim:
        return None if key is None else jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, number)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(rate: float, x: jax.Array, words: jax.Array) -> jax.Array:
    keep = _keep(words, rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


# The backward pass computes the bits again: saving them would take a byte per element.
_drop.defvjp(
    lambda rate, x, words: (_drop(rate, x, words), words),
    lambda rate, words, d: (_drop(rate, d, words), None),
)


def _keep(words: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Returns which elements of an array of this shape are kept.

    words: a key's words [n], or [B, n]. The index over all axes but the last is hashed with them,
    which costs little; each element then needs only one round (`kept`).
    """
    leading = words.ndim - 1
    *rows, width = shape[leading:]
    row = jnp.zeros(tuple(rows), jnp.uint32)
    for axis, size in enumerate(rows):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, tuple(rows), axis)
    row = row.reshape((1,) * leading + row.shape)
    ones = (1,) * len(rows)
    row = hash_of_row(row, [seed.reshape(seed.shape + ones) for seed in seeds(words)])
    column = jax.lax.iota(jnp.uint32, width).reshape((1,) * row.ndim + (-1,))
    return kept(row[..., None], column, rate)


def seeds(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two hashes [...] of a key's words [..., n]."""
    first, second = jnp.uint32(0), jnp.uint32(_STRIDE)
    for i in range(words.shape[-1]):
        first, second = _mix(first ^ words[..., i]), _mix(second ^ words[..., i])
    return first, second


def hash_of_row(row: jax.Array, seeds: Sequence[jax.Array]) -> jax.Array:
    """Mixes a key's `seeds` with the number of a row of elements, uint32."""
    for seed in seeds:
        row = _mix(row ^ seed)
    return row


def kept(hash_of_row: jax.Array, column: jax.Array, rate: float) -> jax.Array:
    """Returns whether dropout keeps an element of a row; both uint32.

    The last shift of the round is left out, since it changes no high bits.
    """
    bits = _round(hash_of_row ^ (column * _STRIDE))
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _round(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * _FIRST
    return (x ^ (x >> 15)) * _SECOND


def _mix(x: jax.Array) -> jax.Array:
    x = _round(x)
    return x ^ (x >> 16)
