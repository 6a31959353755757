"""`python -m train plan` against arithmetic, toys whose exchanges are known, and compilers."""

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
from train.common.flops import PEAK, Device
from train.common.sharding import MeshShape, make_mesh
from train.plan import hlo, search as plan, topologies as absent
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.step import Trainer

ROOT = Path(__file__).resolve().parents[1]
BASE = TrainConfig(
    model=ModernBertConfig.base(dtype="bfloat16"),
    remat="layers",
    sequence_length=8192,
    global_batch_size=576,
)

# Rows


def fill_of(rows, shards, gradient_accumulation_steps):
    return next(
        f
        for f in plan.choices(rows, shards)
        if f.gradient_accumulation_steps == gradient_accumulation_steps
    )


def test_waste_of_a_batch_that_the_devices_do_not_divide():
    assert fill_of(616, 16, 1).waste == pytest.approx(0.013, abs=5e-4)  # 624 slots
    assert fill_of(576, 256, 1).waste == 0.25  # 768 slots
    assert fill_of(576, 16, 1).waste == 0
    assert fill_of(616, 16, 11).waste == 1 - 56 / 64  # each micro-batch is filled up


@pytest.mark.parametrize("rows, shards", [(616, 16), (576, 256), (576, 8), (7, 64)])
def test_choices_hold_every_row(rows, shards):
    fills = plan.choices(rows, shards)
    counts = [f.gradient_accumulation_steps for f in fills]
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == rows
    assert {n for n in range(1, rows + 1) if rows % n == 0} <= set(counts)
    for fill in fills:
        assert fill.slots == fill.device_rows * shards
        micro_batch_size = -(
            -rows // fill.gradient_accumulation_steps
        )  # as TrainConfig.micro_batch_size
        assert 0 <= fill.slots - micro_batch_size < shards
        assert (
            (fill.gradient_accumulation_steps - 1) * micro_batch_size
            < rows
            <= fill.gradient_accumulation_steps * micro_batch_size
        )


def test_micro_batches_chosen():
    """Few empty rows first: 616 rows on 16 devices are 13 x 48, not 11 x 56 on 64 slots."""
    take = lambda rows, shards, given=None: plan._take(plan.choices(rows, shards), given, 8192)  # noqa: E731
    assert (take(616, 16).gradient_accumulation_steps, take(616, 16).slots) == (13, 48)
    assert take(616, 16).waste == pytest.approx(0.013, abs=5e-4)
    assert (take(576, 16).gradient_accumulation_steps, take(576, 16).device_rows) == (6, 6)
    assert take(576, 16, 2).gradient_accumulation_steps == 2  # as told
    assert take(576, 1024).device_rows == 1  # more devices than rows


@pytest.mark.parametrize("most", [0, 1, 4, 9, 36])
def test_search_finds_the_largest(most):
    asked = []

    def fits(fill):
        asked.append(fill.device_rows)
        return fill.device_rows <= most

    found = plan._largest(plan.choices(576, 16), fits)
    assert (found.device_rows if found else 0) == most
    assert len(asked) <= 6  # of the 36 numbers of rows a device at most


def test_default_meshes():
    shape = lambda width, n: dataclasses.astuple(plan.default_mesh(width, range(n)))  # noqa: E731
    assert shape(768, 16) == (-1, 16, 1)
    assert shape(1024, 1024) == (-1, 16, 1)
    assert shape(768, 8) == (-1, 8, 1)
    assert shape(768, 10) == (-1, 2, 1)  # 768 = 2^8 x 3


# Costs


def test_state_bytes():
    """149,655,232 parameters; over fsdp all but norms and the decoder's bias are split."""
    whole = 768 * (1 + 21 + 22 + 1 + 1) + 50368  # embeddings, attn, mlp, final, head; decoder.bias
    for fsdp in (1, 8):
        mesh = make_mesh(MeshShape(fsdp=fsdp), jax.devices()[:fsdp])
        found = plan._state_bytes(Trainer(BASE, BASE.model, mesh))
        expected = 4 * ((149_655_232 - whole) / fsdp + whole)
        assert found == {"parameters": expected, "moments": 2 * expected}


def test_floor_and_hours_by_hand():
    phase = Phase("phase1", tokens=160_453_000_000, mlm_probability=0.30)
    peak = PEAK["TPU v5 lite"]
    fill = fill_of(576, 256, 1)
    found = plan.phase_costs(BASE, phase, fill, peak, 256, 256, 0.4, 8192, sent=4e9)
    # A token's forward FLOPs from the paper's architecture: linear, head, attention at 8192.
    tokens, linear, head, attention = 576 * 8192, 0.2206e9, 0.0236e9, 0.2069e9
    model = 3 * tokens * (linear + head + attention)
    assert found["model_flops"] == pytest.approx(model, rel=1e-3)
    # Rows computed: 768. Layers run again, attention's backward has 5 products and not 4.
    places = 768 * 2720  # 0.3 x 8192 and six sigma, rounded up to 16
    head = 2 * places * (3 * 768**2 + 4 * 50368 * 768)
    hardware = 4 * 768 * 8192 * linear + 4.5 * tokens * attention + head
    assert found["hardware_flops"] == pytest.approx(hardware, rel=1e-3)
    floor = hardware / (256 * 197e12)
    assert found["arithmetic_floor_seconds"] == pytest.approx(floor, rel=1e-3)
    assert found["link_floor_seconds"] == 4e9 / 200e9  # 400 GB/s both ways
    assert found["highest_mfu"] == pytest.approx(model / (256 * 197e12 * floor), rel=1e-3)
    seconds = model / (256 * 197e12 * 0.4) / 0.75  # a quarter of the rows is empty
    hours = 160_453_000_000 / tokens * seconds / 3600
    assert found["steps"] == 34_005  # and the facts' 34,004 whole ones
    assert found["hours"] == pytest.approx(hours, rel=1e-3)
    assert found["chip_hours"] == pytest.approx(256 * hours, rel=1e-3)


# What a program exchanges


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
    assert {k: (c.bytes, c.group, c.times, c.sent) for k, c in found.items()} == expected
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
    assert {(c.kind, c.bytes, c.group, c.times) for c in found.collectives} == {
        ("all-gather", 2 * 768 * 16, 16, 7),
        ("collective-permute", 20, 32, 7),
        ("reduce-scatter", 2 * 8 * 8, 8, 7),
        ("all-reduce", 404, 2, 1),
    }
    assert found.copies == [(4 * 2**20, 7)]


# The whole, for CPU devices


@pytest.fixture
def cpu_plan(monkeypatch):
    """Plans a tiny model for the eight CPU devices, as devices of so many bytes."""

    def run(hbm_bytes, **options):
        monkeypatch.setattr(absent, "devices", lambda topology: jax.devices())
        monkeypatch.setitem(PEAK, "cpu", Device(1e12, hbm_bytes, 1e11, 1e10))
        config = TrainConfig(global_batch_size=24, sequence_length=64, **options.pop("config", {}))
        return plan.plan(config, "cpu:8", **options)

    return run


def test_a_config_that_fits(cpu_plan):
    found = cpu_plan(1e9)
    assert found["fits"] and "would_help" not in found
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (found["gradient_accumulation_steps"], found["device_rows"], found["waste"]) == (1, 3, 0)
    assert found["used_bytes"] == pytest.approx(sum(found["bytes"].values()))
    assert found["collectives"]["all-gather"]["count"] > 0
    assert json.loads(json.dumps(found)) == found
    assert "fits" in plan.table(found) and "NOT" not in plan.table(found)


def test_a_config_that_does_not_fit(cpu_plan):
    """It says by how much and what would help, after trying smaller micro-batches."""
    lines = []
    found = cpu_plan(1e6, say=lines.append)
    assert not found["fits"]
    assert found["missing_bytes"] == pytest.approx(found["used_bytes"] - 0.9e6)
    assert found["device_rows"] == 1  # 3 at first; 2 would leave a quarter of the slots empty
    assert any("--remat layers" in line for line in found["would_help"])
    assert "DOES NOT FIT" in plan.table(found) and "too much" in plan.table(found)
    assert sum("compiling" in line for line in lines) == 2


def test_advice_names_what_is_left(cpu_plan):
    config = {"remat": "layers", "mesh": MeshShape(fsdp=2), "loss_chunk": 64}
    found = cpu_plan(1e6, gradient_accumulation_steps=1, config=config)
    assert found["device_rows"] == 3
    assert found["would_help"] == [
        "smaller micro-batches: --gradient-accumulation-steps 3",
        "parameters and moments split more ways: --mesh.fsdp 4",
    ]


def test_refusals_of_a_tpu_compiler():
    whole = "Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. Exceeded ..."
    part = "the total memory required for HLO temporaries (22.55G) exceeds available HBM (512.00M)."
    gib = 2**30
    assert plan._out_of_memory(whole, 1e9) == (17.20 * gib, 15.75 * gib)
    assert plan._out_of_memory(part, gib) == (23.55 * gib, 0.5 * gib)
    assert plan._out_of_memory("Mosaic failed", gib) == (None, None)


def test_an_attention_that_cannot_run_there(cpu_plan):
    with pytest.raises(ValueError, match="pallas_tpu: expected one of TPU .* got 'cpu'"):
        cpu_plan(1e9, config={"attention": "pallas_tpu"})


@pytest.mark.parametrize("options", [{"mfu": 0.0}, {"mfu": 40}])
def test_an_impossible_mfu(cpu_plan, options):
    with pytest.raises(ValueError, match="mfu: expected above 0 and at most 1, got"):
        cpu_plan(1e9, **options)


def test_every_planned_model_divides_its_mesh():
    for model in (ModernBertConfig.base(), ModernBertConfig.large()):
        for count in (8, 16, 64, 256, 1024):
            assert plan.default_mesh(model.hidden_size, range(count)).fsdp == min(count, 16)


def test_abstract_arguments_are_what_the_step_takes():
    """The shapes planned are those that the loader makes and the trainer keeps."""
    config = dataclasses.replace(BASE, gradient_accumulation_steps=6)
    mesh = make_mesh(MeshShape(fsdp=8), jax.devices())
    trainer = Trainer(config, config.model, mesh)
    state, batch, *_ = plan.abstract_arguments(trainer, Phase(mlm_probability=0.15))
    assert batch["input_ids"].shape == (6, 96, 8192)
    assert batch["labels"].shape == batch["predict_positions"].shape == (6, 96, 1424)
    assert batch["labels"].sharding == NamedSharding(mesh, P(None, ("data", "fsdp")))
    assert state.params.keys() == state.optimizer.mu.keys() == trainer.shapes.keys()
    assert all(
        leaf.sharding == trainer.shardings.params[path] for path, leaf in state.params.items()
    )


# Compilers of absent devices


def run_plan(*arguments, module="libtpu"):
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", "train", "plan", *arguments]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_plans_for_an_absent_tpu(tmp_path):
    """The quick one: the tiny model on v5e:2x2, from the command line to JSON."""
    small = "--sequence-length 128 --global-batch-size 10 --phases.0.tokens 1000000".split()
    done = run_plan("--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json"), *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout and "hours" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["device"], found["chips"]) == ("TPU v5 lite", 4)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["waste"] == pytest.approx(1 - 10 / 12)
    assert found["collectives"]["all-gather"]["bytes"] > 0
    assert found["loops_of_unknown_length"] == 0


def test_bad_topologies_are_one_line():
    for topology in ("v5e", "v5e:5x4"):
        done = run_plan("--topology", topology)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: topology: expected one such as v5e:4x4")
        assert repr(topology) in line


@pytest.mark.slow
def test_plans_base_on_a_v5e_16(tmp_path):
    """The published step of 576 rows of 8192 tokens on 16 chips of v5e."""
    arguments = ["--config", "bioclinical_base", "--topology", "v5e:4x4"]
    done = run_plan(*arguments, "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["waste"] == 0
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
    """Large, nothing computed again, 24 rows a chip."""
    arguments = (
        "--config bioclinical_large --topology v5e:2x2 --remat none --gradient-accumulation-steps 7"
    )
    done = run_plan(*arguments.split())
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout and "--remat layers" in done.stdout


@pytest.mark.slow
def test_plans_for_absent_gpus():
    done = run_plan("--config", "bioclinical_base", "--topology", "h100:1x1x8", module="")
    if "pip could not install" in done.stderr and not os.environ.get("CI"):  # CI has an index
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 NVIDIA H100 80GB HBM3 (8 chips)" in done.stdout
