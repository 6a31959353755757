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
    logits exist at a time; the backward pass computes them again.
    """
    D = hidden_BPD.shape[-1]
    n = labels_BP.size
    chunk = min(chunk, n)
    tail = -n % chunk
    hidden = jnp.pad(hidden_BPD.reshape(n, D), ((0, tail), (0, 0))).reshape(-1, chunk, D)
    labels = jnp.pad(labels_BP.reshape(n), (0, tail), constant_values=IGNORE).reshape(-1, chunk)
    weight_VD = weight_VD.astype(hidden_BPD.dtype)
    bias_V = None if bias_V is None else bias_V.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if weight_VD.dtype == jnp.float32 else None

    @jax.checkpoint
    def one(hidden_CD, labels_C):
        logits_CV = jnp.einsum(
            "CD,VD->CV", hidden_CD, weight_VD, precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if bias_V is not None:
            logits_CV = logits_CV + bias_V[None, :]
        used_C = labels_C != IGNORE
        target_C1 = jnp.where(used_C, labels_C, 0)[:, None]
        top_C = jax.nn.logsumexp(logits_CV, axis=-1)
        picked_C = jnp.take_along_axis(logits_CV, target_C1, axis=-1)[:, 0]
        right_C = jnp.argmax(logits_CV, axis=-1) == target_C1[:, 0]
        return (
            jnp.sum(jnp.where(used_C, top_C - picked_C, 0.0)),
            jnp.sum(jnp.where(used_C, right_C, False).astype(jnp.float32)),
        )

    def body(sums, part):
        loss, right = one(*part)
        return (sums[0] + loss, sums[1] + right), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), (hidden, labels))[0]
