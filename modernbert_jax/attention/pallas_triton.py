"""Bounded attention for sm80 to sm90 (A100, L4, RTX 30 and 40, H100) through Pallas' Triton
lowering.

There are three kernels. Each owns one tile and loops from the first to the last tile within the
bounds; the loads are inside the loop, so tiles out of bounds are neither fetched nor computed. The
algorithm is FlashAttention-2 (arXiv:2307.08691) without the parallel split of a row.

JAX deprecates this lowering from 0.11 on and warns when it lowers; only `_triton` depends on that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.gpu_tiles import (
    FLOOR,
    LN2,
    LOG2E,
    check_scale,
    is_narrow,
    pad_length,
    padded_length,
    softmax_residuals,
    tiled,
    visit,
)
from modernbert_jax.attention.vjp import Attention, only_where_seen, with_vjp

HEAD_DIMS = (32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Positions that a kernel owns (`rows`) and streams per step (`columns`); Triton's options."""

    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 2


def supports(q_BLHK: jax.Array, bounds: Bounds, device: Any) -> str | None:
    """Returns None if `attention` supports this device and shape, else the reason in one line."""
    del bounds  # any interval is supported
    if (reason := _triton()[1]) is not None:
        return reason
    if device.platform not in ("gpu", "cuda"):
        return f"pallas_triton: expected an NVIDIA GPU, got {device.platform}"
    capability = getattr(device, "compute_capability", "unknown")
    if capability not in ("8.0", "8.6", "8.7", "8.9", "9.0"):
        return f"pallas_triton: expected compute capability 8.0 to 9.0, got {capability}"
    if q_BLHK.dtype.name not in DTYPES:
        return f"pallas_triton: expected {', '.join(DTYPES)}, got {q_BLHK.dtype.name}"
    if q_BLHK.shape[-1] not in HEAD_DIMS:
        return f"pallas_triton: expected a head dim of 32, 64 or 128, got {q_BLHK.shape[-1]}"
    return None


def forward_tiles(window: int | None, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """Returns the forward kernel's tiles; a narrow window uses few keys of a wide tile."""
    if dtype == jnp.float32:
        return Tiles(32, 32)
    if is_narrow(window):
        return Tiles(64, 64 if head_dim <= 64 else 32)
    if head_dim == 128:
        return Tiles(128, 32, num_warps=8, num_stages=3)
    return Tiles(128, 64, num_stages=3)


def backward_tiles(window: int | None, head_dim: int, dtype: jnp.dtype) -> Tiles:
    """Returns the tiles of the dq and dk/dv kernels, with two or three operands of each size."""
    if dtype == jnp.float32:
        return Tiles(32, 32)
    if head_dim == 128:
        return Tiles(64, 32, num_warps=8)
    if is_narrow(window):
        return Tiles(64, 32)
    return Tiles(128, 32, num_warps=8)


def forward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BLHK in q's dtype, lse_BHL in float32, -inf without keys)."""
    check_scale(scale)
    B, L, H, K = q_BLHK.shape
    tiles = forward_tiles(bounds.window, K, q_BLHK.dtype)
    length = padded_length(L, tiles.rows, tiles.columns)
    mask = tiled(bounds, length, tiles.rows, tiles.columns)
    arrays = (q_BLHK, *only_where_seen(k_BMHK, v_BMHK))
    q, k, v = (pad_length(x, length) for x in arrays)
    spec = _Specs(tiles.rows, length, K)
    out, lse = _call(
        functools.partial(_forward_kernel, tiles=tiles, window=bounds.window, scale=scale),
        grid=(length // tiles.rows, H, B),
        in_specs=[spec.ranges, spec.edge, spec.edge, spec.row, spec.whole, spec.whole],
        out_specs=[spec.row, spec.scalar],
        out_shape=[_like(q), jax.ShapeDtypeStruct((B, H, length), jnp.float32)],
        tiles=tiles,
        name="attention_forward",
        interpret=interpret,
    )(mask.ranges_BT4, mask.lo_BL, mask.hi_BL, q, k, v)
    return out[:, :L], lse[:, :, :L]


def backward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    out_BLHK: jax.Array,
    lse_BHL: jax.Array,
    bounds: Bounds,
    d_out_BLHK: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq, dk, dv): one kernel loops over tiles of queries, one over tiles of keys."""
    B, L, H, K = q_BLHK.shape
    tiles = backward_tiles(bounds.window, K, q_BLHK.dtype)
    length = padded_length(L, tiles.rows, tiles.columns)
    mask = tiled(bounds, length, tiles.rows, tiles.columns)
    d_out, lse, delta = softmax_residuals(out_BLHK, d_out_BLHK, lse_BHL, length)
    q, k, v = (pad_length(x, length) for x in (q_BLHK, k_BMHK, v_BMHK))
    spec = _Specs(tiles.rows, length, K)
    options = dict(tiles=tiles, window=bounds.window, scale=scale)
    call = functools.partial(
        _call, grid=(length // tiles.rows, H, B), tiles=tiles, interpret=interpret
    )
    dq = call(
        functools.partial(_dq_kernel, **options),
        in_specs=[spec.ranges, spec.edge, spec.edge, spec.row, spec.row]
        + [spec.scalar, spec.scalar, spec.whole, spec.whole],
        out_specs=spec.row,
        out_shape=_like(q),
        name="attention_dq",
    )(mask.ranges_BT4, mask.lo_BL, mask.hi_BL, q, d_out, lse, delta, k, v)
    dk, dv = call(
        functools.partial(_dkv_kernel, **options),
        in_specs=[spec.ranges, spec.edge, spec.edge, spec.row, spec.row]
        + [spec.whole, spec.whole, spec.whole_scalar, spec.whole_scalar],
        out_specs=[spec.row, spec.row],
        out_shape=[_like(k), _like(v)],
        name="attention_dkv",
    )(mask.ranges_BT4, mask.lo_BL, mask.hi_BL, k, v, q, d_out, lse, delta)
    return dq[:, :L], dk[:, :L], dv[:, :L]


attention: Attention = with_vjp(forward, backward)


def _forward_kernel(
    ranges_ref, lo_ref, hi_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tiles, window, scale
):
    q_RK = q_ref[...]
    rows, head_dim = q_RK.shape

    def step(column, carry, masked):
        acc_RK, top_R, sum_R = carry
        here = pl.ds(column * tiles.columns, tiles.columns)
        s_RC = _dot(q_RK, k_ref[here, :].T)
        if masked:
            s_RC = jnp.where(_mask(lo_ref, hi_ref, column, tiles), s_RC, -jnp.inf)
        # The maximum is kept scaled and in base 2, for exp2 of one multiply-add an element.
        new_R = jnp.maximum(top_R, jnp.max(s_RC, axis=1) * (scale * LOG2E))
        shrink_R = jnp.exp2(top_R - new_R)
        p_RC = jnp.exp2(s_RC * (scale * LOG2E) - new_R[:, None])
        v_CK = v_ref[here, :]
        acc_RK = acc_RK * shrink_R[:, None] + _dot(p_RC.astype(v_CK.dtype), v_CK)
        return acc_RK, new_R, sum_R * shrink_R + jnp.sum(p_RC, axis=1)

    start = (
        jnp.zeros((rows, head_dim), jnp.float32),
        jnp.full((rows,), FLOOR, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    acc_RK, top_R, sum_R = visit(_ranges(ranges_ref), window, step, start)
    some_R = sum_R != 0  # NaN is some, too
    sum_R = jnp.where(some_R, sum_R, 1.0)
    out_ref[...] = (acc_RK / sum_R[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some_R, top_R * LN2 + jnp.log(sum_R), -jnp.inf)


def _dq_kernel(
    ranges_ref,
    lo_ref,
    hi_ref,
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    dq_ref,
    *,
    tiles,
    window,
    scale,
):
    q_RK, d_out_RK = q_ref[...], d_out_ref[...]
    lse_R, delta_R = lse_ref[...], delta_ref[...]

    def step(column, dq_RK, masked):
        here = pl.ds(column * tiles.columns, tiles.columns)
        k_CK = k_ref[here, :]
        p_RC = jnp.exp2(_dot(q_RK, k_CK.T) * (scale * LOG2E) - lse_R[:, None])
        ds_RC = p_RC * (_dot(d_out_RK, v_ref[here, :].T) - delta_R[:, None])
        if masked:
            ds_RC = jnp.where(_mask(lo_ref, hi_ref, column, tiles), ds_RC, 0.0)
        return dq_RK + _dot(ds_RC.astype(k_CK.dtype), k_CK)

    dq_RK = visit(_ranges(ranges_ref), window, step, jnp.zeros(q_RK.shape, jnp.float32))
    dq_ref[...] = (dq_RK * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    ranges_ref,
    lo_ref,
    hi_ref,
    k_ref,
    v_ref,
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    tiles,
    window,
    scale,
):
    # Rows are keys here and columns queries; the bounds of a key are the queries that see it.
    k_RK, v_RK = k_ref[...], v_ref[...]

    def step(column, carry, masked):
        dk_RK, dv_RK = carry
        here = pl.ds(column * tiles.columns, tiles.columns)
        q_CK, d_out_CK = q_ref[here, :], d_out_ref[here, :]
        p_RC = jnp.exp2(_dot(k_RK, q_CK.T) * (scale * LOG2E) - lse_ref[here][None, :])
        ds_RC = p_RC * (_dot(v_RK, d_out_CK.T) - delta_ref[here][None, :])
        if masked:
            seen_RC = _mask(lo_ref, hi_ref, column, tiles)
            p_RC, ds_RC = jnp.where(seen_RC, p_RC, 0.0), jnp.where(seen_RC, ds_RC, 0.0)
        dv_RK += _dot(p_RC.astype(d_out_CK.dtype), d_out_CK)
        return dk_RK + _dot(ds_RC.astype(q_CK.dtype), q_CK), dv_RK

    zeros = jnp.zeros(k_RK.shape, jnp.float32)
    dk_RK, dv_RK = visit(_ranges(ranges_ref), window, step, (zeros, zeros))
    dk_ref[...] = (dk_RK * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_RK.astype(dv_ref.dtype)


def _ranges(ranges_ref):
    return [ranges_ref[i] for i in range(4)]


def _mask(lo_ref, hi_ref, column, tiles):
    column_1C = (column * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32))[None, :]
    return (lo_ref[...][:, None] <= column_1C) & (column_1C < hi_ref[...][:, None])


def _dot(a, b):
    # Triton's default for float32 is TF32, which keeps 10 bits of the mantissa.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Specs:
    """Block specs for a grid of (row tile, head, batch row): the own tile, or the whole length."""

    def __init__(self, rows: int, length: int, head_dim: int):
        self.ranges = pl.BlockSpec((None, None, 4), lambda t, h, b: (b, t, 0))
        self.edge = pl.BlockSpec((None, rows), lambda t, h, b: (b, t))
        self.scalar = pl.BlockSpec((None, None, rows), lambda t, h, b: (b, h, t))
        self.row = pl.BlockSpec((None, rows, None, head_dim), lambda t, h, b: (b, t, h, 0))
        # On a GPU a block is an address, not a copy: only what the loop reads is fetched.
        self.whole = pl.BlockSpec((None, length, None, head_dim), lambda t, h, b: (b, 0, h, 0))
        self.whole_scalar = pl.BlockSpec((None, None, length), lambda t, h, b: (b, h, 0))


def _call(kernel, *, tiles: Tiles, interpret: bool, **arguments):
    triton, reason = _triton()
    if triton is None:
        raise NotImplementedError(reason)
    params = triton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **arguments)


def _triton():
    """Returns (JAX's Triton lowering, None) or (None, reason); jax 0.11 and 0.12 warn."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None, f"pallas_triton: jax {jax.__version__} no longer has the Triton lowering"
    return triton, None
