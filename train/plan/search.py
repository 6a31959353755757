"""Chooses what a configuration leaves open: the mesh and the number of gradient accumulation steps,
and in a search the rematerialization policy.

The mesh has fsdp over all devices up to 16, data over the rest, and tensor 1. Split 16 ways,
parameters and moments of the large model take 0.3 GB per device; more ways would only lengthen the
rings that gather the weights. tensor communicates activations in every layer, which models this
narrow never need.

Of the possible numbers of gradient accumulation steps with at most 65,536 tokens per device and
micro-batch, which keep the matrix units busy, the one with the least padding is chosen, then the
smallest. If that does not fit, smaller micro-batches are tried.

A search takes the policies that recompute least first. Fast compiles find the largest micro-batch
that fits each; the first two policies for which one fits are compiled in full, and the one with the
shorter step is chosen. Where much of a step would be empty, sequences split into parts are compiled
with that policy as well.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import numpy as np
from jax.sharding import Mesh

from ..common.flops import hardware_flops
from ..common.sharding import MeshShape, count_slices
from ..pretrain.config import TrainConfig

ENOUGH_TOKENS = 65_536  # per device and micro-batch
MAX_FSDP = 16
MAX_EMPTY = 0.03  # the share of a step's sequences that may be empty without a suggestion
FINALISTS = 2


def default_mesh(hidden_size: int, devices: Sequence[Any]) -> MeshShape:
    """fsdp over the largest number up to 16 that divides hidden size and devices of a slice; data
    the rest."""
    size = len(devices) // count_slices(devices)
    ways = range(1, min(MAX_FSDP, size) + 1)
    return MeshShape(fsdp=max(n for n in ways if size % n == hidden_size % n == 0))


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """A step of `global_batch_size` sequences, computed as `gradient_accumulation_steps`
    micro-batches, each padded to `padded_micro_batch_size`: `per_device_batch_size` per device."""

    global_batch_size: int
    gradient_accumulation_steps: int
    padded_micro_batch_size: int
    per_device_batch_size: int

    @property
    def padding(self) -> float:
        """The share of computed sequences that are padding, because the devices do not divide the
        micro-batch."""
        computed = self.gradient_accumulation_steps * self.padded_micro_batch_size
        return 1.0 - self.global_batch_size / computed


def batch_splits(global_batch_size: int, shards: int) -> list[BatchSplit]:
    """A split for every possible number of gradient accumulation steps, the largest micro-batches
    first. `shards` is the number of ways a micro-batch is split; the last micro-batch of a step may
    be smaller than the others."""
    size = global_batch_size
    steps = [n for n in range(1, size + 1) if _ceil(size, _ceil(size, n)) == n]
    per_device = {n: _ceil(_ceil(size, n), shards) for n in steps}
    return [BatchSplit(size, n, per_device[n] * shards, per_device[n]) for n in steps]


def _ceil(n: int, divisor: int) -> int:
    return -(-n // divisor)


def least_padded(splits: Sequence[BatchSplit]) -> BatchSplit:
    """The split with the least padding, then with the fewest micro-batches."""
    return min(splits, key=lambda split: (split.padding, split.gradient_accumulation_steps))


def first_choice(splits: Sequence[BatchSplit], sequence_length: int) -> BatchSplit:
    """The split to try first: with at most ENOUGH_TOKENS or, if none has, the smallest ones."""
    limit = max(ENOUGH_TOKENS // sequence_length, splits[-1].per_device_batch_size)
    return least_padded([s for s in splits if s.per_device_batch_size <= limit])


def smaller(splits: Sequence[BatchSplit], split: BatchSplit) -> BatchSplit | None:
    """The split to try after one that did not fit; None if there is none."""
    left = [s for s in splits if s.per_device_batch_size < split.per_device_batch_size]
    return least_padded(left) if left else None


def largest(splits: Sequence[BatchSplit], fits: Callable[[BatchSplit], bool]) -> int:
    """The most sequences per device that fit, by bisection; 0 if none do."""
    sizes = sorted({split.per_device_batch_size for split in splits})
    low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high + 1) // 2
        at = least_padded([s for s in splits if s.per_device_batch_size == sizes[middle]])
        low, high = (middle, high) if fits(at) else (low, middle)
    return sizes[low] if low >= 0 else 0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a search chooses from."""

    mesh: MeshShape
    remat: str
    split: BatchSplit

    def __str__(self) -> str:
        split = self.split
        parts = f", sequences in {self.mesh.sequence} parts" if self.mesh.sequence > 1 else ""
        return (
            f"remat {self.remat}, {split.gradient_accumulation_steps} x "
            f"{split.padded_micro_batch_size} sequences{parts}"
        )


def policies(config: TrainConfig) -> list[str]:
    """The policies for --remat, those that recompute least first."""

    def recomputed(remat: str) -> float:
        length = config.sequence_length
        lengths = np.full(1, length)
        return hardware_flops(
            config.model, lengths, sequences=1, sequence_length=length, predictions=1, remat=remat
        )

    return sorted(get_args(get_type_hints(TrainConfig)["remat"]), key=recomputed)


def search(
    meshes: Mapping[MeshShape, Sequence[BatchSplit]],
    remats: Sequence[str],
    sequence_length: int,
    fits: Callable[[Candidate], bool],
    seconds: Callable[[Candidate], float | None],
) -> tuple[Candidate | None, str]:
    """Returns (the candidate with the shortest step, the reason in one line); None if none fits.

    meshes: each with its possible splits; after the first one, only the policy that was best there
    is tried. remats: in the order to try. fits: asked of many candidates. seconds: per step, asked
    of FINALISTS for the first mesh and of one for each other; None if it does not fit after all.
    """
    times: dict[Candidate, float] = {}
    failed = []
    for mesh, splits in meshes.items():
        if times:
            remats = [min(times, key=lambda candidate: times[candidate]).remat]
        tried = 0
        for remat in remats:
            sizes = _sizes_that_fit(mesh, remat, splits, sequence_length, fits)
            while sizes:
                candidate = Candidate(mesh, remat, least_padded(sizes))
                if (found := seconds(candidate)) is not None:
                    times[candidate] = found
                    tried += 1
                    break
                most = candidate.split.per_device_batch_size - 1
                sizes = [split for split in sizes if split.per_device_batch_size <= most]
            else:
                failed.append(remat)
            if tried == FINALISTS:
                break
    if not times:
        return None, f"nothing fits, whether remat is {', '.join(remats)}"
    ranking = sorted(times, key=lambda candidate: times[candidate])
    reason = "; ".join(f"{one}: {times[one]:.3f} s per step" for one in ranking)
    return ranking[0], reason + "".join(f"; remat {remat} does not fit" for remat in failed)


def _sizes_that_fit(
    mesh: MeshShape,
    remat: str,
    splits: Sequence[BatchSplit],
    sequence_length: int,
    fits: Callable[[Candidate], bool],
) -> list[BatchSplit]:
    """The splits that fit, of those with at most ENOUGH_TOKENS."""
    limit = ENOUGH_TOKENS * mesh.sequence // sequence_length
    limit = max(limit, splits[-1].per_device_batch_size)
    allowed = [split for split in splits if split.per_device_batch_size <= limit]
    most = largest(allowed, lambda split: fits(Candidate(mesh, remat, split)))
    return [split for split in allowed if split.per_device_batch_size <= most]


def fullest(config: TrainConfig, mesh: Mapping[str, int]) -> tuple[int, float]:
    """(into how many parts to split each sequence, what is then empty of a step).

    The smallest number that leaves at most MAX_EMPTY, or the least; tensor and sequence together
    stay within 16 ways. mesh: sizes by axis.
    """
    devices = mesh["data"] * mesh["fsdp"] * mesh["sequence"]
    parts = [
        n
        for n in range(1, 16 // mesh["tensor"] + 1)
        if devices % (n * mesh["fsdp"]) == config.sequence_length % n == 0
        and config.sequence_length // n >= config.model.window
    ]
    batch_size = config.global_batch_size
    empty = {n: least_padded(batch_splits(batch_size, devices // n)).padding for n in parts}
    best = min(parts, key=lambda n: (max(empty[n], MAX_EMPTY), empty[n] > MAX_EMPTY, n))
    return best, empty[best]


def fuller(config: TrainConfig, mesh: Mapping[str, int]) -> list[str]:
    """Flags that leave less of a step empty, with what they leave. mesh: sizes by axis."""
    devices = mesh["data"] * mesh["fsdp"] * mesh["sequence"]
    best, empty = fullest(config, mesh)
    flags = "" if best == mesh["sequence"] else f"--mesh.sequence {best}"
    found = [f"{flags}: {empty:.1%}"] if flags else []
    if empty:
        size = config.rounded(devices // best)[0].global_batch_size
        flags = f"{flags} --round-batch".strip()
        found.append(f"{flags}: 0.0%, with {size} sequences per step")
    return found


def suggestions(config: TrainConfig, mesh: Mesh, split: BatchSplit) -> list[str]:
    """Flags that make a step take less memory, the cheapest first."""
    found = []
    shards = split.padded_micro_batch_size // split.per_device_batch_size
    if less := smaller(batch_splits(split.global_batch_size, shards), split):
        steps = less.gradient_accumulation_steps
        found.append(f"smaller micro-batches: --gradient-accumulation-steps {steps}")
    if config.remat != "layers":
        found.append("rematerialized layers in the backward pass: --remat layers")
    width, fsdp, data = config.model.hidden_size, mesh.shape["fsdp"], mesh.shape["data"]
    wider = [n for n in range(2, data + 1) if data % n == width % (n * fsdp) == 0]
    if wider:
        found.append(f"parameters and moments split more ways: --mesh.fsdp {fsdp * wider[0]}")
    if config.loss_chunk > 256:
        found.append(f"fewer logits in memory: --loss-chunk {config.loss_chunk // 4}")
    return found or ["devices with more memory, or shorter sequences: --sequence-length"]
