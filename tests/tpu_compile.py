"""Compiles attention for an absent TPU and prints one line of JSON per case.

Run it in a separate process: libtpu holds a lock and reads its flags once.

    python tests/tpu_compile.py v6e:2x2 base:8192:64 large:1024:none
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from modernbert_jax.attention import make_bounds, pallas_tpu  # noqa: E402

HEADS = {"base": 12, "large": 16}
HEAD_DIM = 64


def one_device_mesh(topology: str) -> Mesh:
    """The first device of an absent TPU slice, as a mesh of one."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:1]), ("device",))


def compile_case(mesh: Mesh, heads: int, length: int, window: int | None):
    """Compiles the kernels and their `jax.vjp` for [1, length, heads, 64] in bfloat16."""
    sharding = NamedSharding(mesh, PartitionSpec())
    qkv = jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.bfloat16, sharding=sharding)
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)

    def step(q, k, v, d_out, segment_ids_BL):
        bounds = make_bounds(segment_ids_BL, window)

        def run(q, k, v):
            return pallas_tpu.attention(q, k, v, bounds, scale=HEAD_DIM**-0.5)

        out, pull = jax.vjp(run, q, k, v)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step).trace(qkv, qkv, qkv, qkv, segment_ids)
        return lowered.lower(lowering_platforms=("tpu",)).compile()


def main(topology: str, *cases: str) -> None:
    mesh = one_device_mesh(topology)
    for case in cases:
        size, length, window = case.split(":")
        window = None if window == "none" else int(window)
        compiled = compile_case(mesh, HEADS[size], int(length), window)
        found = {
            "case": case,
            "device_kind": mesh.devices.flat[0].device_kind,
            "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
            "qkv_bytes": 2 * HEADS[size] * int(length) * HEAD_DIM,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
