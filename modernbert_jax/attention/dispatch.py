"""Chooses the implementation of attention; the table PROVEN records what was tested where."""

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from modernbert_jax.attention import cudnn, first_use, reference, xla
from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.rope import Rope, rotated
from modernbert_jax.meshes import with_auto_axes

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_hopper", "pallas_triton", "cudnn")
KERNELS = IMPLEMENTATIONS[2:5]  # ours; on each device the first that can run is the fastest

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
    ("pallas_triton", "sm89"): COMPILED,
    ("pallas_triton", "sm80"): COMPILED,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that `implementation=None` runs, and the reason in one line.

    unchecked: kernels that could run here, but not before `check` has tried them.
    """

    name: str
    reason: str
    unchecked: tuple[str, ...] = ()


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
        if name != "pallas_tpu":
            return f"{name}: expected the queries of complete rows, got a part (mesh.sequence)"
        (B, _, H, K), M = q_BLHK.shape, bounds.key_lo_BM.shape[1]
        q_BLHK = jax.ShapeDtypeStruct((B, M, H, K), q_BLHK.dtype)  # as `_with_all_queries` runs it
    if name == "cudnn":
        return cudnn.supports(q_BLHK, bounds, device)
    try:
        module = _kernels(name)
    except ImportError as error:
        return f"{name}: this jax cannot import it ({error})"
    return module.supports(q_BLHK, bounds, device.device_kind if name == "pallas_tpu" else device)


def choose(q_BLHK: Any, bounds: Bounds, device: Any = None) -> Choice:
    """Returns what `implementation=None` runs for these shapes on `device` (default: jax's).

    That is the first kernel that was measured on this generation of devices or has passed `check`
    on this kind of device, else `xla`. For a device that this process does not have it is the
    kernel that a run there will try first. Nothing is run.
    """
    device = default_device() if device is None else device
    generation = generation_of(device)
    able = [n for n in IMPLEMENTATIONS[2:] if refusal(n, q_BLHK, bounds, device) is None]
    unchecked, failed = [], []
    for name in able:
        if PROVEN.get((name, generation)) == MEASURED:
            return Choice(name, f"{name}: measured on {generation}")
        if name not in KERNELS:
            continue
        if not _is_present(device):
            if PROVEN.get((name, generation)) == COMPILED:
                return Choice(
                    name, f"{name}: assumed for {generation}, where a run checks it first"
                )
            continue
        dtype, head_dim = q_BLHK.dtype.name, q_BLHK.shape[-1]
        outcome = first_use.remembered(name, device, dtype, head_dim)
        if outcome is None:
            unchecked.append(name)
        elif outcome.passed:
            return Choice(name, f"{name}: passed its check on {device.device_kind}")
        else:
            failed.append(f"{name} failed its check: {outcome.reason}")
    if unchecked:
        failed.append(f"{', '.join(unchecked)} not checked on this {device.device_kind} yet")
    why = "; ".join(failed) or f"the tested implementation on {generation}"
    return Choice("xla", f"xla: {why}", tuple(unchecked))


def check(
    device: Any = None,
    *,
    dtype: str = "bfloat16",
    head_dim: int = 64,
    everywhere: Callable[[bool], bool] = lambda passed: passed,
    log: Callable[[str], None] | None = None,
) -> Choice:
    """Checks kernels on `device` (default: jax's) until one passes, and returns what is chosen.

    Takes seconds once for a kind of device, nothing after that or on a CPU; first_use.py describes
    what is run and remembered. Warns of a kernel that fails, which is not used. Runs nothing inside
    a trace or for an absent device. everywhere: returns whether a kernel, which passed here or not,
    passed on all processes of a job; they call it in step. log: gets the choice in one line, by
    default the log of this package.
    """
    device = default_device() if device is None else device
    q = jax.ShapeDtypeStruct((1, first_use.LENGTH, 1, head_dim), jnp.dtype(dtype))
    edge = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
    bounds = Bounds(edge, edge)  # type: ignore[arg-type]
    tracing = isinstance(jnp.zeros(()), jax.core.Tracer)  # type: ignore[attr-defined]
    for name in () if tracing or not _is_present(device) else KERNELS:
        if refusal(name, q, bounds, device) is None and passes(
            name, device, dtype=dtype, head_dim=head_dim, everywhere=everywhere
        ):
            break
    choice = choose(q, bounds, device)
    (log or logging.getLogger("modernbert_jax").info)(f"attention: {choice.reason}")
    return choice


def passes(
    name: str,
    device: Any,
    *,
    dtype: str,
    head_dim: int,
    everywhere: Callable[[bool], bool] = lambda passed: passed,
) -> bool:
    """Returns whether a kernel is measured on `device` or passes its check there; see `check`."""
    if PROVEN.get((name, generation_of(device))) == MEASURED:
        return True
    outcome = first_use.remembered(name, device, dtype, head_dim)
    if outcome is None:
        per_block = _kernels(name).heads_in_a_block(head_dim) if name == "pallas_tpu" else 0
        outcome = first_use.examine(name, _function(name), device, dtype, head_dim, per_block)
        if not outcome.passed:
            warnings.warn(
                f"{name}: failed its check on {device.device_kind} ({outcome.reason}); it is not "
                "used",
                stacklevel=3,
            )
    if everywhere(outcome.passed):
        return True
    if outcome.passed:
        outcome = first_use.Outcome(False, "wrong on another process of this job")
    first_use.note(name, device, dtype, head_dim, outcome)
    return False


def attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    *,
    scale: float,
    rope: Rope | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes softmax(scale * q k^T) v over the keys within `bounds`: out_BLHK in q's dtype.

    L equals M, unless `bounds` has the bounds of the keys as well. Accumulates in float32; the
    output of a query without keys is 0. rope: the cosines and sines, float32 [B, L, K/2], by which
    q and k are rotated first. implementation: one of IMPLEMENTATIONS; None chooses one (`choose`
    returns the reason). Raises ValueError for shapes or dtypes that do not match, for an unknown
    name, and with the reason for an implementation that cannot run here.
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
    if rope is not None:
        _check_rope(rope, q_BLHK, k_BMHK)
    run = _resolve(implementation, q_BLHK, bounds, default_device())
    return run(q_BLHK, k_BMHK, v_BMHK, bounds, scale=scale, rope=rope)


def _check_rope(rope: Rope, q_BLHK: Any, k_BMHK: Any) -> None:
    (B, L, _, K), M = q_BLHK.shape, k_BMHK.shape[1]
    if M != L or any(x.shape not in ((B, L, K // 2), (1, L, K // 2)) for x in rope):
        raise ValueError(
            f"rope: expected cosines and sines [{B}, {L}, {K // 2}] and as many keys as queries, "
            f"got {rope[0].shape}, {rope[1].shape} and {M} keys"
        )


def default_device() -> Any:
    """Returns the device set by `jax.default_device`, or else the first device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def _is_present(device: Any) -> bool:
    """Whether this process or another one of its job can run on the device."""
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:  # no such platform
        return False


def _resolve(name: str | None, q_BLHK: Any, bounds: Bounds, device: Any) -> Callable[..., Any]:
    """Returns the named implementation, or the one chosen for `device`; raises if it cannot run."""
    if name is None:
        choice = choose(q_BLHK, bounds, device)
        if choice.unchecked:  # Python shows it once per call site
            warnings.warn(f"{choice.reason}; call modernbert_jax.attention.check()", stacklevel=3)
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

    The result is a function of (q_BLHK, k_BMHK, v_BMHK, bounds, *, scale, rope) for the
    `attention=` argument of models. The implementation is chosen for the mesh's devices, which may
    be absent. Raises ValueError for an axis that the mesh lacks, and on a call for a number of rows
    or heads that the axes do not divide. Inside `jax.shard_map` over some of the axes, it splits
    over the others.
    """
    device = mesh.devices.flat[0]
    mesh = Mesh(mesh.devices, mesh.axis_names)  # whatever the types of its axes are
    split: dict[str, tuple[str, ...]] = {}
    for what, axes in (("rows", rows), ("heads", heads)):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in names:
            if axis not in mesh.shape:
                raise ValueError(f"{what}: expected mesh axes of {tuple(mesh.shape)}, got {axis!r}")
        split[what] = names

    def unsplit() -> tuple[Any, dict[str, tuple[str, ...]], dict[str, int]]:
        """The axes that are split already, those that are left, and the number of parts."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        left = {what: tuple(a for a in axes if a not in manual) for what, axes in split.items()}
        parts = {what: math.prod(mesh.shape[a] for a in axes) for what, axes in left.items()}
        return manual, left, parts

    def run(q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, *, scale: float, rope: Rope | None = None):
        apply = functools.partial(by_part, scale=scale)
        return with_auto_axes(apply, q_BLHK, q_BLHK, k_BMHK, v_BMHK, bounds, rope)

    def by_part(q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, rope: Rope | None, scale: float):
        manual, left, parts = unsplit()
        for what, count in (("rows", q_BLHK.shape[0]), ("heads", q_BLHK.shape[2])):
            if count % parts[what]:
                raise ValueError(f"{what}: expected a multiple of {parts[what]}, got {count}")
        by_rows = PartitionSpec(left["rows"], None)
        by_both = PartitionSpec(left["rows"], None, left["heads"])
        # Positions that all rows share have tables of one row.
        by_table = PartitionSpec() if rope is None or rope[0].shape[0] == 1 else by_rows

        def local(q, k, v, part, rope):
            apply = _resolve(implementation, _one_of(q), part, device)
            return apply(q, k, v, part, scale=scale, rope=rope)

        if not any(left.values()) and set(manual) == set(mesh.axis_names):
            return local(q_BLHK, k_BMHK, v_BMHK, bounds, rope)
        context = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            local,
            mesh=None if set(mesh.axis_names) <= set(context.axis_names) else mesh,
            axis_names=set(mesh.axis_names) - set(manual),
            in_specs=(by_both, by_both, by_both, by_rows, by_table),
            out_specs=by_both,
            check_vma=False,
        )(q_BLHK, k_BMHK, v_BMHK, bounds, rope)

    def heads_in_a_block(q_BLHK: Any, bounds: Bounds) -> int:
        (B, L, H, K), parts = q_BLHK.shape, unsplit()[2]["heads"]
        local_BLHK = jax.ShapeDtypeStruct((B, L, H // parts, K), q_BLHK.dtype)
        name = implementation or choose(local_BLHK, bounds, device).name
        if name != "pallas_tpu" or refusal(name, local_BLHK, bounds, device) is not None:
            return 0
        per_block = _kernels(name).heads_in_a_block(K)
        return per_block if H % (per_block * parts) == 0 else 0

    if device.platform == "tpu":
        run.heads_in_a_block = heads_in_a_block
    return run


def packed_heads(attention: Callable[..., jax.Array], q_BLHK: Any, bounds: Bounds) -> int:
    """Returns how many heads `attention` prefers in one block of q, k and v together; 0 if none.

    If this is J, call it with (qkv_BLGTJK, None, None, bounds, ...), where T is 3 and G * J are the
    heads. For q_BLHK, shape and dtype suffice.
    """
    prefers = getattr(attention, "heads_in_a_block", None)
    return 0 if prefers is None else prefers(q_BLHK, bounds)


def row_major(attention: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns x, for which XLA keeps the row-major layout if `attention` is meant for TPUs.

    Left to itself, XLA moves the tokens into the lanes there and copies x to what kernels read.
    """
    if not hasattr(attention, "heads_in_a_block"):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _one_of(q: Any) -> Any:
    """The shape and dtype of q_BLHK, also if q, k and v are one array."""
    if q.ndim == 4:
        return q
    B, L, G, _, J, K = q.shape
    return jax.ShapeDtypeStruct((B, L, G * J, K), q.dtype)


def _kernels(name: str) -> Any:
    """Imports a kernel's file when it is needed: each depends on another part of Pallas."""
    if name == "pallas_tpu":
        from modernbert_jax.attention import pallas_tpu as kernels
    elif name == "pallas_hopper":
        from modernbert_jax.attention import pallas_hopper as kernels
    else:
        from modernbert_jax.attention import pallas_triton as kernels
    return kernels


def _with_all_queries(run, q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, **options) -> jax.Array:
    """Runs a kernel that needs L = M with more queries, which see nothing and which it skips.

    The kernel must not use that the relation of `bounds` is symmetric.
    """
    if bounds.key_lo_BM is None:
        return run(q_BLHK, k_BMHK, v_BMHK, bounds, **options)
    L, M = q_BLHK.shape[1], k_BMHK.shape[1]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, M - L), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    bounds = Bounds(pad(bounds.lo_BL), pad(bounds.hi_BL), bounds.window)
    return run(pad(q_BLHK), k_BMHK, v_BMHK, bounds, **options)[:, :L]


def _function(name: str) -> Callable[..., jax.Array]:
    if name == "pallas_tpu":
        # It rotates q and k itself.
        return functools.partial(_with_all_queries, _kernels(name).attention)
    own = {"reference": reference.attention, "xla": xla.attention, "cudnn": cudnn.attention}
    return functools.partial(rotated, own[name] if name in own else _kernels(name).attention)
