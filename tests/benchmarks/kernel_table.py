"""Writes what libtpu schedules for the parts of our TPU kernels, for `python -m train plan`.

    python -m tests.benchmarks.kernel_table [TOPOLOGY ...]

No TPU is needed. Run it after a change of modernbert_jax/attention/pallas_tpu.py: the table has a
digest of that file. Entries of other topologies are kept while the digest is the same.
tests/benchmarks/tpu_static.py says what the parts are.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from modernbert_jax.attention import make_bounds, pallas_tpu
from tests.benchmarks import tpu_static
from train.plan.kernels import TABLE, Costs, source_digest

LENGTH = 8192
HEADS = 12
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")


def kernel_costs(name: str, plan, schedule: tpu_static.Schedule) -> Costs:
    tile, row, visits = tpu_static.parts(name, schedule, plan)
    return Costs(
        plan.tiles.queries, plan.tiles.keys, schedule.step, tile, row, LENGTH, tuple(visits)
    )


def device_costs(mesh: Mesh, generation: pallas_tpu.Generation) -> dict[str, Costs]:
    found = {}
    for window in (None, tpu_static.WINDOW):
        q, schedules = tpu_static.both_passes(mesh, HEADS, LENGTH, window)
        bounds = make_bounds(jnp.ones((1, LENGTH), jnp.int32), window)
        for name in ("forward", "backward"):
            sizes = [getattr(generation, f"{name}_{kind}") for kind in ("global", "local")]
            plan = pallas_tpu._plan(q, bounds, *sizes)
            kernel = f"bounded_{name}_{'local' if plan.local else 'global'}"
            found[kernel] = kernel_costs(name, plan, schedules[kernel])
    return found


def main() -> None:
    now = {"digest": source_digest(), "jax": jax.__version__}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if any(table.get(name) != value for name, value in now.items()):
        table = {**now, "devices": {}}
    for topology in sys.argv[1:] or TOPOLOGIES:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        kind = devices[0].device_kind
        mesh = Mesh(np.array(devices[:1]), ("device",))
        costs = device_costs(mesh, pallas_tpu.GENERATIONS[kind])
        table["devices"][kind] = {name: dataclasses.asdict(one) for name, one in costs.items()}
        print(kind, *(f"  {name}: {one}" for name, one in costs.items()), sep="\n", flush=True)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
