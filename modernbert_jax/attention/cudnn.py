"""cuDNN's flash attention through `jax.nn.dot_product_attention`, for global layers on a GPU.

The public function has no segments, and no window without a causal mask. It therefore supports only
rows that are one segment without padding (`bounds.whole`). Transformer Engine also gives cuDNN
packed sequences, but its windows reach only to the left (its issue 2493, open in November 2026), so
it cannot compute a local layer.
"""

from typing import Any

import jax
import jax.numpy as jnp

from modernbert_jax.attention.bounds import Bounds


def supports(q_BLHK: Any, bounds: Bounds, device: Any) -> str | None:
    """Returns None if cuDNN supports this call, else the reason in one line."""
    if device.platform not in ("gpu", "cuda"):
        return f"cudnn: expected an NVIDIA GPU, got {device.platform}"
    if bounds.window is not None:
        return f"cudnn: expected a global layer, got a window of {bounds.window}"
    if not bounds.whole:
        return "cudnn: expected rows of one segment without padding, got segment ids or a mask"
    if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn: expected bfloat16 or float16, got {q_BLHK.dtype}"
    if q_BLHK.shape[-1] % 8 or q_BLHK.shape[-1] > 128:
        return f"cudnn: expected a head dim of at most 128 in steps of 8, got {q_BLHK.shape[-1]}"
    return None


def attention(
    q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, bounds: Bounds, *, scale: float
) -> jax.Array:
    """Computes softmax(scale * q k^T) v over whole rows, with cuDNN's own backward pass."""
    del bounds  # every key is visible
    return jax.nn.dot_product_attention(q_BLHK, k_BMHK, v_BMHK, scale=scale, implementation="cudnn")
