"""How arrays are placed on devices: weights by their axis letters, batches by sequence.

The mesh has four axes. The sequences of a batch are split over `data` and `fsdp`, and the tokens of
each sequence over `sequence`; parameters and moments over `fsdp`, and gathered over it once per
step; heads, MLP and vocabulary over `tensor`. A single device is a mesh of 1 x 1 x 1 x 1, so that
there is one code path.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from modernbert_jax.sharding import (
    FSDP,
    TENSOR,
    param_shardings as param_shardings,
    put,
    spec_of as spec_of,
)
from modernbert_jax.weights import weight_of

DATA, SEQUENCE = "data", "sequence"
AXES = (DATA, FSDP, SEQUENCE, TENSOR)
BATCH = (DATA, FSDP)  # the mesh axes that split the sequences of a batch
TOKENS = (*BATCH, SEQUENCE)  # those that split its tokens


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each axis of the mesh."""

    data: int = -1  # Copies of the model; -1 uses the devices that the other axes leave.
    fsdp: int = 1
    """Number of ways parameters and moments are split; sequences are split over data and fsdp."""
    sequence: int = 1
    """Number of ways the tokens of each sequence are split (context parallelism)."""
    tensor: int = 1  # Number of ways attention heads, MLP and vocabulary are split.


def make_mesh(shape: MeshShape | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all devices; a single process may leave the last ones unused.

    The slices of a multi-slice TPU job are joined along `data`, the axis with the least
    communication. Raises ValueError if the axes do not multiply to the number of devices.
    """
    shape = shape or MeshShape()
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    others = (shape.fsdp, shape.sequence, shape.tensor)
    data = n // max(math.prod(others), 1) if shape.data == -1 else shape.data
    sizes = (data, *others)
    if 0 < math.prod(sizes) < n and len({d.process_index for d in devices}) == 1:
        devices = devices[: math.prod(sizes)]
        n = len(devices)
    if min(sizes) < 1 or math.prod(sizes) != n:
        raise ValueError(
            f"mesh: expected {' x '.join(AXES)} to equal the {n} devices, got "
            f"{' x '.join(map(str, (shape.data, *others)))}; --mesh.data -1 uses the devices that "
            "remain"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = count_slices(devices)
    if slices > 1:
        if data % slices:
            raise ValueError(
                f"mesh: expected data to be a multiple of the {slices} slices, got {data}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *others), (slices, 1, 1, 1), devices
        )
        return Mesh(grid, AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def count_slices(devices: Sequence[Any]) -> int:
    """Returns the number of TPU slices that the devices belong to."""
    return len({getattr(d, "slice_index", 0) for d in devices})


def describe(mesh: Mesh) -> str:
    """Returns the mesh in words: "data 4 x fsdp 1 x tensor 2 (cpu, 1 processes)"."""
    grid = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{grid} ({mesh.devices.flat[0].device_kind}, {jax.process_count()} processes)"


# Weights: `modernbert_jax.sharding` has the rules.


def split_over_tokens(
    run: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Wraps a function of a device's own tokens, which may communicate over `TOKENS`.

    The axes that are not in TOKENS stay with the partitioner, which has nothing to do if their size
    is 1; specs name only those of TOKENS.
    """
    own = {axis for axis in mesh.axis_names if axis in TOKENS or mesh.shape[axis] == 1}
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=own,
        check_vma=False,
    )


def fsdp_spec(path: str) -> P:
    """Returns how a parameter is split over the axes of TOKENS."""
    return P(*(axis if axis == FSDP else None for axis in spec_of(path)))


def gather(params: Mapping[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    """Returns the parameters gathered over fsdp, as the model uses them; in `split_over_tokens`.

    Weights of matrix products are gathered in the compute `dtype`. Norms and embeddings keep
    theirs: the model uses them in float32, and an embedding's gradient adds up many tokens.
    """

    def one(path: str, value: jax.Array) -> jax.Array:
        value = value.astype(dtype) if weight_of(path).inputs else value
        spec = spec_of(path)
        if FSDP not in spec:
            return value
        return jax.lax.all_gather(value, FSDP, axis=spec.index(FSDP), tiled=True)

    return {path: one(path, value) for path, value in params.items()}


def sum_over(axes: Sequence[str], tree: Any) -> Any:
    """Returns the sum over mesh axes; the arrays themselves if these have one device.

    XLA keeps a sum over one device and copies what goes into it, and refuses to compile it where
    tensor splits the array.
    """
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    return jax.lax.psum(tree, tuple(axes)) if devices > 1 else tree


def scatter(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the sum of all devices' gradients, split as parameters; in `split_over_tokens`."""

    def one(path: str, value: jax.Array) -> jax.Array:
        spec = spec_of(path)
        if FSDP not in spec:
            return sum_over(TOKENS, value)
        at = spec.index(FSDP)
        if jax.lax.axis_size(FSDP) > 1:
            value = jax.lax.psum_scatter(value, FSDP, scatter_dimension=at, tiled=True)
        return sum_over((DATA, SEQUENCE), value)

    return {path: one(path, value) for path, value in grads.items()}


def place(
    read: Callable[[str], np.ndarray], shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns sharded arrays {path: array}; each process passes only its devices' parts to jax."""
    out = {}
    for path, leaf in shapes.items():
        value = np.asarray(read(path), leaf.dtype)
        out[path] = put(value, shardings[path])
    return out


# Batches.


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of ways the sequences of a micro-batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def padded_batch_size(micro_batch_size: int, mesh: Mesh) -> int:
    """Returns micro_batch_size rounded up to a multiple of the shards."""
    shards = batch_shards(mesh)
    return -(-micro_batch_size // shards) * shards


def local_slots(size: int, mesh: Mesh) -> np.ndarray:
    """Returns the indices of a micro-batch's `size` sequences that this process holds, in order."""
    indices = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in indices.values()]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every array of a batch, [A, B, ...]."""
    return NamedSharding(mesh, P(None, BATCH))


def to_devices(
    arrays: Mapping[str, np.ndarray], local: np.ndarray, size: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Returns global arrays [A, size, ...] from this process's part of them, [A, local, ...]."""
    sharding = batch_sharding(mesh)

    def one(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], size, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(size)
            first = int(np.searchsorted(local, start))
            return array[:, first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: one(array) for name, array in arrays.items()}


def part_of(x_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (a device's part [B, L/n] of an array, the part's first index), over `sequence`."""
    length = x_BL.shape[1] // jax.lax.axis_size(SEQUENCE)
    first = jax.lax.axis_index(SEQUENCE) * length
    return jax.lax.dynamic_slice_in_dim(x_BL, first, length, axis=1), first


def at_positions(hidden_BLD: jax.Array, positions_BP: jax.Array) -> jax.Array:
    """Returns a device's share of the hidden states at predicted positions, [B, P/n, D].

    Called under shard_map over the n devices of `sequence`: hidden_BLD is a device's part of the
    tokens, positions_BP are all positions in the complete sequences. Every state is one device's
    value plus zeros, so that the sum rounds nothing.
    """
    length, parts = hidden_BLD.shape[1], jax.lax.axis_size(SEQUENCE)
    index_BP = positions_BP - jax.lax.axis_index(SEQUENCE) * length
    mine_BP = (index_BP >= 0) & (index_BP < length)
    index_BP = jnp.where(mine_BP, index_BP, 0)
    x_BPD = jnp.take_along_axis(hidden_BLD, index_BP[..., None], axis=1)
    if parts == 1:
        return x_BPD
    x_BPD = jnp.where(mine_BP[..., None], x_BPD, 0)
    return jax.lax.psum_scatter(x_BPD, SEQUENCE, scatter_dimension=1, tiled=True)
