"""Masked cross-entropy over predicted positions, a chunk of logits at a time."""

import jax
import jax.numpy as jnp

IGNORE = -1  # the label of an unused position


def masked_cross_entropy(
    hidden_BPD: jax.Array,
    weight_VD: jax.Array,
    bias_V: jax.Array | None,
    labels_BP: jax.Array,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses in nats, number of right guesses) where labels are not IGNORE; float32.

    Sums, so that a mean is right across chunks, micro-batches and devices. At most [chunk, V]
    logits exist at a time; the backward pass computes them again from one log-sum-exp a position.
    """
    D, n = hidden_BPD.shape[-1], labels_BP.size
    chunk = min(chunk, n)
    tail = -n % chunk
    hidden = jnp.pad(hidden_BPD.reshape(n, D), ((0, tail), (0, 0))).reshape(-1, chunk, D)
    labels = jnp.pad(labels_BP.reshape(n), (0, tail), constant_values=IGNORE).reshape(-1, chunk)
    if bias_V is None:
        bias_V = jnp.zeros((weight_VD.shape[0],), jnp.float32)
    return _sums(hidden, weight_VD.astype(hidden.dtype), bias_V.astype(jnp.float32), labels)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _logits(hidden_CD, weight_VD, bias_V):
    return _einsum("CD,VD->CV", hidden_CD, weight_VD) + bias_V[None, :]


def _is_label(labels_C, size: int):
    return labels_C[:, None] == jnp.arange(size, dtype=labels_C.dtype)[None, :]


@jax.custom_vjp
def _sums(hidden, weight_VD, bias_V, labels):
    """(loss, right) of hidden [N, C, D] and labels [N, C], chunk after chunk."""
    return _sums_forward(hidden, weight_VD, bias_V, labels)[0]


def _sums_forward(hidden, weight_VD, bias_V, labels):
    def body(sums, part):
        hidden_CD, labels_C = part
        logits_CV = _logits(hidden_CD, weight_VD, bias_V)
        top_C = jnp.max(logits_CV, axis=-1)
        lse_C = top_C + jnp.log(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1))
        is_label_CV = _is_label(labels_C, logits_CV.shape[1])
        picked_C = jnp.sum(jnp.where(is_label_CV, logits_CV, 0.0), axis=-1)
        used_C = labels_C != IGNORE
        loss = jnp.sum(jnp.where(used_C, lse_C - picked_C, 0.0))
        right = jnp.sum(jnp.where(used_C & (picked_C == top_C), 1.0, 0.0))
        return (sums[0] + loss, sums[1] + right), lse_C

    zero = jnp.zeros((), jnp.float32)
    sums, lse = jax.lax.scan(body, (zero, zero), (hidden, labels))
    return sums, (hidden, weight_VD, bias_V, labels, lse)


def _sums_backward(saved, d_sums):
    hidden, weight_VD, bias_V, labels, lse = saved
    d_loss = d_sums[0]  # the count of right guesses has no slope

    def body(carry, part):
        d_weight_VD, d_bias_V = carry
        hidden_CD, labels_C, lse_C = part
        p_CV = jnp.exp(_logits(hidden_CD, weight_VD, bias_V) - lse_C[:, None])
        scale_C1 = jnp.where(labels_C != IGNORE, d_loss, 0.0)[:, None]
        d_logits_CV = (p_CV - _is_label(labels_C, p_CV.shape[1])) * scale_C1
        d_bias_V = d_bias_V + jnp.sum(d_logits_CV, axis=0)
        d_logits_CV = d_logits_CV.astype(hidden.dtype)
        d_weight_VD = d_weight_VD + _einsum("CV,CD->VD", d_logits_CV, hidden_CD)
        d_hidden_CD = _einsum("CV,VD->CD", d_logits_CV, weight_VD)
        return (d_weight_VD, d_bias_V), d_hidden_CD.astype(hidden.dtype)

    zeros = (jnp.zeros(weight_VD.shape, jnp.float32), jnp.zeros(bias_V.shape, jnp.float32))
    (d_weight, d_bias), d_hidden = jax.lax.scan(body, zeros, (hidden, labels, lse))
    return d_hidden, d_weight.astype(weight_VD.dtype), d_bias, None


_sums.defvjp(_sums_forward, _sums_backward)
