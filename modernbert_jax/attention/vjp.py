"""The custom VJP that all kernels share."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.rope import Rope

# What a policy of jax.checkpoint calls the two results of the forward kernel.
OUT, LSE = "attention_out", "attention_lse"


# (q, k, v, bounds, scale) -> (out_BLHK in q's dtype, lse_BHL float32, -inf without keys). A kernel
# that rotates q and k takes the tables as one more argument, as does its backward.
Forward = Callable[..., tuple[jax.Array, jax.Array]]
# (q, k, v, out, lse, bounds, d_out, scale) -> (dq, dk, dv) in the dtypes of q, k, v.
Backward = Callable[..., tuple[Any, Any, Any]]


class Attention(Protocol):
    """One implementation of attention: returns out_BLHK in q's dtype."""

    def __call__(
        self,
        q_BLHK: Any,
        k_BMHK: Any,
        v_BMHK: Any,
        bounds: Bounds,
        *,
        scale: float,
        rope: Rope | None = None,
    ) -> jax.Array: ...


def only_where_seen(k_BMHK: Any, v_BMHK: Any) -> tuple[Any, Any]:
    """Returns k and v with every value of v that is not finite moved to k, as NaN, and 0 in v.

    A product of tiles multiplies v of a key with the probability 0 of the queries that do not see
    it, and 0 x NaN is NaN: one segment's NaN would reach the others in its tile. As NaN in k it
    makes the scores NaN, which the mask removes for exactly these queries. (A NaN in q or k itself
    reaches only gradients of other segments, dq and dk.)
    """
    finite = jnp.isfinite(v_BMHK)
    return jnp.where(finite, k_BMHK, jnp.nan), jnp.where(finite, v_BMHK, 0)


def finite_or_zero(d_out_BLHK: Any, lse: Any, delta: Any) -> tuple[Any, Any]:
    """Returns d_out with 0 for what is not finite, and lse with NaN for those queries instead.

    The same for the backward pass; delta = sum(out * d_out), in the axes of lse, shows where. A
    kernel must mask both p and ds, which an lse of NaN turns to NaN.
    """
    d_out = jnp.where(jnp.isfinite(d_out_BLHK), d_out_BLHK, 0)
    return d_out, jnp.where(jnp.isfinite(delta), lse, jnp.nan)


def with_vjp(forward: Forward, backward: Backward) -> Attention:
    """Builds attention(q, k, v, bounds, *, scale, rope) from a forward and a backward kernel.

    The residuals are q, k, v, out, the log-sum-exp, the bounds and the tables of RoPE, which get no
    gradient. A policy of jax.checkpoint that saves the names "attention_out" and "attention_lse"
    does not run the forward kernel again.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def run(q, k, v, bounds, rope, scale):
        return forward(q, k, v, bounds, scale, *rope)[0]

    def save(q, k, v, bounds, rope, scale):
        out, lse = forward(q, k, v, bounds, scale, *rope)
        # Saved as [B, L, H * K], because arrays whose last axis is K fill half of a TPU's lanes.
        out_BLP = checkpoint_name(out.reshape(*out.shape[:2], -1), OUT)
        out, lse = out_BLP.reshape(out.shape), checkpoint_name(lse, LSE)
        return out, (q, k, v, out, lse, bounds, rope)

    def pull(scale, saved, d_out):
        q, k, v, out, lse, bounds, rope = saved
        return (*backward(q, k, v, out, lse, bounds, d_out, scale, *rope), None, None)

    run.defvjp(save, pull)

    def attention(
        q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, *, scale: float, rope: Rope | None = None
    ) -> Any:
        return run(q_BLHK, k_BMHK, v_BMHK, bounds, () if rope is None else (rope,), scale)

    return attention
