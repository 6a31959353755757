"""Shared by the GPU kernels: padding to whole tiles, and which tiles each tile visits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds, tile_bounds
from modernbert_jax.attention.vjp import finite_or_zero

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# The start of a running maximum. It is finite so that rows without keys never compute inf - inf.
FLOOR = -1e30


@dataclasses.dataclass(frozen=True)
class Tiled:
    """Bounds padded to whole tiles, for kernels that own `rows` positions and stream `columns`.

    lo_BL, hi_BL: the bounds; padding sees nothing. ranges_BT4: for each row tile the column tiles
    [first, first whole, end of whole, end). Every row of the row tile sees all of a whole tile,
    which therefore needs no mask; the other tiles are masked element by element.
    """

    lo_BL: jax.Array
    hi_BL: jax.Array
    ranges_BT4: jax.Array


def check_scale(scale: float) -> None:
    """Raises ValueError unless scale > 0: the kernels take the maximum before scaling."""
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")


def padded_length(length: int, *tiles: int) -> int:
    """Rounds the length up to a multiple of every tile size."""
    step = math.lcm(*tiles)
    return -(-length // step) * step


def pad_length(x_BL: jax.Array, length: int) -> jax.Array:
    """Pads axis 1 with zeros to `length`."""
    tail = length - x_BL.shape[1]
    return jnp.pad(x_BL, ((0, 0), (0, tail)) + ((0, 0),) * (x_BL.ndim - 2)) if tail else x_BL


def tiled(bounds: Bounds, length: int, rows: int, columns: int) -> Tiled:
    """Finds the tiles to visit: rows are queries and columns keys or, by symmetry, the reverse."""
    lo_BL, hi_BL = pad_length(bounds.lo_BL, length), pad_length(bounds.hi_BL, length)
    first_BT, end_BT = tile_bounds(bounds, rows, columns, length // rows)
    # A row that sees nothing excludes whole tiles.
    some_BL = lo_BL < hi_BL
    latest_BT = jnp.max(jnp.where(some_BL, lo_BL, length).reshape(-1, length // rows, rows), -1)
    earliest_BT = jnp.min(jnp.where(some_BL, hi_BL, 0).reshape(-1, length // rows, rows), -1)
    whole_BT = jnp.clip(-(-latest_BT // columns), first_BT, end_BT)
    whole_end_BT = jnp.clip(earliest_BT // columns, whole_BT, end_BT)
    ranges_BT4 = jnp.stack([first_BT, whole_BT, whole_end_BT, end_BT], axis=-1)
    return Tiled(lo_BL, hi_BL, ranges_BT4.astype(jnp.int32))


def is_narrow(window: int | None) -> bool:
    """Whether the window is so narrow that wide tiles waste work and few tiles are whole."""
    return window is not None and window <= 128


def visit(ranges: Any, window: int | None, step: Callable[..., Any], carry: Any) -> Any:
    """Loops step(column, carry, masked) over the column tiles that one row tile visits.

    `ranges` are the four scalars of `Tiled.ranges_BT4`. Whole tiles have their own loop without a
    mask; a narrow window has hardly any whole tiles and uses one loop.
    """
    first, whole, whole_end, end = ranges
    masked, unmasked = (functools.partial(step, masked=m) for m in (True, False))
    if is_narrow(window):
        return jax.lax.fori_loop(first, end, masked, carry)
    carry = jax.lax.fori_loop(first, whole, masked, carry)
    carry = jax.lax.fori_loop(whole, whole_end, unmasked, carry)
    return jax.lax.fori_loop(whole_end, end, masked, carry)


def softmax_residuals(
    out_BLHK: jax.Array, d_out_BLHK: jax.Array, lse_BHL: jax.Array, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (d_out, lse in base 2, delta) for the backward kernels, padded to `length`.

    lse and delta are float32 [B, H, length]; delta is sum_K(out * d_out), as in FlashAttention-2
    (arXiv:2307.08691, algorithm 2). The lse of a query without keys is -inf; it becomes 0, so that
    no value in a kernel is infinite. d_out and lse are those of vjp.finite_or_zero.
    """
    f32 = jnp.float32
    delta_BHL = jnp.einsum("BLHK,BLHK->BHL", out_BLHK.astype(f32), d_out_BLHK.astype(f32))
    lse_BHL = jnp.where(jnp.isneginf(lse_BHL), 0.0, lse_BHL * LOG2E)
    d_out_BLHK, lse_BHL = finite_or_zero(d_out_BLHK, lse_BHL, delta_BHL)
    tail = ((0, 0), (0, 0), (0, length - lse_BHL.shape[2]))
    return pad_length(d_out_BLHK, length), jnp.pad(lse_BHL, tail), jnp.pad(delta_BHL, tail)
