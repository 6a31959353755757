"""`python -m train plan` against arithmetic, toys whose collectives are known, and compilers."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig
from train import configs
from train.common.flops import PEAK, Device
from train.common.sharding import MeshShape, make_mesh
from train.plan import compile as compiling, hlo, search, topologies
from train.plan.report import phase_costs, table
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
def test_search_finds_the_largest(most):
    tried = []

    def fits(split):
        tried.append(split.per_device_batch_size)
        return split.per_device_batch_size <= most

    found = search.largest(search.batch_splits(576, 16), fits)
    assert (found.per_device_batch_size if found else 0) == most
    assert len(tried) <= 6  # of at most 36 sizes per device


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


def test_lower_bound_and_hours_by_hand():
    phase = Phase("phase1", tokens=160_453_000_000, mlm_probability=0.30)
    split = split_of(576, 256, 1)
    found = phase_costs(BASE, phase, split, "TPU v5 lite", 256, 256, 0.4, 8192, 4e9)
    # A token's forward FLOPs from the paper's architecture: linear, head, attention at 8192.
    tokens, linear, head, attention = 576 * 8192, 0.2206e9, 0.0236e9, 0.2069e9
    model = 3 * tokens * (linear + head + attention)
    assert found["model_flops"] == pytest.approx(model, rel=1e-3)
    # 768 sequences are computed; layers twice; attention's backward has 5 products, not 4.
    positions = 768 * 2720  # 0.3 x 8192 and six sigma, rounded up to 16
    head = 2 * positions * (3 * 768**2 + 4 * 50368 * 768)
    hardware = 4 * 768 * 8192 * linear + 4.5 * tokens * attention + head
    assert found["hardware_flops"] == pytest.approx(hardware, rel=1e-3)
    bound = hardware / (256 * 197e12)
    assert found["compute_lower_bound_seconds"] == pytest.approx(bound, rel=1e-3)
    assert found["communication_lower_bound_seconds"] == 4e9 / 200e9  # 400 GB/s both ways
    assert found["mfu_upper_bound"] == pytest.approx(model / (256 * 197e12 * bound), rel=1e-3)
    seconds = model / (256 * 197e12 * 0.4) / 0.75  # a quarter of the sequences is padding
    hours = 160_453_000_000 / tokens * seconds / 3600
    assert found["steps"] == 34_005  # the published 34,004 and a part
    assert found["hours"] == pytest.approx(hours, rel=1e-3)
    assert found["chip_hours"] == pytest.approx(256 * hours, rel=1e-3)


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
    assert found["fits"] and "suggestions" not in found
    assert found["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert found["gradient_accumulation_steps"] == 1
    assert (found["per_device_batch_size"], found["batch_padding"]) == (3, 0)
    assert found["used_bytes"] == pytest.approx(sum(found["memory_bytes"].values()))
    assert found["collectives"]["all-gather"]["count"] > 0
    assert json.loads(json.dumps(found)) == found
    assert "fits" in table(found) and "NOT" not in table(found)


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


@pytest.mark.slow
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
    assert np.isclose(found["phases"][0]["hours"] * 16, found["phases"][0]["chip_hours"])


@pytest.mark.slow
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
