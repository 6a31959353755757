"""Masked cross-entropy over predicted positions, a chunk of logits at a time, on any mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.precision import matmul_precision

from ..common.sharding import BATCH, DATA, FSDP, TENSOR, batch_shards

_HIDDEN = P(None, BATCH, None, None)  # N B C D
_LABELS = P(None, BATCH, None)  # N B C


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
    micro-batches and devices is exact. A device holds the logits of at most `chunk` positions (or
    of one position per sequence) at a time; the backward pass recomputes them from one log-sum-exp
    per position. Under a mesh, sequences are split over data and fsdp and the vocabulary over
    tensor, and the weight's gradient is summed over devices once instead of once per chunk.
    """
    B, length, D = hidden_BPD.shape
    sequences = B if mesh is None else B // batch_shards(mesh)
    width = min(length, max(1, chunk // sequences))
    tail = ((0, 0), (0, -length % width))
    hidden = jnp.pad(hidden_BPD, (*tail, (0, 0))).reshape(B, -1, width, D)
    labels = jnp.pad(labels_BP, tail, constant_values=IGNORE_INDEX).reshape(B, -1, width)
    if bias_V is None:
        bias_V = jnp.zeros((weight_VD.shape[0],), jnp.float32)
    return _sums(
        mesh,
        jnp.moveaxis(hidden, 1, 0),
        weight_VD,
        bias_V.astype(jnp.float32),
        jnp.moveaxis(labels, 1, 0),
    )


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = matmul_precision(x.dtype)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _logits(hidden_BCD, weight_VD, bias_V):
    return _einsum("BCD,VD->BCV", hidden_BCD, weight_VD) + bias_V[None, None, :]


def _is_label(labels_BC, size: int, mesh: Mesh | None):
    """Returns a mask of the label among this device's `size` tokens of the vocabulary."""
    first = 0 if mesh is None else jax.lax.axis_index(TENSOR) * size
    tokens_V = first + jnp.arange(size, dtype=labels_BC.dtype)
    return labels_BC[..., None] == tokens_V[None, None, :]


def _reduce(reduce, x, axes, mesh: Mesh | None):
    return x if mesh is None else reduce(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(mesh, hidden, weight_VD, bias_V, labels):
    """Returns (loss, correct) of hidden [N, B, C, D] and labels [N, B, C], chunk by chunk."""
    return _forward(mesh, hidden, weight_VD, bias_V, labels)[0]


def _forward(mesh, hidden, weight_VD, bias_V, labels):
    def local(hidden, weight_VD, bias_V, labels):
        weight_VD = weight_VD.astype(hidden.dtype)

        def body(sums, part):
            hidden_BCD, labels_BC = part
            logits_BCV = _logits(hidden_BCD, weight_VD, bias_V)
            top_BC = _reduce(jax.lax.pmax, jnp.max(logits_BCV, axis=-1), TENSOR, mesh)
            total_BC = jnp.sum(jnp.exp(logits_BCV - top_BC[..., None]), axis=-1)
            is_label_BCV = _is_label(labels_BC, logits_BCV.shape[-1], mesh)
            picked_BC = jnp.sum(jnp.where(is_label_BCV, logits_BCV, 0.0), axis=-1)
            total_BC, picked_BC = _reduce(jax.lax.psum, (total_BC, picked_BC), TENSOR, mesh)
            lse_BC = top_BC + jnp.log(total_BC)
            used_BC = labels_BC != IGNORE_INDEX
            loss = jnp.sum(jnp.where(used_BC, lse_BC - picked_BC, 0.0))
            correct = jnp.sum(jnp.where(used_BC & (picked_BC == top_BC), 1.0, 0.0))
            return (sums[0] + loss, sums[1] + correct), lse_BC

        zero = jnp.zeros((), jnp.float32)
        sums, lse = jax.lax.scan(body, (zero, zero), (hidden, labels))
        return _reduce(jax.lax.psum, sums, BATCH, mesh), lse

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_HIDDEN, P(TENSOR, None), P(TENSOR), _LABELS),
            out_specs=((P(), P()), _LABELS),
            check_vma=False,
        )
    sums, lse = local(hidden, weight_VD, bias_V, labels)
    return sums, (hidden, weight_VD, bias_V, labels, lse)


def _backward(mesh, saved, d_sums):
    hidden, weight_VD, bias_V, labels, lse = saved

    def local(hidden, weight_VD, bias_V, labels, lse, d_loss):
        weight_VD = weight_VD.astype(hidden.dtype)

        def body(carry, part):
            d_weight_VD, d_bias_V = carry
            hidden_BCD, labels_BC, lse_BC = part
            p_BCV = jnp.exp(_logits(hidden_BCD, weight_VD, bias_V) - lse_BC[..., None])
            scale_BC1 = jnp.where(labels_BC != IGNORE_INDEX, d_loss, 0.0)[..., None]
            d_logits_BCV = (p_BCV - _is_label(labels_BC, p_BCV.shape[-1], mesh)) * scale_BC1
            d_bias_V = d_bias_V + jnp.sum(d_logits_BCV, axis=(0, 1))
            d_logits_BCV = d_logits_BCV.astype(hidden.dtype)
            d_weight_VD = d_weight_VD + _einsum("BCV,BCD->VD", d_logits_BCV, hidden_BCD)
            d_hidden_BCD = _einsum("BCV,VD->BCD", d_logits_BCV, weight_VD)
            d_hidden_BCD = _reduce(jax.lax.psum, d_hidden_BCD, TENSOR, mesh)
            return (d_weight_VD, d_bias_V), d_hidden_BCD.astype(hidden.dtype)

        zeros = (jnp.zeros(weight_VD.shape, jnp.float32), jnp.zeros(bias_V.shape, jnp.float32))
        (d_weight, d_bias), d_hidden = jax.lax.scan(body, zeros, (hidden, labels, lse))
        if mesh is not None:
            d_weight = jax.lax.psum_scatter(d_weight, FSDP, scatter_dimension=1, tiled=True)
            d_weight = jax.lax.psum(d_weight, DATA)
            d_bias = jax.lax.psum(d_bias, BATCH)
        return d_hidden, d_weight, d_bias

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_HIDDEN, P(TENSOR, None), P(TENSOR), _LABELS, _LABELS, P()),
            out_specs=(_HIDDEN, P(TENSOR, FSDP), P(TENSOR)),
            check_vma=False,
        )
    # The number of correct predictions has no gradient.
    d_hidden, d_weight, d_bias = local(hidden, weight_VD, bias_V, labels, lse, d_sums[0])
    return d_hidden, d_weight.astype(weight_VD.dtype), d_bias, None


_sums.defvjp(_forward, _backward)
