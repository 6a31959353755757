"""How parameters are split over a mesh, by the letters of their axes.

The first D of a matrix is split over the mesh axis `fsdp`; heads, MLP and vocabulary over `tensor`.
Everything else is whole on every device, as are all parameters on a mesh without these axes.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from modernbert_jax.weights import find_weight, weight_of

FSDP, TENSOR = "fsdp", "tensor"

_TENSOR_LETTERS = "VHF"

Model = TypeVar("Model", bound=nnx.Module)


def spec_of(path: str) -> P:
    """Returns the partition spec of a parameter. Raises ValueError for an unknown path."""
    axes = weight_of(path).axes
    if axes == "D":
        return P()
    spec = [TENSOR if axis in _TENSOR_LETTERS else None for axis in axes]
    if "D" in axes:
        spec[axes.index("D")] = FSDP
    return P(*spec)


def param_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns {path: sharding} of the parameters, which their moments share.

    A parameter that ModernBERT does not have, one of your own class, is not split. Raises
    ValueError for a size that its mesh axis does not divide.
    """
    out = {}
    for path, leaf in shapes.items():
        spec = spec_of(path) if find_weight(path) else P()
        spec = P(*(axis if axis in mesh.shape else None for axis in spec))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                fitting = [n for n in range(1, mesh.shape[axis]) if size % n == 0]
                raise ValueError(
                    f"{path} of shape {tuple(leaf.shape)}: expected {size} to be a multiple of "
                    f"mesh axis {axis} = {mesh.shape[axis]}; the next smaller divisor is "
                    f"{fitting[-1]}"
                )
        out[path] = NamedSharding(mesh, spec)
    return out


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns a sharded array; each process passes only its devices' parts to jax."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shard_params(model: Model, mesh: Mesh) -> Model:
    """Moves a model's arrays to a mesh, in place, and returns the model.

    The mesh's axes may be explicit (the default of `jax.make_mesh`) or auto. Over `fsdp` parameters
    are split by their model dimension, over `tensor` by heads, MLP and vocabulary; over every other
    axis, such as `data`, they are whole. Split the batch yourself, over its first axis:
    `jax.device_put(ids, NamedSharding(mesh, P("data")))`. The outputs are split as the inputs are.
    On a TPU or GPU also pass `attention=modernbert_jax.attention.sharded(mesh, rows="data")`, since
    its kernels are not partitioned by themselves. An eager jax.grad on explicit axes needs
    `jax.set_mesh(mesh)`; a compiled one does not. Make the optimizer afterwards, so that its state
    is split as the parameters are. Raises ValueError for a size that its mesh axis does not divide.
    """
    leaves = nnx.to_flat_state(nnx.state(model))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in leaves}
    shapes = {key: leaf.get_value() for key, (_, leaf) in flat.items()}
    shardings = param_shardings(shapes, mesh)
    moved = {
        path: leaf.replace(jax.device_put(leaf.get_value(), shardings[key]))
        for key, (path, leaf) in flat.items()
    }
    nnx.update(model, nnx.from_flat_state(moved))
    return model
