"""Compile a training step for devices you do not have, and report what it needs.

Memory and collectives are the compiler's and FLOPs are counted. The time of a step lies between a
roofline of the compiled program and the compiler's own estimate of its cycles, which exists for
TPUs only; nothing was measured. The mesh and the number of gradient accumulation steps are chosen
unless you set them. The exit code is 1 if the step does not fit. Every field of the configuration
is a flag, as for pretrain.

    python -m train plan --config bioclinical_base --topology v5e:4x4
    python -m train plan --config bioclinical_large --topology v5e:4x4 --mesh.fsdp 16 --search
    python -m train.plan.install_cuda --target cuda/
    python -m train plan --config demo --topology h100:1x1x8 --cuda-compiler cuda/ --json plan.json
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from jax.sharding import Mesh

from ..common.flops import PEAK
from ..common.sharding import MeshShape, batch_shards, make_mesh
from ..pretrain.config import TrainConfig
from . import search, topologies
from .compile import Compiled, compile_step
from .report import Documents, report, step_times


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile for and what to report."""

    topology: str
    """Such as v5e:4x4, v5p:8x8x16 or h100:1x1x8 (slices x hosts x GPUs per host)."""
    cuda_compiler: str | None = None
    """For GPUs: the folder that `python -m train.plan.install_cuda` filled."""
    json: str | None = None
    """Also write the plan to this file."""
    mfu: float | None = None
    """Also report the hours at this model FLOPs utilization, an assumption or a measurement."""
    search: bool = False
    """Choose --remat, --gradient-accumulation-steps and, unless set, --mesh for the shortest step
    that fits; compiles several times."""
    document_tokens: int = 0
    """Mean length of the documents in a sequence; 0: the whole sequence (the most attention)."""
    document_lengths: Literal["equal", "lognormal"] = "equal"
    """Whether all documents have that length, or lognormal ones with sigma 1."""


def plan(
    config: TrainConfig,
    options: Options,
    *,
    gradient_accumulation_steps: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compiles the training step of `config` for the topology and returns the report.

    The mesh is chosen if config.mesh has its defaults, the number of micro-batches if
    `gradient_accumulation_steps` is None; options.search chooses config.remat as well. The step is
    compiled for the phase with the most predictions. log: called with lines of progress.
    `topologies.environment` must be set. Raises ValueError for values that are not possible, for a
    mesh that does not divide the model and for an unknown topology.
    """
    config.validate()
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ValueError(f"mfu: expected above 0 and at most 1, got {options.mfu}")
    if not 0 <= options.document_tokens <= config.sequence_length:
        raise ValueError(
            f"document_tokens: expected 0 to sequence_length {config.sequence_length}, got "
            f"{options.document_tokens}"
        )
    documents = Documents(
        options.document_tokens or config.sequence_length, options.document_lengths
    )
    devices = topologies.devices(options.topology)
    if devices[0].device_kind not in PEAK:
        raise ValueError(
            f"device {devices[0].device_kind!r}: add its peak to PEAK in train/common/flops.py"
        )
    given = config.mesh != MeshShape()
    if not given:
        mesh_shape = search.default_mesh(config.model.hidden_size, devices)
        config = dataclasses.replace(config, mesh=mesh_shape)
    mesh = make_mesh(config.mesh, devices)
    if config.round_batch:
        config, change = config.rounded(batch_shards(mesh) * (gradient_accumulation_steps or 1))
        log(change)
        config.validate()
    phase = max(config.phases, key=lambda phase: phase.mlm_probability)
    splits = {config.mesh: _splits(config, mesh, gradient_accumulation_steps)}
    if options.search and not given:
        parts, _ = search.fullest(config, mesh.shape)
        other = dataclasses.replace(config.mesh, sequence=parts)
        splits[other] = _splits(config, make_mesh(other, devices), gradient_accumulation_steps)

    @functools.cache
    def attempt(candidate: search.Candidate, fast: bool = False) -> Compiled:
        mesh = make_mesh(candidate.mesh, devices)
        return compile_step(_apply(config, candidate), phase, mesh, log, fast=fast)

    def seconds(candidate: search.Candidate) -> float | None:
        compiled = attempt(candidate)
        if compiled.program is None or not compiled.fits:
            return None
        mesh = make_mesh(candidate.mesh, devices)
        chosen = _apply(config, candidate)
        spent, _ = step_times(chosen, phase, mesh, candidate.split, compiled.program, documents)
        found = sum(one.estimated or one.roofline for one in spent.values())
        log(f"  {candidate}: {found:.3f} s per step")
        return found

    chosen, reason = None, ""
    if options.search:
        chosen, reason = search.search(
            splits, search.policies(config), config.sequence_length,
            lambda candidate: attempt(candidate, fast=True).fits, seconds,
        )  # fmt: skip
    if chosen is None:
        possible = splits[config.mesh]
        split = search.first_choice(possible, config.sequence_length)
        chosen = search.Candidate(config.mesh, config.remat, split)
        while not attempt(chosen).fits and (less := search.smaller(possible, chosen.split)):
            chosen = dataclasses.replace(chosen, split=less)
    found = report(
        _apply(config, chosen), phase, options.topology, make_mesh(chosen.mesh, devices),
        chosen.split, attempt(chosen), documents, options.mfu,
    )  # fmt: skip
    if reason:
        found["search"] = {"reason": reason}
    return found


def _splits(config: TrainConfig, mesh: Mesh, steps: int | None) -> list[search.BatchSplit]:
    """The possible splits, or that with the number of gradient accumulation steps."""
    splits = search.batch_splits(config.global_batch_size, batch_shards(mesh))
    if steps is None:
        return splits
    splits = [split for split in splits if split.gradient_accumulation_steps == steps]
    if not splits:
        raise ValueError(
            f"gradient_accumulation_steps: {steps} would leave a micro-batch of the "
            f"{config.global_batch_size} sequences empty; use fewer"
        )
    return splits


def _apply(config: TrainConfig, candidate: search.Candidate) -> TrainConfig:
    return dataclasses.replace(
        config,
        mesh=candidate.mesh,
        remat=candidate.remat,
        gradient_accumulation_steps=candidate.split.gradient_accumulation_steps,
    )
