"""The token look-up under a mesh: rows split over data and fsdp, the vocabulary over tensor."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from ..common.sharding import DATA, FSDP, ROWS, TENSOR


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(
    mesh: Mesh, pad_token_id: int | None, weight_VD: jax.Array, ids_BL: jax.Array
) -> jax.Array:
    """embeds_BLD of ids_BL. No gradient passes through pad_token_id (torch's padding_idx).

    Left to itself the partitioner turns the gradient's scatter-add into a copy of all rows on every
    device; here each device adds up its own rows, and the sums meet once, split over fsdp.
    """
    return _forward(mesh, pad_token_id, weight_VD, ids_BL)[0]


def _local(weight_VD: jax.Array, ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rows of this device's part of the table, which of them are its own)."""
    places_BL = ids_BL - jax.lax.axis_index(TENSOR) * weight_VD.shape[0]
    own_BL = (places_BL >= 0) & (places_BL < weight_VD.shape[0])
    return jnp.where(own_BL, places_BL, 0), own_BL


def _forward(mesh, pad_token_id, weight_VD, ids_BL):
    def local(weight_VD, ids_BL):
        places_BL, own_BL = _local(weight_VD, ids_BL)
        x_BLD = jnp.where(own_BL[..., None], jnp.take(weight_VD, places_BL, axis=0), 0.0)
        return jax.lax.psum(x_BLD, TENSOR)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(TENSOR, None), P(ROWS, None)),
        out_specs=P(ROWS, None, None),
        check_vma=False,
    )
    return run(weight_VD, ids_BL), (weight_VD, ids_BL)


def _backward(mesh, pad_token_id, saved, d_embeds_BLD):
    def local(weight_VD, ids_BL, d_BLD):
        places_BL, own_BL = _local(weight_VD, ids_BL)
        if pad_token_id is not None:
            own_BL &= ids_BL != pad_token_id
        d_BLD = jnp.where(own_BL[..., None], d_BLD.astype(jnp.float32), 0.0)
        d_VD = jnp.zeros(weight_VD.shape, jnp.float32).at[places_BL].add(d_BLD)
        d_VD = jax.lax.psum_scatter(d_VD, FSDP, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_VD, DATA)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(TENSOR, None), P(ROWS, None), P(ROWS, None, None)),
        out_specs=P(TENSOR, FSDP),
        check_vma=False,
    )
    weight_VD, ids_BL = saved
    return run(weight_VD, ids_BL, d_embeds_BLD).astype(weight_VD.dtype), None


look_up.defvjp(_forward, _backward)
