"""The precision of matrix products, in one place.

TPUs and recent GPUs round float32 operands to fewer bits unless they are told otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that float32 means float32 on every device; None for other types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two arrays of one dtype, accumulated and returned in float32."""
    return jnp.einsum(
        equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32
    )
