"""The processes of a run: how they find each other and what they agree on."""

import dataclasses
import glob
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

T = TypeVar("T")
_WEEK_MS = 7 * 24 * 3600 * 1000


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a multi-host run find each other (jax.distributed.initialize)."""

    coordinator: str = ""
    """HOST:PORT of process 0; empty detects it from Cloud TPU, SLURM or Open MPI."""
    count: int = 0  # Number of processes; 0 detects it from the launcher.
    index: int = -1  # Index of this process, from 0; -1 detects it from the launcher.
    heartbeat_seconds: int = 100
    """The run ends on all processes when one has been silent for this many seconds."""


def connect(hosts: Hosts) -> None:
    """Calls jax.distributed.initialize() for several processes; before any other jax call.

    Explicit settings come first (coordinator, count and index, all three). Otherwise Cloud TPU,
    SLURM (`srun`) and Open MPI provide them; a single process needs none. Raises ValueError if only
    some are given.
    """
    given = (bool(hosts.coordinator), hosts.count > 0, hosts.index >= 0)
    heartbeat: dict[str, Any] = {"heartbeat_timeout_seconds": hosts.heartbeat_seconds}
    if all(given):
        if hosts.index >= hosts.count:
            raise ValueError(f"hosts: expected index 0 to {hosts.count - 1}, got {hosts.index}")
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.index, **heartbeat)
    elif any(given):
        raise ValueError(
            "hosts: expected --hosts.coordinator HOST:PORT, --hosts.count and --hosts.index "
            "together, or none of them"
        )
    elif _several():
        jax.distributed.initialize(**heartbeat)


def _several() -> bool:
    """Returns whether the environment describes more than one process."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if env.get("JAX_PLATFORMS") == "cpu":
        return False
    # On a Cloud TPU jax asks the metadata server, which is right for a single worker as well.
    return bool(glob.glob("/dev/accel*") or env.get("TPU_WORKER_HOSTNAMES"))


def is_first() -> bool:
    """Returns whether this process writes the files that are written once."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints a line on the first process."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Waits for all processes, however long they need; a dead one ends the wait by its heartbeat.

    Through the coordination service: a collective of Gloo, the backend on CPUs, gives up after 30
    seconds while it connects, which no setting changes.
    """
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=_WEEK_MS)


def first_then_others(name: str, make: Callable[[], T]) -> T:
    """Calls `make` on the first process and then on the others, which find its work done."""
    if is_first():
        made = make()
        barrier(name)
        return made
    barrier(name)
    return make()


def from_first(value: int) -> int:
    """Returns the first process's integer on every process."""
    if jax.process_count() == 1:
        return value
    # In two halves, since jax's integers have 32 bits.
    halves = np.asarray([value >> 31, value & 0x7FFFFFFF], np.int32)
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return (int(high) << 31) | int(low)


def total(values: Any) -> np.ndarray:
    """Returns the sum over processes of a few numbers each; float64 sums of float32 values."""
    values = np.asarray(values, np.float64)
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values.astype(np.float32)), float).sum(0)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns a global array in full on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
