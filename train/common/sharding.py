"""Which part of which array lies on which device: one table for the weights, one line for the rows.

The mesh has three axes. Rows of a batch are split over `data` and `fsdp`; parameters and moments
over `fsdp`, and gathered over it once a step; heads, MLP and vocabulary over `tensor`. One device
is a mesh of 1 x 1 x 1: there is no other path.
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

from modernbert_jax.weights import weight_of

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
ROWS = (DATA, FSDP)

# The mesh axis of an axis letter; the first D of a matrix is split over fsdp.
_TENSOR_AXES = "VHF"


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each axis of the mesh."""

    data: int = -1
    """Copies of the model; -1 uses the devices that fsdp and tensor leave."""
    fsdp: int = 1
    """Number of ways parameters and moments are split; sequences are split over data and fsdp."""
    tensor: int = 1
    """Number of ways attention heads, MLP and vocabulary are split."""


def make_mesh(shape: MeshShape | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of the first ones. data = -1 takes what fsdp and tensor leave.

    Slices of a multi-slice TPU job are joined by `data`, the axis that exchanges least. Raises
    ValueError where the axes do not make up the devices.
    """
    shape = shape or MeshShape()
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    fsdp, tensor = shape.fsdp, shape.tensor
    data = n // max(fsdp * tensor, 1) if shape.data == -1 else shape.data
    if 0 < data * fsdp * tensor < n and len({d.process_index for d in devices}) == 1:
        devices = devices[: data * fsdp * tensor]  # one process may leave some idle
        n = len(devices)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != n:
        raise ValueError(
            f"mesh: expected data x fsdp x tensor to be the {n} devices, got "
            f"{shape.data} x {fsdp} x {tensor}; --mesh.data -1 takes what the others leave"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if data % slices:
            raise ValueError(f"mesh: data {data} is no multiple of the {slices} slices")
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, tensor), (slices, 1, 1), devices
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def spec_of(path: str) -> P:
    """The partition spec of a parameter. Raises ValueError for a path that no ModernBERT has."""
    axes = weight_of(path).axes
    if axes == "D":
        return P()
    spec = [TENSOR if axis in _TENSOR_AXES else None for axis in axes]
    if "D" in axes:
        spec[axes.index("D")] = FSDP
    return P(*spec)


def param_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> where a parameter (and each of its moments) lies.

    Raises ValueError for a size that its mesh axis does not divide.
    """
    out = {}
    for path, leaf in shapes.items():
        spec = spec_of(path)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                fitting = [n for n in range(1, mesh.shape[axis]) if size % n == 0]
                raise ValueError(
                    f"{path} of shape {tuple(leaf.shape)}: {size} is no multiple of mesh axis "
                    f"{axis} = {mesh.shape[axis]}; the next smaller that fits is {fitting[-1]}"
                )
        out[path] = NamedSharding(mesh, spec)
    return out


def gather(params: Mapping[str, jax.Array], mesh: Mesh, dtype: Any) -> dict[str, jax.Array]:
    """The parameters as the model uses them: whole over fsdp, still split over tensor.

    Weights of matrix products travel in the compute `dtype`. Norms and embeddings stay as they are:
    the model uses them in float32, and a look-up's gradient adds up many tokens.
    """

    def one(path: str, value: jax.Array) -> jax.Array:
        spec = P(*(None if axis == FSDP else axis for axis in spec_of(path)))
        if weight_of(path).inputs:
            value = value.astype(dtype)
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

    return {path: one(path, value) for path, value in params.items()}


def scatter(grads: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Gradients of gathered parameters in float32, split as the parameters are."""
    return {
        path: jax.lax.with_sharding_constraint(
            g.astype(jnp.float32), NamedSharding(mesh, spec_of(path))
        )
        for path, g in grads.items()
    }


# Rows.


def row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a micro-batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def padded_rows(micro_batch_size: int, mesh: Mesh) -> int:
    """Row slots of a micro-batch: enough for all of its rows, and a multiple of the shards."""
    shards = row_shards(mesh)
    return -(-micro_batch_size // shards) * shards


def local_slots(slots: int, mesh: Mesh) -> np.ndarray:
    """Which of a micro-batch's row slots this process's devices hold, in order."""
    where = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((slots,))
    return np.unique(np.concatenate([np.arange(slots)[index] for index in where.values()]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch, [A, slots, ...]."""
    return NamedSharding(mesh, P(None, ROWS))


def to_devices(
    arrays: Mapping[str, np.ndarray], own: np.ndarray, slots: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Global arrays [A, slots, ...] of which this process gives its `own` slots, [A, own, ...]."""
    sharding = batch_sharding(mesh)

    def one(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0], slots, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(slots)
            first = int(np.searchsorted(own, start))
            return array[:, first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: one(array) for name, array in arrays.items()}


def place(
    read: Callable[[str], np.ndarray], shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Arrays made where they belong: each process hands over only its devices' parts."""
    out = {}
    for path, leaf in shapes.items():
        value = np.asarray(read(path), leaf.dtype)
        out[path] = jax.make_array_from_callback(
            tuple(leaf.shape), shardings[path], lambda index, value=value: value[index]
        )
    return out
