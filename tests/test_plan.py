"""`python -m train plan` against arithmetic, toys whose collectives are known, and compilers."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig
from train import configs
from train.common.flops import PEAK, Device
from train.common.sharding import MeshShape, make_mesh
from train.plan import (
    compile as compiling,
    estimate,
    hlo,
    kernels,
    run as running,
    search,
    topologies,
)
from train.plan.report import Documents, flops_and_bounds, report, table
from train.plan.run import Options, plan
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.step import Trainer

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.optimized
BASE = TrainConfig(
    model=ModernBertConfig.base(dtype="bfloat16"),
    remat="layers",
    sequence_length=8192,
    global_batch_size=576,
)

# Splitting a batch


def split_of(size, shards, steps):
    splits = search.batch_splits(size, shards)
    return next(s for s in splits if s.gradient_accumulation_steps == steps)


def test_padding_of_a_batch_that_the_devices_do_not_divide():
    assert split_of(616, 16, 1).padding == pytest.approx(0.013, abs=5e-4)  # 624 computed
    assert split_of(576, 256, 1).padding == 0.25  # 768 computed
    assert split_of(576, 16, 1).padding == 0
    assert split_of(616, 16, 11).padding == 1 - 56 / 64  # each micro-batch is padded


@pytest.mark.parametrize("size, shards", [(616, 16), (576, 256), (576, 8), (7, 64)])
def test_splits_hold_every_sequence(size, shards):
    splits = search.batch_splits(size, shards)
    counts = [split.gradient_accumulation_steps for split in splits]
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == size
    assert {n for n in range(1, size + 1) if size % n == 0} <= set(counts)
    for split in splits:
        steps = split.gradient_accumulation_steps
        micro_batch_size = -(-size // steps)  # as TrainConfig.micro_batch_size
        assert split.padded_micro_batch_size == split.per_device_batch_size * shards
        assert 0 <= split.padded_micro_batch_size - micro_batch_size < shards
        assert (steps - 1) * micro_batch_size < size <= steps * micro_batch_size


def test_the_first_choice():
    """Little padding first: 616 sequences on 16 devices are 13 x 48, not 11 x 56 padded to 64."""
    choose = lambda size, shards: search.first_choice(search.batch_splits(size, shards), 8192)  # noqa: E731
    assert choose(616, 16) == search.BatchSplit(616, 13, 48, 3)
    assert choose(616, 16).padding == pytest.approx(0.013, abs=5e-4)
    assert choose(576, 16) == search.BatchSplit(576, 6, 96, 6)
    assert choose(576, 1024).per_device_batch_size == 1  # more devices than sequences


@pytest.mark.parametrize("most", [0, 1, 4, 9, 36])
def test_the_largest_that_fits(most):
    tried = []

    def fits(split):
        tried.append(split.per_device_batch_size)
        return split.per_device_batch_size <= most

    assert search.largest(search.batch_splits(576, 16), fits) == most
    assert len(tried) <= 6  # of at most 36 sizes per device


def run_search(most, seconds):
    """Searches as if `most[remat]` sequences fit a device and the other policies never did."""
    asked = []

    def fits(candidate):
        return candidate.split.per_device_batch_size <= most.get(candidate.remat, 0)

    def time(candidate):
        asked.append(candidate)
        return seconds(candidate)

    splits = search.batch_splits(576, 16)
    remats = ("none", "save_dots_and_attention", "layers")
    return *search.search({MeshShape(fsdp=16): splits}, remats, 8192, fits, time), asked


def test_a_search_compiles_the_two_that_recompute_least_and_takes_the_faster():
    most = {"save_dots_and_attention": 5, "layers": 99}
    times = {"save_dots_and_attention": 6.5, "layers": 8.24}
    chosen, reason, asked = run_search(most, lambda c: times[c.remat])
    # 4, not 5, as 5 x 16 leaves padding; of "layers" 6: 8 (65,536 tokens) leaves padding as well.
    found = [(c.remat, c.split.per_device_batch_size, c.split.padding) for c in asked]
    assert found == [("save_dots_and_attention", 4, 0), ("layers", 6, 0)]
    assert chosen == asked[0]
    assert reason == (
        "remat save_dots_and_attention, 9 x 64 sequences: 6.500 s per step; remat layers, "
        "6 x 96 sequences: 8.240 s per step; remat none does not fit"
    )
    chosen, _, asked = run_search(
        {"none": 4, "save_dots_and_attention": 6, "layers": 9}, lambda c: 1.0
    )
    assert [c.remat for c in asked] == ["none", "save_dots_and_attention"]


def test_a_search_tries_the_best_policy_on_another_mesh():
    """256 devices: 768 sequences are computed for 576 unless each is split into four."""
    whole, parts = (MeshShape(fsdp=16, sequence=n) for n in (1, 4))
    meshes = {whole: search.batch_splits(576, 256), parts: search.batch_splits(576, 64)}
    time = lambda c: {"none": 2.0, "layers": 3.0}[c.remat] / c.mesh.sequence  # noqa: E731
    asked = []
    chosen, reason = search.search(
        meshes, ("none", "layers"), 8192, lambda c: True, lambda c: asked.append(c) or time(c)
    )
    assert [(c.mesh, c.remat) for c in asked] == [
        (whole, "none"), (whole, "layers"), (parts, "none"),
    ]  # fmt: skip
    assert chosen == asked[2] and chosen.split.padding == 0
    assert reason.startswith("remat none, 1 x 576 sequences, sequences in 4 parts: 0.500 s")


def test_a_search_goes_on_where_a_fast_compile_was_wrong():
    """The finished program does not fit, so smaller micro-batches are compiled."""
    tight = lambda c: 1.0 if c.split.per_device_batch_size <= 3 else None  # noqa: E731
    chosen, _, asked = run_search({"none": 6}, tight)
    assert [c.split.per_device_batch_size for c in asked] == [6, 4, 3]
    assert chosen == asked[-1]
    chosen, reason, _ = run_search({}, tight)
    assert chosen is None and reason.startswith("nothing fits, whether remat is none,")


def test_policies_that_recompute_least_come_first():
    found = search.policies(BASE)
    assert found[0] == "none" and found[-1] == "layers" and "save_dots_and_attention" in found


def test_default_meshes():
    shape = lambda width, n: dataclasses.astuple(search.default_mesh(width, range(n)))  # noqa: E731
    assert shape(768, 16) == (-1, 16, 1, 1)
    assert shape(1024, 1024) == (-1, 16, 1, 1)
    assert shape(768, 8) == (-1, 8, 1, 1)
    assert shape(768, 10) == (-1, 2, 1, 1)  # 768 = 2^8 x 3


@pytest.mark.parametrize(
    "recipe, devices, tensor, want",
    [
        ("bioclinical_base", 256, 1, ["--mesh.sequence 4: 0.0%"]),
        ("bioclinical_base", 256, 2, ["--mesh.sequence 2: 0.0%"]),
        ("bioclinical_base", 1024, 1, ["--mesh.sequence 16: 0.0%"]),
        ("bioclinical_large", 256, 1, ["--mesh.sequence 16: 1.3%", "--mesh.sequence 16 ... 624"]),
        ("bioclinical_large", 1024, 1, ["--mesh.sequence 8: 3.7%", "--mesh.sequence 8 ... 640"]),
        ("bioclinical_large", 1024, 8, ["... 640"]),  # without rounding, no number of parts helps
    ],
)
def test_ways_to_fill_a_large_pod(recipe, devices, tensor, want):
    mesh = {"data": devices // 16 // tensor, "fsdp": 16, "sequence": 1, "tensor": tensor}
    found = search.fuller(configs.load(recipe), mesh)
    rounding = "--round-batch: 0.0%, with {} sequences per step"
    assert found == [
        text if "..." not in text else text[: text.index("...")] + rounding.format(text[-3:])
        for text in want
    ]


# Costs


def test_state_bytes():
    """149,655,232 parameters; over fsdp all but norms and the decoder's bias are split."""
    whole = 768 * (1 + 21 + 22 + 1 + 1) + 50368  # embeddings, attn, mlp, final, head; decoder.bias
    for fsdp in (1, 8):
        mesh = make_mesh(MeshShape(fsdp=fsdp), jax.devices()[:fsdp])
        found = compiling.state_bytes(Trainer(BASE, BASE.model, mesh))
        expected = 4 * ((149_655_232 - whole) / fsdp + whole)
        assert found == {"parameters": expected, "moments": 2 * expected}


def test_flops_and_lower_bounds_by_hand():
    phase = Phase("phase1", tokens=160_453_000_000, mlm_probability=0.30)
    split = split_of(576, 256, 1)
    found = flops_and_bounds(BASE, phase, split, "TPU v5 lite", 256, Documents(8192), 4e9)
    # A token's forward FLOPs from the paper's architecture: linear, head, attention at 8192.
    tokens, linear, head, attention = 576 * 8192, 0.2206e9, 0.0236e9, 0.2069e9
    model = 3 * tokens * (linear + head + attention)
    assert found["model_flops"] == pytest.approx(model, rel=1e-3)
    # 768 sequences are computed; layers twice; attention's backward has 5 products, not 4.
    positions = 768 * 2720  # 0.3 x 8192 and six sigma, rounded up to 16
    head = 2 * positions * (3 * 768**2 + 5 * 50368 * 768)
    hardware = 4 * 768 * 8192 * linear + 4.5 * tokens * attention + head
    assert found["hardware_flops"] == pytest.approx(hardware, rel=1e-3)
    bound = hardware / (256 * 197e12)
    assert found["compute_lower_bound_seconds"] == pytest.approx(bound, rel=1e-3)
    assert found["communication_lower_bound_seconds"] == 4e9 / 200e9  # 400 GB/s both ways
    assert found["mfu_upper_bound"] == pytest.approx(model / (256 * 197e12 * bound), rel=1e-3)
    assert found["steps"] == 34_005  # the published 34,004 and a part


def test_lognormal_documents_have_their_mean():
    ids_BL = Documents(1024, "lognormal").packed(200, 8192)
    assert (ids_BL > 0).all() and (np.diff(ids_BL, axis=1) >= 0).all()
    # The last document of a sequence is cut, which is nearly half a document of eight.
    assert 200 * 8192 / ids_BL.max(axis=1).sum() == pytest.approx(1024, rel=0.2)
    equal_BL = Documents(1024).packed(3, 8192)
    assert (np.bincount(equal_BL[0])[1:] == 1024).all() and equal_BL.max() == 8


# What a program communicates


def test_collectives_of_a_toy():
    """Compiled for 8 CPU devices: kinds, groups, bytes, and five trips around a loop."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    n, m = 1024, 64

    def local(x):
        def body(carry, _):
            return carry + jax.lax.psum(jnp.sin(carry), "b"), None  # all-reduce of [n] over 4

        x, _ = jax.lax.scan(body, x, length=5)
        whole = jax.lax.all_gather(x, "a", tiled=True)  # [2n] over 2
        part = jax.lax.psum_scatter(whole.reshape(8, -1) * 2, ("a", "b"), tiled=True)  # over 8
        ring = jax.lax.ppermute(part, "b", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(ring.reshape(4, m), "b", 0, 0, tiled=True).reshape(-1)

    run = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(run).lower(jnp.zeros(n, jnp.float32)).compile().as_text()
    found = {c.kind: c for c in hlo.read(text, 8).collectives}
    expected = {
        "all-reduce": (4 * n, 4, 5, 5 * 4 * n * 2 * 3 / 4),
        "all-gather": (4 * 2 * n, 2, 1, 4 * n),
        "reduce-scatter": (4 * 2 * n, 8, 1, 4 * 2 * n * 7 / 8),
        "collective-permute": (4 * n // 4, 8, 1, 4 * n // 4),
        "all-to-all": (4 * n // 4, 4, 1, 4 * n // 4 * 3 / 4),
    }
    assert {
        k: (c.bytes, c.group, c.count, c.communication_bytes) for k, c in found.items()
    } == expected
    assert hlo.read(text, 8).unknown_loops == 0


TPU_TEXT = """HloModule m
%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %g = (bf16[48,16]{1,0:T(8,128)S(1)}, bf16[768,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=16] {'axis_1'}, dimensions={0}
  %d = bf16[768,16]{1,0} all-gather-done(%g)
  %p.1 = (bf16[10]{0}, bf16[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %s = bf16[1,8]{1,0} reduce-scatter(%x), replica_groups=[4,8]<=[32], to_apply=%add
  %c = f32[1024,1024]{1,0:T(8,128)} copy(%x)
}
%test (p: (f32[8], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (f32[8], s32[]) while(%t), condition=%test, body=%body
  %r = (f32[100]{0:T(128)}, f32[]{:T(128)}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_a_tpu_programs_text():
    """Pairs of start and done, three ways to write groups, and a loop's limit in its test."""
    found = hlo.read(TPU_TEXT, 32)
    assert {(c.kind, c.bytes, c.group, c.count) for c in found.collectives} == {
        ("all-gather", 2 * 768 * 16, 16, 7),
        ("collective-permute", 20, 32, 7),
        ("reduce-scatter", 2 * 8 * 8, 8, 7),
        ("all-reduce", 404, 2, 1),
    }
    assert found.copies == [(4 * 2**20, 7)]


# Where the time goes

# A loop of three trips: a matrix product as a convolution, which takes one layer's weight from a
# stack; a kernel whose own estimate of its cycles must not count; a copy into VMEM (S(1)).
STEP_TEXT = """HloModule m
%one_layer (p.0: bf16[4096,768], p.1: bf16[22,768,2304], p.2: s32[]) -> bf16[4096,2304] {
  %p.0 = bf16[4096,768]{1,0} parameter(0)
  %p.1 = bf16[22,768,2304]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,768,2304]{2,1,0} dynamic-slice(%p.1, %p.2, %zero, %zero), dynamic_slice_sizes={1,768,2304}
  %flat = bf16[768,2304]{1,0} bitcast(%slice)
  ROOT %dot = bf16[4096,2304]{1,0} convolution(%p.0, %flat), dim_labels=bf_io->bf
}
%stack (p.0: f32[22,768,2304], p.1: f32[768,2304], p.2: s32[]) -> f32[22,768,2304] {
  %p.0 = f32[22,768,2304]{2,1,0} parameter(0)
  %p.1 = f32[768,2304]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,768,2304]{2,1,0} bitcast(%p.1)
  ROOT %update = f32[22,768,2304]{2,1,0} dynamic-update-slice(%p.0, %part, %p.2, %zero, %zero)
}
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (p: (bf16[4096,768])) -> (bf16[4096,768]) {
  %x = bf16[4096,768]{1,0} get-tuple-element(%p), index=0
  %w = bf16[22,768,2304]{2,1,0} get-tuple-element(%p), index=1
  %g = f32[22,768,2304]{2,1,0} get-tuple-element(%p), index=2
  %i = s32[] get-tuple-element(%p), index=3
  %qkv = bf16[4096,2304]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%one_layer, metadata={op_name="jit(step)/while/body/dot"}, backend_config={"window_config":{"estimated_cycles":"200000"}}
  %call = (bf16[1,4096,768]{2,1,0}, f32[6,2,4096]{2,1,0}) custom-call(%i, %qkv), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp(bounded_forward_local))/pallas_call"}, backend_config={"estimated_cycles":"999999999"}
  %near = (bf16[4096,768]{1,0:T(8,128)S(1)}, bf16[4096,768]{1,0}, u32[]) copy-start(%x)
  %here = bf16[4096,768]{1,0:T(8,128)S(1)} copy-done(%near)
  %c = bf16[4096,768]{0,1} copy(%here), backend_config={"estimated_cycles":"7000"}
  %l = f32[4096]{0} reduce(%c, %zero), dimensions={1}, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(loss))/reduce"}, backend_config={"estimated_cycles":"500"}
  %s = f32[22,768,2304]{2,1,0} fusion(%g, %dw, %i), kind=kLoop, calls=%stack, backend_config={"estimated_cycles":"11000"}
  %r = f32[1000000]{0} all-reduce(%l), replica_groups=[1,4]<=[4], to_apply=%add
  %a = (f32[500]{0}, f32[1000]{0}) all-gather-start(%l), replica_groups=[1,4]<=[4], dimensions={0}
  %dw = f32[768,2304]{1,0} copy-done(%elsewhere)
}
ENTRY %main (x: bf16[4096,768]) -> bf16[4096,768] {
  %loop = (bf16[4096,768]) while(%t), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %new = f32[1000]{0} multiply(%a, %a), metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"estimated_cycles":"90"}
}
"""  # noqa: E501


def test_the_time_of_a_step_by_hand():
    program = hlo.read(STEP_TEXT, 4)
    device = Device(1e12, 1e9, 1e11, 2e10, flops_per_cycle=1000, cores=1)  # 1 GHz
    found = estimate.times(program, device, lambda kernel: {"bounded_forward_local": 5e5}[kernel])
    assert set(found) == set(estimate.CATEGORIES)
    rows, weight = 4096 * 768 * 2, 768 * 2304 * 2
    moved = {
        "matmul": 3 * (4 * rows + weight),  # x, q, k and v; one layer's weight
        "attention": 3 * (4 + 3 * rows + rows + 6 * 2 * 4096 * 4),
        "copies": 3 * rows,  # it reads VMEM
        "loss": 3 * (rows + 4 * 4096),
        "elementwise": 3 * (2 * 2 * weight + 4),  # one layer's gradient in float32
        "optimizer": 4 * 1000,
        "collectives": 0,
    }
    assert {name: one.hbm_bytes for name, one in found.items()} == moved
    products = 3 * 2 * 4096 * 768 * 2304 / 1e12
    exposed = 3 * 4e6 * 2 * 3 / 4 / 1e10  # the all-gather is overlapped
    cycles = {"matmul": 6e5, "copies": 2.1e4, "loss": 1500, "elementwise": 3.3e4, "optimizer": 90}
    for name, one in found.items():
        if name in cycles:
            assert one.estimated == pytest.approx(cycles[name] / 1e9)
            bound = moved[name] / 1e11
            assert one.roofline == pytest.approx(
                max(bound, products) if name == "matmul" else bound
            )
    assert found["attention"].estimated == found["attention"].roofline == pytest.approx(1.5e-3)
    assert found["collectives"].estimated == found["collectives"].roofline == exposed
    # A kernel cannot be faster than its arrays can be read and written.
    slow = estimate.times(program, device, lambda kernel: 1.0)["attention"]
    assert slow.estimated == pytest.approx(moved["attention"] / 1e11)


def test_flops_of_products_as_a_cpu_compiles_them():
    shapes = jnp.zeros((4, 32, 48)), jnp.zeros((4, 48, 80))
    compiled = jax.jit(lambda x, y: jnp.einsum("bij,bjk->bik", x, y)).lower(*shapes).compile()
    found = [one.flops for one in hlo.read(compiled.as_text() or "", 1).operations if one.flops]
    assert found == [2 * 4 * 32 * 48 * 80]


@pytest.mark.parametrize(
    "line, macs",
    [
        # A contraction over 6 x 8192 positions as a window over all of them.
        ("window={size=6x1}, dim_labels=0b1f_0i1o->0b1f", 2 * 10 * 6 * 3 * 7),
        # A product for each of 12 heads: dilated, so that one tap of each window meets a head.
        ("window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0io->0bf", 12 * 2 * 3 * 7),
        # Three taps over 5 positions with padding: the first and the last miss one.
        ("window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", (3 * 5 - 2) * 2 * 3 * 7),
    ],
)  # fmt: skip
def test_convolutions_count_only_taps_on_the_input(line, macs):
    sizes = dict(part.split("=") for part in line.split("{")[1].split("}")[0].split())
    if "x" in sizes["size"]:
        left, right, out = [6, 2, 10, 3], [6, 3, 1, 7], [1, 2, 10, 7]
    elif sizes["size"] == "12":
        left, right, out = [12, 2, 3], [12, 3, 7], [12, 2, 7]
    else:
        left, right, out = [5, 2, 3], [3, 3, 7], [5, 2, 7]
    assert hlo._convolution_macs(line, out, left, right) == macs


def test_kernels_visit_what_their_grid_does():
    """Against the kernel's own scalars, for packed and for full sequences."""
    from modernbert_jax.attention import make_bounds, pallas_tpu

    costs = kernels.Costs(1024, 512, 1000, 100, 10, 8192, (1, 1_000_000))
    for ids_BL in (Documents(1024, "lognormal").packed(4, 8192), np.ones((4, 8192), np.int32)):
        bounds = make_bounds(jnp.asarray(ids_BL), None)
        q = jax.ShapeDtypeStruct((4, 8192, 12, 64), jnp.bfloat16)
        tiles = pallas_tpu.Tiles(1024, 512, 512, 512)
        scalars, steps = pallas_tpu._scalars(pallas_tpu._plan(q, bounds, tiles, tiles), bounds)
        first, last, lo, hi = (np.asarray(x) for x in scalars)
        key = np.arange(16) * 512
        visited = (key >= 512 * first[:, None]) & (key < 512 * last[:, None])
        whole = visited & (lo[:, None] <= key) & (key + 512 <= hi[:, None])
        masked = visited & ~whole
        expected = 4 * (8 * (int(steps) * 1000 + 100) + 10) + whole.sum() + 1e6 * masked.sum()
        assert kernels.call_cycles(costs, ids_BL, rows=4, blocks=6) == 6 * expected


def test_the_table_describes_the_kernels_as_they_are():
    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        for name in ("forward", "backward"):
            local = kernels.costs(device, f"bounded_{name}_local")
            whole = kernels.costs(device, f"bounded_{name}_global")
            assert len(local.visits) == 1 and len(whole.visits) == 2
            assert min(*local.visits, *whole.visits) > 100
    with pytest.raises(ValueError, match="no kernel bounded_forward_local for TPU v4"):
        kernels.costs("TPU v4", "bounded_forward_local")


def test_a_changed_kernel_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "pallas_tpu.py")
    (tmp_path / "pallas_tpu.py").write_bytes(b"changed")
    with pytest.raises(ValueError, match="renew it with `python -m tests.benchmarks.kernel_table`"):
        kernels.costs("TPU v5 lite", "bounded_forward_local")


def tpu_report(monkeypatch, program, **more):
    """The report of BASE for 16 devices that pass for v5e."""

    class Chip:
        device_kind, platform, id = "TPU v5 lite", "tpu", 0

    class Mesh:
        devices = np.array([Chip] * 16)
        shape = {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
        size = 16

    costs = kernels.Costs(1024, 512, 1000, 100, 10, 8192, (1000,))
    monkeypatch.setattr(kernels, "costs", lambda device, kernel: costs)
    monkeypatch.setattr(topologies, "chips", len)
    phases = (Phase("one", tokens=10**9), Phase("two", tokens=10**9, mlm_probability=0.15))
    config = dataclasses.replace(BASE, phases=phases)
    compiled = compiling.Compiled(1e9, 2e9, 1.0, {}, program=program)
    split, mesh = split_of(576, 16, 6), cast(Any, Mesh)
    return report(config, phases[0], "v5e:4x4", mesh, split, compiled, Documents(8192), **more)


def test_hours_lie_between_roofline_and_estimate(monkeypatch):
    found = tpu_report(monkeypatch, hlo.read(STEP_TEXT.replace("loss", "other"), 4))
    first, second = found["phases"]
    spent = found["time"].values()
    for name in ("estimated", "roofline"):
        seconds = sum(one[f"{name}_seconds"] for one in spent)
        assert first[f"{name}_seconds_per_step"] == pytest.approx(seconds)
        mfu = first["model_flops"] / (16 * 197e12 * seconds)
        assert found[f"{name}_mfu"] == first[f"{name}_mfu"] == pytest.approx(mfu)
        hours = 1e9 / (576 * 8192) * seconds / 3600
        assert first[f"{name}_hours"] == pytest.approx(hours)
        assert first[f"{name}_chip_hours"] == pytest.approx(16 * hours)
        assert second[f"{name}_hours"] == pytest.approx(hours)  # there is no loss in it
    assert not any("assumed" in key for key in (*found, *first))
    text = table(found)
    assert "roofline" in text and "chip-hours" in text and "    assumed  " not in text
    assert json.loads(json.dumps(found)) == found


def test_a_phase_with_fewer_predictions_has_a_cheaper_loss(monkeypatch):
    first, second = tpu_report(monkeypatch, hlo.read(STEP_TEXT, 4))["phases"]
    loss = 1500 / PEAK["TPU v5 lite"].clock
    saved = first["estimated_seconds_per_step"] - second["estimated_seconds_per_step"]
    assert saved == pytest.approx(loss * (1 - 1424 / 2720))


def test_an_assumed_mfu_is_only_printed_on_request(monkeypatch):
    found = tpu_report(monkeypatch, hlo.read(STEP_TEXT, 4), mfu=0.4)
    phase = found["phases"][0]
    seconds = phase["model_flops"] / (16 * 197e12 * 0.4)
    assert phase["assumed_hours"] == pytest.approx(1e9 / (576 * 8192) * seconds / 3600)
    assert "    assumed  " in table(found)


def test_no_estimate_without_the_trip_count_of_a_loop(monkeypatch):
    text = STEP_TEXT.replace("known_trip_count", "trips")
    found = tpu_report(monkeypatch, hlo.read(text, 4))
    assert "estimated_mfu" not in found and 0 < found["roofline_mfu"]
    assert "no estimate: the trip count of 1 loops is unknown" in table(found)


# Complete plans, for CPU devices


@pytest.fixture
def cpu_plan(monkeypatch):
    """Plans a tiny model for the eight CPU devices, as if they had `hbm_bytes` of memory."""

    def run(hbm_bytes, config=None, options=None, **more):
        monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices())
        monkeypatch.setitem(PEAK, "cpu", Device(1e12, hbm_bytes, 1e11, 1e10))
        config = TrainConfig(global_batch_size=24, sequence_length=64, **(config or {}))
        return plan(config, Options("cpu:8", **(options or {})), **more)

    return run


def test_a_config_that_fits(cpu_plan):
    found = cpu_plan(1e9)
    assert found["fits"] and "suggestions" not in found and "fuller" not in found
    assert found["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert found["gradient_accumulation_steps"] == 1
    assert (found["per_device_batch_size"], found["batch_padding"]) == (3, 0)
    assert found["used_bytes"] == pytest.approx(sum(found["memory_bytes"].values()))
    assert found["collectives"]["all-gather"]["count"] > 0
    assert json.loads(json.dumps(found)) == found
    assert "fits" in table(found) and "NOT" not in table(found)
    assert found["no_estimate"] == "the compiler estimates no cycles for cpu"
    assert "roofline_mfu" in found and "estimated_mfu" not in found


def test_a_config_that_does_not_fit(cpu_plan):
    """The report says by how much and what to try, after smaller micro-batches were tried."""
    lines = []
    found = cpu_plan(1e6, log=lines.append)
    assert not found["fits"]
    assert found["missing_bytes"] == pytest.approx(found["used_bytes"] - 0.9e6)
    assert found["per_device_batch_size"] == 1  # 3 at first; 2 would be a quarter padding
    assert any("--remat layers" in line for line in found["suggestions"])
    assert "DOES NOT FIT" in table(found) and "DOES NOT FIT by 0.0" in table(found)
    assert sum("compiling" in line for line in lines) == 2


def test_suggestions_are_what_is_left(cpu_plan):
    config = {"remat": "layers", "mesh": MeshShape(fsdp=2), "loss_chunk": 64}
    found = cpu_plan(1e6, gradient_accumulation_steps=1, config=config)
    assert found["per_device_batch_size"] == 3  # as requested, although it does not fit
    assert found["suggestions"] == [
        "smaller micro-batches: --gradient-accumulation-steps 3",
        "parameters and moments split more ways: --mesh.fsdp 4",
    ]


def test_refusals_of_a_tpu_compiler():
    total = "Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. Exceeded ..."
    part = "the total memory required for HLO temporaries (22.55G) exceeds available HBM (512.00M)."
    gib = 2**30
    assert compiling.out_of_memory(total, 1e9) == (17.20 * gib, 15.75 * gib)
    assert compiling.out_of_memory(part, gib) == (23.55 * gib, 0.5 * gib)
    assert compiling.out_of_memory("Mosaic failed", gib) is None


def test_an_attention_that_cannot_run_there(cpu_plan):
    with pytest.raises(ValueError, match="pallas_tpu: expected one of TPU .* got 'cpu'"):
        cpu_plan(1e9, config={"attention": "pallas_tpu"})


@pytest.mark.parametrize("mfu", [0.0, 40])
def test_an_impossible_mfu(cpu_plan, mfu):
    with pytest.raises(ValueError, match="mfu: expected above 0 and at most 1, got"):
        cpu_plan(1e9, options={"mfu": mfu})


@pytest.mark.parametrize("tokens", [-1, 65])
def test_impossible_documents(cpu_plan, tokens):
    with pytest.raises(ValueError, match=f"document_tokens: expected 0 to .* 64, got {tokens}"):
        cpu_plan(1e9, options={"document_tokens": tokens})


def test_a_search_ends_in_a_plan(cpu_plan, monkeypatch):
    """With a compiler that takes no time: fast compiles have no program."""
    calls = []

    def compile_step(config, phase, mesh, log, *, fast=False):
        calls.append((config.remat, config.gradient_accumulation_steps, fast))
        program = None if fast else hlo.read(STEP_TEXT, 8)
        return compiling.Compiled(
            1e8 if config.remat == "none" else 5e7, 9e7, 1.0, {}, program=program
        )

    monkeypatch.setattr(running, "compile_step", compile_step)
    found = cpu_plan(1e9, options={"search": True})
    finalists = [(remat, steps) for remat, steps, fast in calls if not fast]
    assert len(finalists) == search.FINALISTS and "none" not in dict(finalists)
    assert {remat for remat, _, fast in calls if fast} == {"none", *dict(finalists)}
    assert found["fits"] and (found["remat"], found["gradient_accumulation_steps"]) in finalists
    assert "remat none does not fit" in found["search"]["reason"]
    assert found["search"]["reason"] in table(found)


def test_an_empty_micro_batch_is_refused(cpu_plan):
    with pytest.raises(ValueError, match="13 would leave a micro-batch of the 24 sequences empty"):
        cpu_plan(1e9, gradient_accumulation_steps=13)


def test_every_planned_model_divides_its_mesh():
    for model in (ModernBertConfig.base(), ModernBertConfig.large()):
        for count in (8, 16, 64, 256, 1024):
            assert search.default_mesh(model.hidden_size, range(count)).fsdp == min(count, 16)


def test_abstract_arguments_are_what_the_step_takes():
    """The shapes planned are those that the loader makes and the trainer keeps."""
    config = dataclasses.replace(BASE, gradient_accumulation_steps=6)
    mesh = make_mesh(MeshShape(fsdp=8), jax.devices())
    trainer = Trainer(config, config.model, mesh)
    state, batch, *_ = compiling.abstract_arguments(trainer, Phase(mlm_probability=0.15))
    assert batch["input_ids"].shape == (6, 96, 8192)
    assert batch["labels"].shape == batch["predict_positions"].shape == (6, 96, 1424)
    assert batch["labels"].sharding == NamedSharding(mesh, P(None, ("data", "fsdp")))
    assert state.params.keys() == state.optimizer.mu.keys() == trainer.shapes.keys()
    assert all(
        leaf.sharding == trainer.shardings.params[path] for path, leaf in state.params.items()
    )


# Compilers for devices that are absent


def run_plan(*arguments, module="libtpu"):
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", "train", "plan", *arguments]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_plans_for_an_absent_tpu(tmp_path):
    """The tiny model on v5e:2x2, from the command line to JSON."""
    small = "--sequence-length 128 --global-batch-size 10 --phases.0.tokens 1000000".split()
    done = run_plan("--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json"), *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout and "hours" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["device"], found["chips"]) == ("TPU v5 lite", 4)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert found["batch_padding"] == pytest.approx(1 - 10 / 12)
    assert found["collectives"]["all-gather"]["bytes"] > 0
    assert found["loops_with_unknown_trip_count"] == 0
    assert 0 < found["estimated_mfu"] <= found["roofline_mfu"] <= 1
    assert min(found["time"][name]["estimated_seconds"] for name in ("attention", "loss")) > 0


@pytest.mark.slow
def test_plans_for_two_slices(tmp_path):
    """Data over both slices, the other axes within one."""
    small = "--sequence-length 128 --global-batch-size 16 --phases.0.tokens 1000000".split()
    done = run_plan("--topology", "2xv5e:2x2", "--json", str(tmp_path / "plan.json"), *small)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["chips"]) == (8, 8)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


def test_bad_topologies_are_one_line():
    for topology in ("v5e", "v5e:5x4", "2xv5e"):
        done = run_plan("--topology", topology)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: topology: expected one such as v5e:4x4")
        assert repr(topology) in line


@pytest.mark.matrix
def test_plans_base_on_a_v5e_16(tmp_path):
    """The published step of 576 sequences of 8192 tokens on 16 chips of v5e."""
    arguments = ["--config", "bioclinical_base", "--topology", "v5e:4x4"]
    done = run_plan(*arguments, "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["batch_padding"] == 0
    assert found["used_bytes"] < 15.75 * 2**30
    # Weights are gathered once a step, and nothing else is.
    gathered = found["collectives"]["all-gather"]["bytes"]
    weights = 2 * 110_297_088 + 4 * 50368 * 768  # encoder in bfloat16, embeddings in float32
    assert gathered == pytest.approx(weights, rel=0.1)
    # No ring of matrix products in slices of 768 / 16, which leave most of a matrix unit idle.
    assert "collective-permute" not in found["collectives"]
    assert 0.2 < found["estimated_mfu"] < found["roofline_mfu"] < 0.7


@pytest.mark.matrix
def test_does_not_fit_on_a_v5e():
    """The large model without rematerialization, 24 sequences per chip."""
    arguments = (
        "--config bioclinical_large --topology v5e:2x2 --remat none --gradient-accumulation-steps 7"
    )
    done = run_plan(*arguments.split())
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout and "--remat layers" in done.stdout


def test_a_missing_cuda_compiler_is_one_line(tmp_path):
    for more in ([], ["--cuda-compiler", str(tmp_path)]):
        done = run_plan("--topology", "h100:1x1x8", *more, module="")
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert "install it with `python -m train.plan.install_cuda --target DIR`" in line


@pytest.mark.slow
def test_plans_for_absent_gpus(cuda_compiler):
    arguments = ["--config", "bioclinical_base", "--topology", "h100:1x1x8"]
    done = run_plan(*arguments, "--cuda-compiler", str(cuda_compiler), module="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 NVIDIA H100 80GB HBM3 (8 chips)" in done.stdout
