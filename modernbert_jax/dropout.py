"""Dropout whose bits are a hash of a key and of the element's position.

jax.random's bits cost a TPU more than three times as much as the product that they follow, since
threefry runs twenty rounds per element. A hash of two multiplications is fused into that product,
takes no memory, and gives the same bits on every mesh, with or without scan and rematerialization.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The multipliers of the 32-bit mixer "lowbias32" (https://github.com/skeeto/hash-prospector), found
# by search for the least bias of its avalanche, and an odd number close to 2^32 / golden ratio.
_FIRST, _SECOND, _STRIDE = (np.uint32(n) for n in (0x7FEB352D, 0x846CA68B, 0x9E3779B9))


class PartKeys(NamedTuple):
    """Keys [B] for a part of longer sequences, [B, L/n, ...]; first: the index of its first token.

    They give the part's elements the bits that the keys give them in the complete sequences.
    """

    keys: jax.Array
    first: jax.Array


Key = jax.Array | PartKeys


def dropout(x: jax.Array, rate: float, key: Key | None) -> jax.Array:
    """Inverted dropout; the identity if `key` is None or the rate is 0.

    key: a jax.random key, one for each index of the first axis of x, or PartKeys.
    """
    if key is None or not rate:
        return x
    if isinstance(key, PartKeys):
        return _drop(rate, x, jax.random.key_data(key.keys), key.first)
    return _drop(rate, x, jax.random.key_data(key), None)


def fold(key: Key | None, number: int | jax.Array) -> Key | None:
    """Derives the key (or keys) of one use of dropout; None (no dropout) stays None."""
    if isinstance(key, PartKeys):
        return PartKeys(fold(key.keys, number), key.first)  # type: ignore[arg-type]
    if key is None or not key.ndim:
        return None if key is None else jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, number)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(rate: float, x: jax.Array, words: jax.Array, first: jax.Array | None) -> jax.Array:
    keep = _keep(words, rate, x.shape, first)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


# The backward pass computes the bits again: saving them would take a byte per element.
_drop.defvjp(
    lambda rate, x, words, first: (_drop(rate, x, words, first), (words, first)),
    lambda rate, saved, d: (_drop(rate, d, *saved), None, None),
)


def _keep(
    words: jax.Array, rate: float, shape: tuple[int, ...], first: jax.Array | None
) -> jax.Array:
    """Returns which elements of an array of this shape are kept.

    words: a key's words [n], or [B, n]. first: added to the index along the first axis after B. The
    index over all axes but the last is hashed with them, which costs little; each element then
    needs only one round (`kept`).
    """
    leading = words.ndim - 1
    *rows, width = shape[leading:]
    row = jnp.zeros(tuple(rows), jnp.uint32)
    for axis, size in enumerate(rows):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, tuple(rows), axis)
        if first is not None and axis == 0:
            row = row + first.astype(jnp.uint32)
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
