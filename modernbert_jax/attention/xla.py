"""Plain XLA, any backend, memory linear in L: bands for local layers, chunks for global ones."""

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds

_DENSE_LENGTH = 1024  # below this the whole [L, M] of a head is small enough to keep
_CHUNK = 512  # queries a chunk of the global path


def attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v with float32 accumulation; a query with no key gives 0."""
    length = q_BLHK.shape[1]
    if bounds.window is not None and length > 3 * _band(bounds.window):
        return _banded(q_BLHK, k_BMHK, v_BMHK, bounds, scale)
    if length <= _DENSE_LENGTH:
        return _dense(q_BLHK, k_BMHK, v_BMHK, bounds.lo_BL, bounds.hi_BL, 0, scale)
    return _chunked(q_BLHK, k_BMHK, v_BMHK, bounds, scale)


def _band(window: int) -> int:
    return max(window, 16)


def _dense(q_BLHK, k_BMHK, v_BMHK, lo_BL, hi_BL, first_key, scale):
    """Every query against every key given; `first_key` (scalar or [B]) is the index of key 0."""
    precision = jax.lax.Precision.HIGHEST if q_BLHK.dtype == jnp.float32 else None
    f32 = jnp.float32
    scores_BHLM = jnp.einsum(
        "BLHK,BMHK->BHLM", q_BLHK, k_BMHK, precision=precision, preferred_element_type=f32
    )
    j_BM = jnp.arange(k_BMHK.shape[1])[None, :] + jnp.reshape(first_key, (-1, 1))
    mask_BLM = (lo_BL[..., None] <= j_BM[:, None]) & (j_BM[:, None] < hi_BL[..., None])
    # A finite floor keeps rows without a key free of NaN, forward and backward.
    scores_BHLM = jnp.where(mask_BLM[:, None], scores_BHLM * scale, jnp.finfo(f32).min / 2)
    top_BHL1 = jax.lax.stop_gradient(jnp.max(scores_BHLM, axis=-1, keepdims=True))
    p_BHLM = jnp.where(mask_BLM[:, None], jnp.exp(scores_BHLM - top_BHL1), 0.0)
    sum_BHL = jnp.sum(p_BHLM, axis=-1)
    out_BLHK = jnp.einsum(
        "BHLM,BMHK->BLHK",
        p_BHLM.astype(v_BMHK.dtype),
        v_BMHK,
        precision=precision,
        preferred_element_type=f32,
    )
    sum_BLH1 = jnp.swapaxes(sum_BHL, 1, 2)[..., None]
    return (out_BLHK / jnp.where(sum_BLH1 == 0, 1.0, sum_BLH1)).astype(q_BLHK.dtype)


def _banded(q_BLHK, k_BMHK, v_BMHK, bounds, scale):
    """Blocks of one window: a block of queries meets its own block of keys and both neighbours."""
    B, L, H, K = q_BLHK.shape
    block = _band(bounds.window)
    n = -(-L // block)
    tail = n * block - L
    pad4 = lambda x: jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0)))  # noqa: E731
    q = pad4(q_BLHK).reshape(B * n, block, H, K)

    def neighbours(x_BMHK):
        x = pad4(x_BMHK).reshape(B, n, block, H, K)
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return x.reshape(B * n, 3 * block, H, K)

    edges = lambda x: jnp.pad(x, ((0, 0), (0, tail))).reshape(B * n, block)  # noqa: E731
    first_key = jnp.tile((jnp.arange(n) - 1) * block, B)
    out = _dense(
        q,
        neighbours(k_BMHK),
        neighbours(v_BMHK),
        edges(bounds.lo_BL),
        edges(bounds.hi_BL),
        first_key,
        scale,
    )
    return out.reshape(B, n * block, H, K)[:, :L]


def _chunked(q_BLHK, k_BMHK, v_BMHK, bounds, scale):
    """One chunk of queries at a time against all keys; the backward pass recomputes its scores."""
    B, L, H, K = q_BLHK.shape
    n = -(-L // _CHUNK)
    tail = n * _CHUNK - L
    q = jnp.pad(q_BLHK, ((0, 0), (0, tail), (0, 0), (0, 0))).reshape(B, n, _CHUNK, H, K)
    edges = lambda x: jnp.pad(x, ((0, 0), (0, tail))).reshape(B, n, _CHUNK)  # noqa: E731
    chunks = (q, edges(bounds.lo_BL), edges(bounds.hi_BL))

    @jax.checkpoint
    def one(chunk):
        q_chunk, lo, hi = chunk
        return _dense(q_chunk, k_BMHK, v_BMHK, lo, hi, 0, scale)

    out = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks))
    return jnp.moveaxis(out, 0, 1).reshape(B, n * _CHUNK, H, K)[:, :L]
