"""The losses of the heads, as transformers defines them: float32 scalars.

A label of -100 is left out of the mean. Without any other label the mean is NaN, as in torch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax.attention.bounds import host_array
from modernbert_jax.packing import IGNORE_INDEX

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def cross_entropy(logits: Any, labels: Any, *, ignore_index: int = IGNORE_INDEX) -> jax.Array:
    """Returns the mean cross-entropy of class indices: masked LM, tokens, texts, choices.

    logits: [..., E]. labels: integers [...]; those equal to ignore_index are left out. Raises
    ValueError for other shapes and dtypes and, in lists and NumPy arrays, for labels outside 0 to
    E - 1; in a jax array, whose values are not read, they make the loss NaN.
    """
    logits = jnp.asarray(logits, jnp.float32)
    labels = _labels("labels", labels, logits.shape[:-1])
    classes = logits.shape[-1]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: expected class indices (integers), got {labels.dtype}")
    if isinstance(labels, np.ndarray):
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if outside.size:
            raise ValueError(
                f"labels: expected 0 to {classes - 1:,}, or {ignore_index} to leave one out, got "
                f"{outside.flat[0]}"
            )
    labels = jnp.asarray(labels)
    counted = labels != ignore_index
    # NaN for a label outside, a negative one too.
    index = jnp.where(counted, jnp.where(labels < 0, classes, labels), 0)
    picked = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
    losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    return jnp.sum(losses) / jnp.sum(counted)


def sequence_classification(logits: Any, labels: Any, problem_type: str | None = None) -> jax.Array:
    """Returns the loss of a sequence classifier.

    logits: [B, E]. problem_type: "regression" (the mean squared error; labels [B] if E is 1, or
    [B, E]), "single_label_classification" (`cross_entropy`; labels [B]) or
    "multi_label_classification" (the mean binary cross-entropy; labels [B, E] of 0 and 1). None
    means regression if E is 1, a single label if labels are integers, and else several. Raises
    ValueError for another problem_type and for labels of another shape.
    """
    logits = jnp.asarray(logits, jnp.float32)
    outputs = logits.shape[-1]
    if problem_type is None:
        dtype = labels.dtype if hasattr(labels, "dtype") else np.asarray(labels).dtype
        if outputs == 1:
            problem_type = "regression"
        elif jnp.issubdtype(dtype, jnp.integer):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(
            f"problem_type: expected None or one of {', '.join(PROBLEM_TYPES)}, "
            f"got {problem_type!r}"
        )
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if outputs == 1 and np.shape(labels) == logits.shape[:-1]:
        logits = logits[..., 0]
    targets = jnp.asarray(_labels("labels", labels, logits.shape), jnp.float32)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - targets))
    # -log(sigmoid(x)) for a label, -log(1 - sigmoid(x)) without it, in a form that is stable.
    return jnp.mean(jax.nn.softplus(logits) - logits * targets)


def question_answering(
    start_logits: Any, end_logits: Any, start_positions: Any, end_positions: Any
) -> jax.Array:
    """Returns the mean of the cross-entropies of a span's start and end.

    start_logits, end_logits: [B, L]. start_positions, end_positions: integers [B]; a negative
    position counts as 0, and one of L or more, outside a truncated text, is left out.
    """

    def one(name: str, logits: Any, positions: Any) -> jax.Array:
        logits = jnp.asarray(logits, jnp.float32)
        positions = _labels(name, positions, logits.shape[:-1])
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(f"{name}: expected positions (integers), got {positions.dtype}")
        length = logits.shape[-1]
        return cross_entropy(logits, jnp.clip(positions, 0, length), ignore_index=length)

    start = one("start_positions", start_logits, start_positions)
    return (start + one("end_positions", end_logits, end_positions)) / 2


def _labels(name: str, labels: Any, shape: tuple[int, ...]) -> Any:
    """Returns labels of this shape: a NumPy array, or the jax array as it is."""
    values = host_array(name, labels)
    values = labels if values is None else values
    if values.shape != shape:
        raise ValueError(f"{name}: expected the shape {shape}, got {values.shape}")
    return values
