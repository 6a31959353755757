"""The processes of a run: how they find each other and what they agree on."""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

import modernbert_jax

T = TypeVar("T")
_WEEK_MS = 7 * 24 * 3600 * 1000


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a multi-host run find each other (jax.distributed.initialize)."""

    coordinator: str | None = None
    """HOST:PORT of process 0; None detects it from Cloud TPU, SLURM or Open MPI."""
    count: int | None = None  # Number of processes; None detects it from the launcher.
    index: int | None = None  # Index of this process, from 0; None detects it from the launcher.
    heartbeat_seconds: int = 100
    """The run ends on all processes when one has been silent for this many seconds."""


def connect(hosts: Hosts) -> None:
    """Calls jax.distributed.initialize() for several processes; before any other jax call.

    Explicit settings come first (coordinator, count and index, all three). Otherwise Cloud TPU,
    SLURM (`srun`) and Open MPI provide them; a single process needs none. Raises ValueError if only
    some are given.
    """
    given = (hosts.coordinator, hosts.count, hosts.index)
    heartbeat: dict[str, Any] = {"heartbeat_timeout_seconds": hosts.heartbeat_seconds}
    if hosts.coordinator and hosts.count is not None and hosts.index is not None:
        if not 0 <= hosts.index < hosts.count:
            raise ValueError(f"hosts: expected index 0 to {hosts.count - 1}, got {hosts.index}")
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.index, **heartbeat)
    elif any(value is not None for value in given):
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


_AGREEMENT_BYTES = 1 << 15


def agree(items: Mapping[str, Any]) -> None:
    """Raises ValueError on every process if one has another value for an item.

    The line names the process and the item. Values are compared by a hash of their JSON text, and
    the exchange has one size whatever the processes hold, since Gloo aborts on different shapes.
    """
    if jax.process_count() == 1:
        return
    barrier("agree")
    marks = {name: _short_hash(value) for name, value in items.items()}
    text = json.dumps(marks).encode()
    assert len(text) <= _AGREEMENT_BYTES, len(text)
    padded = np.frombuffer(text.ljust(_AGREEMENT_BYTES), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    first, *others = (json.loads(row.tobytes()) for row in everyone)
    for index, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"hosts: process {index} differs from process 0 in {name}; start all "
                    "processes with the same flags, files and code"
                )


def code_digest() -> str:
    """Returns a hash of the sources of this project that this process would import."""
    digest = hashlib.sha256()
    for root in (pathlib.Path(modernbert_jax.__file__).parent, pathlib.Path(__file__).parents[1]):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _short_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_shared(workdir: Any) -> None:
    """Raises ValueError on every process if one does not see the first one's files in `workdir`."""
    if jax.process_count() == 1:
        return
    probe = workdir / f".seen-{from_first(random.getrandbits(60))}"
    if is_first():
        probe.write_text("")
    barrier("probe written")
    sees = np.asarray(multihost_utils.process_allgather(np.int32(probe.exists())))
    if is_first():
        probe.unlink()
    if not sees.all():
        raise ValueError(
            f"workdir {workdir}: process {int(sees.argmin())} does not see the files of process 0; "
            "use a folder on a file system that all hosts share, or a bucket"
        )


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
