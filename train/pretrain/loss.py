"""Masked cross-entropy over predicted positions, a chunk of logits at a time, on any mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.precision import matmul_precision

from ..common.sharding import BATCH, DATA, FSDP, TENSOR

_HIDDEN = P(BATCH, None, None)  # B P D
_LABELS = P(BATCH, None)  # B P
_LSE = P(None, BATCH)  # N C


@jax.named_scope("loss")  # `plan` counts its time apart
def masked_cross_entropy(
    hidden_BPD: jax.Array,
    weight_VD: jax.Array,
    bias_V: jax.Array | None,
    labels_BP: jax.Array,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of losses in nats, correct predictions), float32.

    hidden_BPD: states at predicted positions. weight_VD, bias_V: of the decoder. labels_BP: token
    ids, IGNORE_INDEX at unused positions. Sums rather than means, so that a mean over chunks,
    micro-batches and devices is exact. A device holds the logits of `chunk` positions at a time,
    of all its sequences together, since a TPU computes in multiples of 128; the backward pass
    recomputes them from one log-sum-exp per position. Under a mesh, sequences are split over data
    and fsdp and the vocabulary over tensor, and the weight's gradient is summed over devices once
    instead of once per chunk.
    """
    if bias_V is None:
        bias_V = jnp.zeros((weight_VD.shape[0],), jnp.float32)
    return _sums(mesh, chunk, hidden_BPD, weight_VD, bias_V.astype(jnp.float32), labels_BP)


def _chunks(x_BPx: jax.Array, chunk: int, fill: int) -> jax.Array:
    """Returns the positions [B, P, ...] of a device as chunks [N, C, ...], the last one padded."""
    B, P, *rest = x_BPx.shape
    width = min(chunk, B * P)
    flat = x_BPx.reshape(B * P, *rest)
    tail = ((0, -(B * P) % width), *((0, 0) for _ in rest))
    return jnp.pad(flat, tail, constant_values=fill).reshape(-1, width, *rest)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = matmul_precision(x.dtype)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _logits(hidden_CD, weight_VD, bias_V):
    return _einsum("CD,VD->CV", hidden_CD, weight_VD) + bias_V[None, :]


def _is_label(labels_C, size: int, mesh: Mesh | None):
    """Returns a mask of the label among this device's `size` tokens of the vocabulary."""
    first = 0 if mesh is None else jax.lax.axis_index(TENSOR) * size
    tokens_V = first + jnp.arange(size, dtype=labels_C.dtype)
    return labels_C[..., None] == tokens_V[None, :]


def _reduce(reduce, x, axes, mesh: Mesh | None):
    return x if mesh is None else reduce(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(mesh, chunk, hidden_BPD, weight_VD, bias_V, labels_BP):
    """Returns (loss, correct) of the positions, chunk by chunk."""
    return _forward(mesh, chunk, hidden_BPD, weight_VD, bias_V, labels_BP)[0]


def _forward(mesh, chunk, hidden_BPD, weight_VD, bias_V, labels_BP):
    def local(hidden_BPD, weight_VD, bias_V, labels_BP):
        weight_VD = weight_VD.astype(hidden_BPD.dtype)
        hidden = _chunks(hidden_BPD, chunk, 0)
        labels = _chunks(labels_BP, chunk, IGNORE_INDEX)

        def body(sums, part):
            hidden_CD, labels_C = part
            logits_CV = _logits(hidden_CD, weight_VD, bias_V)
            top_C = _reduce(jax.lax.pmax, jnp.max(logits_CV, axis=-1), TENSOR, mesh)
            total_C = jnp.sum(jnp.exp(logits_CV - top_C[..., None]), axis=-1)
            is_label_CV = _is_label(labels_C, logits_CV.shape[-1], mesh)
            picked_C = jnp.sum(jnp.where(is_label_CV, logits_CV, 0.0), axis=-1)
            total_C, picked_C = _reduce(jax.lax.psum, (total_C, picked_C), TENSOR, mesh)
            lse_C = top_C + jnp.log(total_C)
            used_C = labels_C != IGNORE_INDEX
            loss = jnp.sum(jnp.where(used_C, lse_C - picked_C, 0.0))
            correct = jnp.sum(jnp.where(used_C & (picked_C == top_C), 1.0, 0.0))
            return (sums[0] + loss, sums[1] + correct), lse_C

        zero = jnp.zeros((), jnp.float32)
        sums, lse = jax.lax.scan(body, (zero, zero), (hidden, labels))
        return _reduce(jax.lax.psum, sums, BATCH, mesh), lse

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_HIDDEN, P(TENSOR, None), P(TENSOR), _LABELS),
            out_specs=((P(), P()), _LSE),
            check_vma=False,
        )
    sums, lse = local(hidden_BPD, weight_VD, bias_V, labels_BP)
    return sums, (hidden_BPD, weight_VD, bias_V, labels_BP, lse)


def _backward(mesh, chunk, saved, d_sums):
    hidden_BPD, weight_VD, bias_V, labels_BP, lse = saved

    def local(hidden_BPD, weight_VD, bias_V, labels_BP, lse, d_loss):
        weight_VD = weight_VD.astype(hidden_BPD.dtype)
        hidden = _chunks(hidden_BPD, chunk, 0)
        labels = _chunks(labels_BP, chunk, IGNORE_INDEX)

        def body(carry, part):
            d_weight_VD, d_bias_V = carry
            hidden_CD, labels_C, lse_C = part
            p_CV = jnp.exp(_logits(hidden_CD, weight_VD, bias_V) - lse_C[..., None])
            scale_C1 = jnp.where(labels_C != IGNORE_INDEX, d_loss, 0.0)[..., None]
            d_logits_CV = (p_CV - _is_label(labels_C, p_CV.shape[-1], mesh)) * scale_C1
            d_bias_V = d_bias_V + jnp.sum(d_logits_CV, axis=0)
            d_logits_CV = d_logits_CV.astype(hidden.dtype)
            d_weight_VD = d_weight_VD + _einsum("CV,CD->VD", d_logits_CV, hidden_CD)
            d_hidden_CD = _einsum("CV,VD->CD", d_logits_CV, weight_VD)
            d_hidden_CD = _reduce(jax.lax.psum, d_hidden_CD, TENSOR, mesh)
            return (d_weight_VD, d_bias_V), d_hidden_CD.astype(hidden.dtype)

        zeros = (jnp.zeros(weight_VD.shape, jnp.float32), jnp.zeros(bias_V.shape, jnp.float32))
        (d_weight, d_bias), d_hidden = jax.lax.scan(body, zeros, (hidden, labels, lse))
        if mesh is not None:
            d_weight = jax.lax.psum_scatter(d_weight, FSDP, scatter_dimension=1, tiled=True)
            d_weight = jax.lax.psum(d_weight, DATA)
            d_bias = jax.lax.psum(d_bias, BATCH)
        B, P, D = hidden_BPD.shape
        return d_hidden.reshape(-1, D)[: B * P].reshape(B, P, D), d_weight, d_bias

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_HIDDEN, P(TENSOR, None), P(TENSOR), _LABELS, _LSE, P()),
            out_specs=(_HIDDEN, P(TENSOR, FSDP), P(TENSOR)),
            check_vma=False,
        )
    # The number of correct predictions has no gradient.
    d_hidden, d_weight, d_bias = local(hidden_BPD, weight_VD, bias_V, labels_BP, lse, d_sums[0])
    return d_hidden, d_weight.astype(weight_VD.dtype), d_bias, None


_sums.defvjp(_forward, _backward)
