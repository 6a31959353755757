"""The reference: an explicit mask and a softmax in float32, with O(L*M) memory."""

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.vjp import only_where_seen
from modernbert_jax.dropout import Key, dropout


def attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Key | None = None,
) -> jax.Array:
    """Computes softmax(scale * q k^T + mask) v; the output of a query without keys is 0.

    The only implementation with dropout of the probabilities (Hugging Face's attention_dropout).
    """
    k_BMHK, v_BMHK = only_where_seen(k_BMHK, v_BMHK)
    p_BHLM = probabilities(q_BLHK, k_BMHK, bounds, scale=scale)
    p_BHLM = dropout(p_BHLM, dropout_rate, dropout_key)
    v_BMHK = v_BMHK.astype(p_BHLM.dtype)
    out = jnp.einsum("BHLM,BMHK->BLHK", p_BHLM, v_BMHK, precision=jax.lax.Precision.HIGHEST)
    return out.astype(q_BLHK.dtype)


def probabilities(
    q_BLHK: jax.Array, k_BMHK: jax.Array, bounds: Bounds, *, scale: float
) -> jax.Array:
    """Returns softmax(scale * q k^T + mask), p_BHLM, in float32 or float64; 0 without keys."""
    mask_B1LM = bounds.as_mask(k_BMHK.shape[1])[:, None]
    q, k = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BLHK, k_BMHK))
    highest = jax.lax.Precision.HIGHEST
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q, k, precision=highest) * scale
    # A finite lower bound prevents NaN in rows without keys, forward and backward.
    floor = jnp.finfo(scores_BHLM.dtype).min / 2
    scores_BHLM = jnp.where(mask_B1LM, scores_BHLM, floor)
    top_BHL1 = jax.lax.stop_gradient(jnp.max(scores_BHLM, axis=-1, keepdims=True))
    p_BHLM = jnp.where(mask_B1LM, jnp.exp(scores_BHLM - top_BHL1), 0.0)
    sum_BHL1 = jnp.sum(p_BHLM, axis=-1, keepdims=True)
    return p_BHLM / jnp.where(sum_BHL1 == 0, 1.0, sum_BHL1)
