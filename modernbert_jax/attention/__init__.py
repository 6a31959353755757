"""One op, bounded attention: `attention` chooses an implementation or runs the one named.

Each implementation is a file beside this one; what was proven where is the table PROVEN.
`python -m modernbert_jax.attention` checks and times them all on the device at hand.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from modernbert_jax.attention import cudnn, reference, xla
from modernbert_jax.attention.bounds import Bounds, make_bounds, segment_ids_from_mask

__all__ = [
    "Bounds",
    "Choice",
    "attention",
    "choose",
    "make_bounds",
    "refusal",
    "segment_ids_from_mask",
    "sharded",
]

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_hopper", "pallas_triton", "cudnn")

MEASURED = "measured"  # a result file in tests/benchmarks/results
COMPILED = "compiled and interpreted"  # the machine code for it was made and read, not run

# What was proven where, by implementation and device generation; what is absent is neither.
# `reference` and `xla` are plain JAX: XLA's own on every backend.
PROVEN: dict[tuple[str, str], str] = {
    ("xla", "cpu"): MEASURED,
    ("pallas_tpu", "TPU v5 lite"): COMPILED,
    ("pallas_tpu", "TPU v5"): COMPILED,
    ("pallas_tpu", "TPU v6 lite"): COMPILED,
    ("pallas_tpu", "TPU7x"): COMPILED,
    ("pallas_hopper", "sm90"): COMPILED,
    ("pallas_triton", "sm90"): COMPILED,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation `implementation=None` takes, and why, in one line."""

    name: str
    reason: str


def generation_of(device: Any) -> str:
    """The device's generation as PROVEN names it: "cpu", "sm90", "TPU v6 lite"."""
    if device.platform in ("gpu", "cuda", "rocm"):
        capability = getattr(device, "compute_capability", None)
        return f"sm{str(capability).replace('.', '')}" if capability else device.device_kind
    return device.device_kind if device.platform == "tpu" else device.platform


def refusal(name: str, q_BLHK: Any, bounds: Bounds, device: Any) -> str | None:
    """Why an implementation cannot run this on `device`, in one line; None where it can."""
    if name not in IMPLEMENTATIONS:
        return f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
    if name in ("reference", "xla"):
        return None
    if name == "cudnn":
        return cudnn.supports(q_BLHK, bounds, device)
    try:
        module = _kernels(name)
    except ImportError as error:
        return f"{name}: this jax cannot import it ({error})"
    return module.supports(q_BLHK, bounds, device.device_kind if name == "pallas_tpu" else device)


def choose(q_BLHK: Any, bounds: Bounds, device: Any = None) -> Choice:
    """What `implementation=None` runs for these shapes on `device` (default: jax's).

    A kernel measured on this generation first; on a TPU the kernel that its own compiler has
    accepted; else `xla`, which is proven everywhere.
    """
    device = default_device() if device is None else device
    generation = generation_of(device)
    able = [n for n in IMPLEMENTATIONS[2:] if refusal(n, q_BLHK, bounds, device) is None]
    for name in able:
        if PROVEN.get((name, generation)) == MEASURED:
            return Choice(name, f"{name}: measured on {generation}")
    for name in able:
        if device.platform == "tpu" and PROVEN.get((name, generation)) == COMPILED:
            return Choice(
                name,
                f"{name}: {COMPILED} for {generation}, never run on one; "
                "`python -m modernbert_jax.attention` checks it",
            )
    untested = f" ({', '.join(able)} can run but are not measured here)" if able else ""
    return Choice("xla", f"xla: the proven one on {generation}{untested}")


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

    L equals M. Accumulates in float32; a query with no key gives 0. `implementation=None` chooses
    (ask `choose` why); a name runs that one or raises. Raises ValueError for shapes or dtypes that
    do not match, an unknown name, or an implementation that cannot run here, with the reason.
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
    run = _resolve(implementation, q_BLHK, bounds, default_device())
    return run(q_BLHK, k_BMHK, v_BMHK, bounds, scale=scale)


def default_device() -> Any:
    """Where jax computes: what `jax.default_device` says, else the first device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def _resolve(name: str | None, q_BLHK: Any, bounds: Bounds, device: Any) -> Callable[..., Any]:
    """The implementation named, or refused; None: the one chosen for `device`."""
    if name is None:
        choice = choose(q_BLHK, bounds, device)
        if "never run" in choice.reason:
            warnings.warn(choice.reason, stacklevel=3)  # Python shows one warning a place once
        name = choice.name
    elif (reason := refusal(name, q_BLHK, bounds, device)) is not None:
        raise ValueError(reason)
    return _function(name)


def sharded(
    mesh: Mesh,
    rows: str | tuple[str, ...] | None = None,
    heads: str | tuple[str, ...] | None = None,
    *,
    implementation: str | None = None,
) -> Callable[..., jax.Array]:
    """`attention` under a mesh: rows and heads split over the mesh axes named, nothing exchanged.

    Returns a function of (q_BLHK, k_BMHK, v_BMHK, bounds, *, scale); models take it as
    `attention=`. The choice is made for the mesh's devices, which need not be here. Raises
    ValueError for an axis that the mesh lacks, and when called for rows or heads that the axes do
    not divide.
    """
    device = mesh.devices.flat[0]
    sizes = {}
    for what, axes in (("rows", rows), ("heads", heads)):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in names:
            if axis not in mesh.shape:
                raise ValueError(f"{what}: expected mesh axes of {tuple(mesh.shape)}, got {axis!r}")
        sizes[what] = 1
        for axis in names:
            sizes[what] *= mesh.shape[axis]

    def run(q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, *, scale: float):
        for what, count in (("rows", q_BLHK.shape[0]), ("heads", q_BLHK.shape[2])):
            if count % sizes[what]:
                raise ValueError(f"{what}: expected a multiple of {sizes[what]}, got {count}")
        by_rows = PartitionSpec(rows, None)
        by_both = PartitionSpec(rows, None, heads, None)

        def local(q, k, v, lo, hi):
            part = dataclasses.replace(bounds, lo_BL=lo, hi_BL=hi)
            return _resolve(implementation, q, part, device)(q, k, v, part, scale=scale)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(by_both, by_both, by_both, by_rows, by_rows),
            out_specs=by_both,
            check_vma=False,
        )(q_BLHK, k_BMHK, v_BMHK, bounds.lo_BL, bounds.hi_BL)

    return run


def _kernels(name: str) -> Any:
    """A kernel's file, imported where it is wanted: each needs another part of Pallas."""
    if name == "pallas_tpu":
        from modernbert_jax.attention import pallas_tpu as kernels
    elif name == "pallas_hopper":
        from modernbert_jax.attention import pallas_hopper as kernels
    else:
        from modernbert_jax.attention import pallas_triton as kernels
    return kernels


def _function(name: str) -> Callable[..., jax.Array]:
    own = {"reference": reference.attention, "xla": xla.attention, "cudnn": cudnn.attention}
    return own[name] if name in own else _kernels(name).attention
