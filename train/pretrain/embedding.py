"""The token embedding under a mesh: sequences split over data and fsdp, vocabulary over tensor."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from ..common.sharding import BATCH, DATA, FSDP, TENSOR


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(
    mesh: Mesh, pad_token_id: int | None, weight_VD: jax.Array, ids_BL: jax.Array
) -> jax.Array:
    """Returns embeds_BLD of ids_BL. pad_token_id gets no gradient (torch's padding_idx).

    By default the partitioner turns the gradient's scatter-add into a copy of all sequences on
    every device. Here each device adds up its own sequences, and the sums are reduced once, split
    over fsdp.
    """
    return _forward(mesh, pad_token_id, weight_VD, ids_BL)[0]


def _local(weight_VD: jax.Array, ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (indices into this device's part of the table, which ids are in this part)."""
    index_BL = ids_BL - jax.lax.axis_index(TENSOR) * weight_VD.shape[0]
    local_BL = (index_BL >= 0) & (index_BL < weight_VD.shape[0])
    return jnp.where(local_BL, index_BL, 0), local_BL


def _forward(mesh, pad_token_id, weight_VD, ids_BL):
    def local(weight_VD, ids_BL):
        index_BL, local_BL = _local(weight_VD, ids_BL)
        x_BLD = jnp.where(local_BL[..., None], jnp.take(weight_VD, index_BL, axis=0), 0.0)
        return jax.lax.psum(x_BLD, TENSOR)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(TENSOR, None), P(BATCH, None)),
        out_specs=P(BATCH, None, None),
        check_vma=False,
    )
    return run(weight_VD, ids_BL), (weight_VD, ids_BL)


def _backward(mesh, pad_token_id, saved, d_embeds_BLD):
    def local(weight_VD, ids_BL, d_BLD):
        index_BL, local_BL = _local(weight_VD, ids_BL)
        if pad_token_id is not None:
            local_BL &= ids_BL != pad_token_id
        d_BLD = jnp.where(local_BL[..., None], d_BLD.astype(jnp.float32), 0.0)
        d_VD = jnp.zeros(weight_VD.shape, jnp.float32).at[index_BL].add(d_BLD)
        d_VD = jax.lax.psum_scatter(d_VD, FSDP, scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_VD, DATA)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(TENSOR, None), P(BATCH, None), P(BATCH, None, None)),
        out_specs=P(TENSOR, FSDP),
        check_vma=False,
    )
    weight_VD, ids_BL = saved
    return run(weight_VD, ids_BL, d_embeds_BLD).astype(weight_VD.dtype), None


look_up.defvjp(_forward, _backward)
