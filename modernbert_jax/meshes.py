"""Meshes with explicit axes, the default of `jax.make_mesh`.

There the type of an array includes its sharding, and an operation whose result could be split in
several ways is an error. Models and attention leave these choices to the partitioner instead, as
they do on a mesh with auto axes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard, use_abstract_mesh


def explicit_mesh(*trees: Any) -> Any:
    """Returns the mesh with explicit axes of `jax.set_mesh` or of the arrays, or None."""
    arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def with_auto_axes(run: Callable[..., Any], rows: Any, *args: Any) -> Any:
    """Returns run(*args), in which the partitioner decides about the explicit axes of a mesh.

    The arrays [B, ...] of the result are split over their first axis as `rows` [B, ...] is, and
    scalars are whole. Without explicit axes this is only the call.
    """
    mesh = explicit_mesh(rows, args)
    if mesh is None:
        return run(*args)
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    split = jax.typeof(rows).sharding.spec[:1] if isinstance(rows, jax.Array) else ()

    def enter(x: Any) -> Any:
        return reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x

    def leave(x: jax.Array) -> jax.Array:
        return reshard(x, NamedSharding(mesh, PartitionSpec(*split) if x.ndim else PartitionSpec()))

    with use_abstract_mesh(auto):
        out = run(*jax.tree.map(enter, args))
    return jax.tree.map(leave, out)
