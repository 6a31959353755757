"""Compile a training step for devices you do not have, and report what it needs.

Memory and collectives are the compiler's; FLOPs are counted; times are lower bounds from peak
FLOP/s and bandwidths, and hours assume the model FLOPs utilization (MFU) that you state. The mesh
and the number of gradient accumulation steps are chosen unless you set them. The exit code is 1 if
the step does not fit. Every field of the configuration is a flag, as for pretrain.

    python -m train plan --config bioclinical_base --topology v5e:4x4
    python -m train plan --config bioclinical_large --topology v5e:4x4 --mesh.fsdp 16 --search
    python -m train.plan.install_cuda --target cuda/
    python -m train plan --config demo --topology h100:1x1x8 --cuda-compiler cuda/ --json plan.json
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..common.flops import PEAK
from ..common.sharding import MeshShape, batch_shards, make_mesh
from ..pretrain.config import TrainConfig
from . import search, topologies
from .compile import Compiled, compile_step
from .report import report


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile for and what to report."""

    topology: str
    """Such as v5e:4x4, v5p:8x8x16 or h100:1x1x8 (slices x hosts x GPUs per host)."""
    cuda_compiler: str = ""
    """For GPUs: the folder that `python -m train.plan.install_cuda` filled."""
    json: str = ""
    """Also write the plan to this file."""
    mfu: float = 0.4
    """The utilization that the hours assume."""
    search: bool = False
    """Find the largest micro-batch that fits."""
    document_tokens: int = 0
    """Length of each document, for the FLOPs of attention; 0: the whole sequence (the most)."""


def plan(
    config: TrainConfig,
    options: Options,
    *,
    gradient_accumulation_steps: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compiles the training step of `config` for the topology and returns the report.

    The mesh is chosen if config.mesh has its defaults, the number of micro-batches if
    `gradient_accumulation_steps` is None. The step is compiled for the phase with the most
    predictions. log: called with lines of progress. `topologies.environment` must be set. Raises
    ValueError for values that are not possible, for a mesh that does not divide the model and for
    an unknown topology.
    """
    config.validate()
    if not 0 < options.mfu <= 1:
        raise ValueError(f"mfu: expected above 0 and at most 1, got {options.mfu}")
    devices = topologies.devices(options.topology)
    if devices[0].device_kind not in PEAK:
        raise ValueError(
            f"device {devices[0].device_kind!r}: add its peak to PEAK in train/common/flops.py"
        )
    if config.mesh == MeshShape():
        mesh_shape = search.default_mesh(config.model.hidden_size, devices)
        config = dataclasses.replace(config, mesh=mesh_shape)
    mesh = make_mesh(config.mesh, devices)
    if config.round_batch:
        config, change = config.rounded(batch_shards(mesh) * (gradient_accumulation_steps or 1))
        log(change)
        config.validate()
    phase = max(config.phases, key=lambda phase: phase.mlm_probability)
    splits = search.batch_splits(config.global_batch_size, batch_shards(mesh))
    results: dict[search.BatchSplit, Compiled] = {}

    def attempt(split: search.BatchSplit) -> Compiled:
        if split not in results:
            steps = split.gradient_accumulation_steps
            trial = dataclasses.replace(config, gradient_accumulation_steps=steps)
            results[split] = compile_step(trial, phase, mesh, log)
        return results[split]

    if gradient_accumulation_steps is None:
        split = search.first_choice(splits, config.sequence_length)
        while not attempt(split).fits and (less := search.smaller(splits, split)):
            split = less
    else:
        by_steps = {split.gradient_accumulation_steps: split for split in splits}
        if gradient_accumulation_steps not in by_steps:
            raise ValueError(
                f"gradient_accumulation_steps: {gradient_accumulation_steps} would leave a "
                f"micro-batch of the {config.global_batch_size} sequences empty; use fewer"
            )
        split = by_steps[gradient_accumulation_steps]
    largest = search.largest(splits, lambda s: attempt(s).fits) if options.search else None
    return report(
        config, phase, options.topology, mesh, split, attempt(split), largest, options.mfu,
        options.document_tokens,
    )  # fmt: skip
