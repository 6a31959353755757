"""Masked cross-entropy over predicted positions, a chunk of logits at a time."""

import jax
import jax.numpy as jnp

from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.precision import matmul_precision


@jax.named_scope("loss")  # `plan` counts its time apart
def masked_cross_entropy(
    hidden_BPD: jax.Array,
    weight_VD: jax.Array,
    bias_V: jax.Array | None,
    labels_BP: jax.Array,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of losses in nats, correct predictions), float32.

    hidden_BPD: states at predicted positions. weight_VD, bias_V: of the decoder. labels_BP: token
    ids, IGNORE_INDEX at unused positions. Sums rather than means, so that a mean over chunks,
    micro-batches and devices is exact. The logits of `chunk` positions exist at a time, of all
    sequences together, since a TPU computes in multiples of 128. The backward pass computes them
    again from one log-sum-exp per position.
    """
    B, P, D = hidden_BPD.shape
    width = min(chunk, B * P)
    tail = (0, -(B * P) % width)
    hidden = jnp.pad(hidden_BPD.reshape(B * P, D), (tail, (0, 0))).reshape(-1, width, D)
    labels = jnp.pad(labels_BP.reshape(B * P), tail, constant_values=IGNORE_INDEX)
    if bias_V is None:
        bias_V = jnp.zeros((weight_VD.shape[0],), jnp.float32)
    return _sums(hidden, weight_VD, bias_V.astype(jnp.float32), labels.reshape(-1, width))


@jax.custom_vjp
def _sums(hidden, weight_VD, bias_V, labels):
    """Returns (loss, correct) of hidden [N, C, D] and labels [N, C], chunk by chunk."""
    return _forward(hidden, weight_VD, bias_V, labels)[0]


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = matmul_precision(x.dtype)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _logits(hidden_CD, weight_VD, bias_V):
    return _einsum("CD,VD->CV", hidden_CD, weight_VD) + bias_V[None, :]


def _is_label(labels_C, size: int):
    return labels_C[:, None] == jnp.arange(size, dtype=labels_C.dtype)[None, :]


def _forward(hidden, weight_VD, bias_V, labels):
    weight = weight_VD.astype(hidden.dtype)

    def again(_, hidden_CD, top_C):
        """On an accelerator it costs less to multiply twice than to write and read the logits."""
        hidden_CD, _ = jax.lax.optimization_barrier((hidden_CD, top_C))
        return _logits(hidden_CD, weight, bias_V)

    def body(sums, part):
        hidden_CD, labels_C = part
        logits_CV = _logits(hidden_CD, weight, bias_V)
        top_C = jnp.max(logits_CV, axis=-1)
        is_label_CV = _is_label(labels_C, logits_CV.shape[-1])
        picked_C = jnp.sum(jnp.where(is_label_CV, logits_CV, 0.0), axis=-1)
        logits_CV = jax.lax.platform_dependent(
            *(logits_CV, hidden_CD, top_C), cpu=lambda logits_CV, *_: logits_CV, default=again
        )
        lse_C = top_C + jnp.log(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1))
        used_C = labels_C != IGNORE_INDEX
        loss = jnp.sum(jnp.where(used_C, lse_C - picked_C, 0.0))
        correct = jnp.sum(jnp.where(used_C & (picked_C == top_C), 1.0, 0.0))
        return (sums[0] + loss, sums[1] + correct), lse_C

    zero = jnp.zeros((), jnp.float32)
    sums, lse = jax.lax.scan(body, (zero, zero), (hidden, labels))
    return sums, (hidden, weight_VD, bias_V, labels, lse)


def _backward(saved, d_sums):
    hidden, weight_VD, bias_V, labels, lse = saved
    weight = weight_VD.astype(hidden.dtype)
    d_loss = d_sums[0]  # the number of correct predictions has no gradient

    def body(carry, part):
        d_weight_VD, d_bias_V = carry
        hidden_CD, labels_C, lse_C = part
        p_CV = jnp.exp(_logits(hidden_CD, weight, bias_V) - lse_C[:, None])
        scale_C1 = jnp.where(labels_C != IGNORE_INDEX, d_loss, 0.0)[:, None]
        d_logits_CV = (p_CV - _is_label(labels_C, p_CV.shape[-1])) * scale_C1
        d_bias_V = d_bias_V + jnp.sum(d_logits_CV, axis=0)
        d_logits_CV = d_logits_CV.astype(hidden.dtype)
        d_weight_VD = d_weight_VD + _einsum("CV,CD->VD", d_logits_CV, hidden_CD)
        d_hidden_CD = _einsum("CV,VD->CD", d_logits_CV, weight)
        return (d_weight_VD, d_bias_V), d_hidden_CD.astype(hidden.dtype)

    zeros = (jnp.zeros(weight.shape, jnp.float32), jnp.zeros_like(bias_V))
    (d_weight, d_bias), d_hidden = jax.lax.scan(body, zeros, (hidden, labels, lse))
    return d_hidden, d_weight.astype(weight_VD.dtype), d_bias, None


_sums.defvjp(_forward, _backward)
