"""Chooses the implementation of attention; the table PROVEN records what was tested where."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from modernbert_jax.attention import cudnn, reference, xla
from modernbert_jax.attention.bounds import Bounds

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_hopper", "pallas_triton", "cudnn")

MEASURED = "measured"  # there is a result file in tests/benchmarks/results
COMPILED = "compiled and interpreted"  # its machine code was generated and read, but not run

# The evidence for each implementation on each device generation. `reference` and `xla` are plain
# JAX, which XLA compiles for every backend.
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
    """The implementation that `implementation=None` runs, and the reason in one line."""

    name: str
    reason: str


def generation_of(device: Any) -> str:
    """Returns a device's generation as in PROVEN: "cpu", "sm90", "TPU v6 lite"."""
    if device.platform in ("gpu", "cuda", "rocm"):
        capability = getattr(device, "compute_capability", None)
        return f"sm{str(capability).replace('.', '')}" if capability else device.device_kind
    return device.device_kind if device.platform == "tpu" else device.platform


def refusal(name: str, q_BLHK: Any, bounds: Bounds, device: Any) -> str | None:
    """Returns why an implementation cannot run on `device`, in one line; None if it can."""
    if name not in IMPLEMENTATIONS:
        return f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
    if name in ("reference", "xla"):
        return None
    if bounds.key_lo_BM is not None:
        return f"{name}: expected the queries of complete rows, got a part of them (mesh.sequence)"
    if name == "cudnn":
        return cudnn.supports(q_BLHK, bounds, device)
    try:
        module = _kernels(name)
    except ImportError as error:
        return f"{name}: this jax cannot import it ({error})"
    return module.supports(q_BLHK, bounds, device.device_kind if name == "pallas_tpu" else device)


def choose(q_BLHK: Any, bounds: Bounds, device: Any = None) -> Choice:
    """Returns what `implementation=None` runs for these shapes on `device` (default: jax's).

    Prefers a kernel that was measured on this generation, then, on a TPU, a kernel that its
    compiler accepts, then `xla`.
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
                f"{name}: {COMPILED} for {generation}, but never run on one; "
                "`python -m modernbert_jax.attention` checks it",
            )
    untested = f" ({', '.join(able)} can run but were not measured)" if able else ""
    return Choice("xla", f"xla: the tested implementation on {generation}{untested}")


def attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Computes softmax(scale * q k^T) v over the keys within `bounds`: out_BLHK in q's dtype.

    L equals M, unless `bounds` has the bounds of the keys as well. Accumulates in float32; the
    output of a query without keys is 0. implementation: one of IMPLEMENTATIONS; None chooses one
    (`choose` returns the reason). Raises ValueError for shapes or dtypes that do not match, for an
    unknown name, and with the reason for an implementation that cannot run here.
    """
    B, L, H, K = q_BLHK.shape if q_BLHK.ndim == 4 else (0, 0, 0, 0)
    M = L if bounds.key_lo_BM is None else bounds.key_lo_BM.shape[1]
    if q_BLHK.ndim != 4 or not k_BMHK.shape == v_BMHK.shape == (B, M, H, K):
        raise ValueError(
            f"attention: expected q [B, L, H, K] and k and v [B, {'L' if M == L else M}, H, K], "
            f"got {q_BLHK.shape}, {k_BMHK.shape}, {v_BMHK.shape}"
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
    """Returns the device set by `jax.default_device`, or else the first device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def _resolve(name: str | None, q_BLHK: Any, bounds: Bounds, device: Any) -> Callable[..., Any]:
    """Returns the named implementation, or the one chosen for `device`; raises if it cannot run."""
    if name is None:
        choice = choose(q_BLHK, bounds, device)
        if "never run" in choice.reason:
            warnings.warn(choice.reason, stacklevel=3)  # Python shows it once per call site
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
    """Returns `attention` for a mesh: rows and heads are split over mesh axes; no communication.

    The result is a function of (q_BLHK, k_BMHK, v_BMHK, bounds, *, scale) for the `attention=`
    argument of models. The implementation is chosen for the mesh's devices, which may be absent.
    Raises ValueError for an axis that the mesh lacks, and on a call for a number of rows or heads
    that the axes do not divide.
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

        def local(q, k, v, part):
            return _resolve(implementation, q, part, device)(q, k, v, part, scale=scale)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(by_both, by_both, by_both, by_rows),
            out_specs=by_both,
            check_vma=False,
        )(q_BLHK, k_BMHK, v_BMHK, bounds)

    return run


def _kernels(name: str) -> Any:
    """Imports a kernel's file when it is needed: each depends on another part of Pallas."""
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
