"""One op, bounded attention: `attention` chooses an implementation or runs the one named."""

import jax

from modernbert_jax.attention import reference, xla
from modernbert_jax.attention.bounds import Bounds, make_bounds, segment_ids_from_mask

__all__ = ["Bounds", "attention", "make_bounds", "segment_ids_from_mask"]

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention}


def attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys that `bounds` admits, out_BLHK in q's dtype.

    L equals M. Accumulates in float32; a query with no key gives 0. `implementation=None` chooses;
    a name runs that one or raises. Raises ValueError for shapes or dtypes that do not match and for
    an unknown name.
    """
    if not q_BLHK.shape == k_BMHK.shape == v_BMHK.shape or q_BLHK.ndim != 4:
        raise ValueError(
            "attention: expected q, k and v of one shape [B, L, H, K], got "
            f"{q_BLHK.shape}, {k_BMHK.shape}, {v_BMHK.shape}"
        )
    if not q_BLHK.dtype == k_BMHK.dtype == v_BMHK.dtype:
        raise ValueError(
            f"attention: expected one dtype, got {q_BLHK.dtype}, {k_BMHK.dtype}, {v_BMHK.dtype}"
        )
    if bounds.lo_BL.shape != q_BLHK.shape[:2]:
        raise ValueError(
            f"attention: expected bounds of shape {q_BLHK.shape[:2]}, got {bounds.lo_BL.shape}"
        )
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {name!r}"
        )
    return IMPLEMENTATIONS[name](q_BLHK, k_BMHK, v_BMHK, bounds, scale=scale)
