"""Plain XLA for any backend, with memory linear in L: bands for local layers, chunks for global.

Short rows are one dense block. Local layers meet blocks of one window with both neighbours. Global
layers go chunk by chunk with an online softmax over the chunks of keys that the bounds of the row
admit; the backward pass computes the scores again from the log-sum-exp. A CPU takes one chunk of
queries at a time; every other device takes several at once, because it waits for the start of each
small operation.
"""

import functools

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds, tile_bounds
from modernbert_jax.attention.vjp import (
    Attention,
    finite_or_zero,
    only_where_seen,
    with_vjp,
)
from modernbert_jax.precision import einsum

_DENSE_LENGTH = 512  # up to here all scores of a row are kept at once
_CHUNK_Q, _CHUNK_K = 256, 512  # queries and keys of one step of the global path
_SCORES = 2**25  # scores that a step of the global path computes at once, but on a CPU
_FLOOR = -1e30  # finite: a row without a key stays free of NaN


def forward(
    q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, bounds: Bounds, scale: float
) -> tuple[jax.Array, jax.Array]:
    """(out_BLHK, lse_BHL); see vjp.Forward."""
    k_BMHK, v_BMHK = only_where_seen(k_BMHK, v_BMHK)
    kind, block = _plan(q_BLHK, k_BMHK, bounds)
    if kind == "chunks":
        return _chunks_forward(q_BLHK, k_BMHK, v_BMHK, bounds, scale)
    q, k, v, mask = _blocks(kind, block, bounds, q_BLHK, k_BMHK, v_BMHK)
    out, lse = _dense_forward(q, k, v, mask, scale)
    B, L, H, _ = q_BLHK.shape
    lse_BHL = jnp.swapaxes(_join(jnp.swapaxes(lse, 1, 2)[..., None], B, L)[..., 0], 1, 2)
    return _join(out, B, L).astype(q_BLHK.dtype), lse_BHL


def backward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    out_BLHK: jax.Array,
    lse_BHL: jax.Array,
    bounds: Bounds,
    d_out_BLHK: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv); see vjp.Backward."""
    delta_BLH = jnp.sum(out_BLHK.astype(jnp.float32) * d_out_BLHK.astype(jnp.float32), axis=-1)
    lse_BHL = jnp.where(jnp.isneginf(lse_BHL), 0.0, lse_BHL)
    d_out_BLHK, lse_BHL = finite_or_zero(d_out_BLHK, lse_BHL, jnp.swapaxes(delta_BLH, 1, 2))
    kind, block = _plan(q_BLHK, k_BMHK, bounds)
    if kind == "chunks":
        return _chunks_backward(
            q_BLHK, k_BMHK, v_BMHK, lse_BHL, delta_BLH, bounds, d_out_BLHK, scale
        )
    B, L, M = *q_BLHK.shape[:2], k_BMHK.shape[1]
    q, k, v, mask = _blocks(kind, block, bounds, q_BLHK, k_BMHK, v_BMHK)
    per_query = jnp.stack([jnp.swapaxes(lse_BHL, 1, 2), delta_BLH], axis=-1)
    d_out, per_query = (_split(x, block) for x in (d_out_BLHK, per_query))
    lse, delta = (jnp.swapaxes(per_query[..., i], 1, 2) for i in (0, 1))
    dq, dk, dv = _dense_backward(q, k, v, mask, lse, delta, d_out, scale)
    if kind == "bands":
        dk, dv = (_fold_neighbors(x, B, block) for x in (dk, dv))
    dq, dk, dv = _join(dq, B, L), _join(dk, B, M), _join(dv, B, M)
    return dq.astype(q_BLHK.dtype), dk.astype(k_BMHK.dtype), dv.astype(v_BMHK.dtype)


attention: Attention = with_vjp(forward, backward)


def _plan(q_BLHK, k_BMHK, bounds: Bounds) -> tuple[str, int]:
    """Chooses ("dense", L), ("bands", block) or ("chunks", size) from static values."""
    length, keys = q_BLHK.shape[1], k_BMHK.shape[1]
    if bounds.window is not None and length == keys:
        block = max(bounds.window, 16)
        if length > 3 * block:
            return "bands", block
    return ("dense", length) if max(length, keys) <= _DENSE_LENGTH else ("chunks", _CHUNK_Q)


# One block of queries against one block of keys: [N, q, H, K], [N, m, H, K], mask [N, q, m].


def _dense_forward(q, k, v, mask, scale):
    """(out [N, q, H, K] float32, lse [N, H, q])."""
    s = jnp.where(mask[:, None], einsum("nqhd,nmhd->nhqm", q, k) * scale, _FLOOR)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1)
    some = jnp.any(mask, axis=-1)[:, None]
    out = einsum("nhqm,nmhd->nqhd", p.astype(v.dtype), v)
    share = jnp.where(some, 1.0 / total, 0.0)
    lse = jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
    return out * jnp.swapaxes(share, 1, 2)[..., None], lse


def _dense_backward(q, k, v, mask, lse, delta, d_out, scale):
    """Returns (dq, dk, dv) of one block in float32."""
    s = einsum("nqhd,nmhd->nhqm", q, k) * scale
    p = jnp.where(mask[:, None], jnp.exp(s - lse[..., None]), 0.0)
    dv = einsum("nhqm,nqhd->nmhd", p.astype(d_out.dtype), d_out)
    dp = einsum("nqhd,nmhd->nhqm", d_out, v)
    ds = jnp.where(mask[:, None], p * (dp - delta[..., None]) * scale, 0.0).astype(q.dtype)
    return einsum("nhqm,nmhd->nqhd", ds, k), einsum("nhqm,nqhd->nmhd", ds, q), dv


# Rows as blocks and back.


def _split(x_BL, block: int):
    """Reshapes [B, L, ...] to [B * blocks, block, ...], padded at the end."""
    B, L = x_BL.shape[:2]
    n = -(-L // block)
    x_BL = jnp.pad(x_BL, ((0, 0), (0, n * block - L), *((0, 0),) * (x_BL.ndim - 2)))
    return x_BL.reshape(B * n, block, *x_BL.shape[2:])


def _join(x, B: int, L: int):
    """The inverse of `_split`."""
    return x.reshape(B, -1, *x.shape[2:])[:, :L]


def _blocks(kind: str, block: int, bounds: Bounds, q_BLHK, k_BMHK, v_BMHK):
    """Returns (q, k, v, mask) in blocks: the whole row ("dense") or bands with their neighbors."""
    lo, hi = _split(bounds.lo_BL, block), _split(bounds.hi_BL, block)
    q, k, v = _split(q_BLHK, block), k_BMHK, v_BMHK
    # q.shape[0], not len(q): the batch may be a symbolic dimension of jax.export.
    first = jnp.zeros((q.shape[0],), jnp.int32)
    if kind == "bands":
        B, L = q_BLHK.shape[:2]
        n = -(-L // block)
        k, v = (_neighbors(_split(x, block), B) for x in (k, v))
        first = jnp.tile((jnp.arange(n, dtype=jnp.int32) - 1) * block, B)
    j = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :] + first[:, None, None]
    return q, k, v, (lo[..., None] <= j) & (j < hi[..., None])


def _neighbors(x, B: int):
    """Joins each block with the previous and the next one: [B * n, 3 * block, ...]."""
    x = x.reshape(B, -1, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (1, 1), *((0, 0),) * (x.ndim - 2)))
    x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
    return x.reshape(-1, *x.shape[2:])


def _fold_neighbors(x, B: int, block: int):
    """The transpose of `_neighbors`: adds the three contributions to each block."""
    x = x.reshape(B, -1, 3, block, *x.shape[2:])
    x = jnp.pad(x, ((0, 0), (1, 1), *((0, 0),) * (x.ndim - 2)))
    x = x[:, 2:, 0] + x[:, 1:-1, 1] + x[:, :-2, 2]
    return x.reshape(-1, *x.shape[2:])


# Long global rows: one chunk of queries after the other, each over its own chunks of keys.


def _pad_to(x_BL, multiple: int):
    tail = -x_BL.shape[1] % multiple
    return jnp.pad(x_BL, ((0, 0), (0, tail), *((0, 0),) * (x_BL.ndim - 2)))


def _slice(x_BL, row, start, size: int):
    """Returns x_BL[row, start : start + size] with a leading axis of size 1."""
    sizes = (1, size, *x_BL.shape[2:])
    return jax.lax.dynamic_slice(x_BL, (row, start, *(0,) * (x_BL.ndim - 2)), sizes)


def _each_chunk(body, B: int, length: int, heads: int):
    """Runs body(row, number) for every chunk of every row; joins results to [B, length, ...]."""
    n = -(-length // _CHUNK_Q)

    def run(group: int):
        """Runs `group` chunks at once; they loop until the last of them has seen all its keys."""
        steps = -(-B * n // group)
        item = jnp.minimum(jnp.arange(steps * group, dtype=jnp.int32), B * n - 1)
        body_of = lambda i: body(i // n, i % n)  # noqa: E731
        if group == 1:
            results = jax.lax.map(body_of, item)
        else:
            results = jax.lax.map(jax.vmap(body_of), item.reshape(steps, group))
            results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: B * n], results)
        return jax.tree.map(lambda x: _join(x[:, 0], B, length), results)

    return jax.lax.platform_dependent(
        cpu=lambda: run(1), default=lambda: run(_group_size(B, n, heads))
    )


def _group_size(B: int, n: int, heads: int) -> int:
    """Returns how many chunks run at once: neighbors, which have about as many keys to visit."""
    most = max(1, _SCORES // (heads * _CHUNK_Q * _CHUNK_K))
    if not isinstance(B, int):  # jax.export without a batch size: a divisor of each row's chunks
        return max(d for d in range(1, n + 1) if n % d == 0 and d <= most)
    return -(-B * n // -(-B * n // most))


def _mask(lo, hi, start):
    j = start + jnp.arange(_CHUNK_K, dtype=jnp.int32)[None, None, :]
    return (lo[..., None] <= j) & (j < hi[..., None])


def _chunks_forward(q_BLHK, k_BMHK, v_BMHK, bounds, scale):
    B, L, H, K = q_BLHK.shape
    first_BT, last_BT = tile_bounds(bounds, _CHUNK_Q, _CHUNK_K)
    q, lo, hi = (_pad_to(x, _CHUNK_Q) for x in (q_BLHK, bounds.lo_BL, bounds.hi_BL))
    k, v = (_pad_to(x, _CHUNK_K) for x in (k_BMHK, v_BMHK))

    def one(row, t):
        part = functools.partial(_slice, row=row, start=t * _CHUNK_Q, size=_CHUNK_Q)
        q_t, lo_t, hi_t = part(q), part(lo), part(hi)

        def visit(c, carry):
            out, top, total = carry
            start = c * _CHUNK_K
            k_c, v_c = (_slice(x, row, start, _CHUNK_K) for x in (k, v))
            s = einsum("nqhd,nmhd->nhqm", q_t, k_c) * scale
            s = jnp.where(_mask(lo_t, hi_t, start)[:, None], s, _FLOOR)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_top[..., None])
            fade = jnp.exp(top - new_top)
            total = total * fade + jnp.sum(p, axis=-1)
            more = einsum("nhqm,nmhd->nhqd", p.astype(v.dtype), v_c)
            return out * fade[..., None] + more, new_top, total

        # A floor above _FLOOR: a query that a chunk hides altogether adds exp(-inf) = 0 there.
        start = (
            jnp.zeros((1, H, _CHUNK_Q, K), jnp.float32),
            jnp.full((1, H, _CHUNK_Q), _FLOOR / 2, jnp.float32),
            jnp.zeros((1, H, _CHUNK_Q), jnp.float32),
        )
        out, top, total = jax.lax.fori_loop(first_BT[row, t], last_BT[row, t], visit, start)
        some = total != 0  # NaN is some, too
        out = jnp.where(some[..., None], out / jnp.where(some, total, 1.0)[..., None], 0.0)
        lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
        return jnp.swapaxes(out, 1, 2).astype(q_BLHK.dtype), jnp.swapaxes(lse, 1, 2)

    out_BLHK, lse_BLH = _each_chunk(one, B, L, H)
    return out_BLHK, jnp.swapaxes(lse_BLH, 1, 2)


def _chunks_backward(q_BLHK, k_BMHK, v_BMHK, lse_BHL, delta_BLH, bounds, d_out_BLHK, scale):
    """Computes dq in a loop over queries, and dk and dv in the same loop with swapped roles."""
    (B, L, H, K), M = q_BLHK.shape, k_BMHK.shape[1]
    of_keys = bounds.of_keys
    first_BT, last_BT = tile_bounds(bounds, _CHUNK_Q, _CHUNK_K)
    key_first_BT, key_last_BT = tile_bounds(of_keys, _CHUNK_Q, _CHUNK_K)
    lse_BLH = jnp.swapaxes(lse_BHL, 1, 2)
    arrays = (q_BLHK, k_BMHK, v_BMHK, d_out_BLHK, lse_BLH, delta_BLH, bounds.lo_BL, bounds.hi_BL)
    multiple = max(_CHUNK_Q, _CHUNK_K)
    q, k, v, d_out, lse, delta, lo, hi = (_pad_to(x, multiple) for x in arrays)
    key_lo, key_hi = (_pad_to(x, multiple) for x in (of_keys.lo_BL, of_keys.hi_BL))
    across = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731

    def queries(row, t):
        part = functools.partial(_slice, row=row, start=t * _CHUNK_Q, size=_CHUNK_Q)
        q_t, d_t, lo_t, hi_t = part(q), part(d_out), part(lo), part(hi)
        lse_t, delta_t = across(part(lse))[..., None], across(part(delta))[..., None]

        def visit(c, dq):
            start = c * _CHUNK_K
            k_c, v_c = (_slice(x, row, start, _CHUNK_K) for x in (k, v))
            s = einsum("nqhd,nmhd->nhqm", q_t, k_c) * scale
            ds = jnp.exp(s - lse_t) * (einsum("nqhd,nmhd->nhqm", d_t, v_c) - delta_t) * scale
            ds = jnp.where(_mask(lo_t, hi_t, start)[:, None], ds, 0.0)
            return dq + einsum("nhqm,nmhd->nhqd", ds.astype(q.dtype), k_c)

        zero = jnp.zeros((1, H, _CHUNK_Q, K), jnp.float32)
        dq = jax.lax.fori_loop(first_BT[row, t], last_BT[row, t], visit, zero)
        return across(dq).astype(q_BLHK.dtype)

    def keys(row, t):
        part = functools.partial(_slice, row=row, start=t * _CHUNK_Q, size=_CHUNK_Q)
        k_t, v_t, lo_t, hi_t = part(k), part(v), part(key_lo), part(key_hi)

        def visit(c, carry):
            dk, dv = carry
            start = c * _CHUNK_K
            q_c, d_c = (_slice(x, row, start, _CHUNK_K) for x in (q, d_out))
            lse_c, delta_c = (across(_slice(x, row, start, _CHUNK_K)) for x in (lse, delta))
            s = einsum("nmhd,nqhd->nhmq", k_t, q_c) * scale
            seen = _mask(lo_t, hi_t, start)[:, None]
            p = jnp.where(seen, jnp.exp(s - lse_c[:, :, None, :]), 0.0)
            dv = dv + einsum("nhmq,nqhd->nhmd", p.astype(d_out.dtype), d_c)
            dp = einsum("nmhd,nqhd->nhmq", v_t, d_c)
            ds = jnp.where(seen, p * (dp - delta_c[:, :, None, :]) * scale, 0.0)
            return dk + einsum("nhmq,nqhd->nhmd", ds.astype(q.dtype), q_c), dv

        zero = jnp.zeros((1, H, _CHUNK_Q, K), jnp.float32)
        first, last = key_first_BT[row, t], key_last_BT[row, t]
        dk, dv = jax.lax.fori_loop(first, last, visit, (zero, zero))
        return across(dk).astype(k_BMHK.dtype), across(dv).astype(v_BMHK.dtype)

    dq = _each_chunk(queries, B, L, H)
    dk, dv = _each_chunk(keys, B, M, H)
    return dq, dk, dv
