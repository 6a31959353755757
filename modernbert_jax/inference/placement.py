"""Where packed sequences are computed: on jax's default device, on another one, or on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax.attention import attention as default_attention, check, sharded
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.layers import Op


class Placement:
    """The devices that share packed sequences.

    attention: the attention function for them. sequences: the number of sequences per step, one for
    each device of the mesh's axis "data". mesh: None on jax's default device.
    """

    def __init__(self, device: Any, mesh: Mesh | None, config: ModernBertConfig):
        """Raises ValueError if a device and a mesh are given. config: of the model."""
        # A new mesh, because the axes may be explicit and these arrays are placed by the compiler.
        mesh = mesh and Mesh(mesh.devices, mesh.axis_names)
        if device is not None:
            if mesh is not None:
                raise ValueError("device, mesh: expected one of them, got both")
            mesh = Mesh(np.array([device]), ("data",))
        self.mesh: Mesh | None = mesh
        self.attention: Op = default_attention if mesh is None else sharded(mesh, rows="data")
        self.sequences: int = 1 if mesh is None else mesh.shape["data"]
        if mesh is not None:  # may consist of other devices than the default one
            check(mesh.local_devices[0], dtype=config.dtype, head_dim=config.head_dim)

    def put_params(self, params: Any) -> Any:
        """Returns weights, for all devices."""
        if self.mesh is None:
            return params
        return jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))

    def put_rows(self, *arrays_BL: Any) -> Any:
        """Returns arrays of packed sequences, each device's own."""
        if self.mesh is None:
            return arrays_BL
        return jax.device_put(arrays_BL, NamedSharding(self.mesh, PartitionSpec("data", None)))
