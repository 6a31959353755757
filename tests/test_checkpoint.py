"""Checkpoints cut short, changed on disk or never written whole; and what the mark sees."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from modernbert_jax import ModernBertConfig
from train.common.optimizer import StableAdamWState
from train.common.sharding import MeshShape, make_mesh
from train.common.workdir import committed
from train.pretrain.checkpoint import Checkpoints, fingerprints
from train.pretrain.config import TrainConfig
from train.pretrain.data import Position
from train.pretrain.step import Trainer, TrainState

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = ModernBertConfig.tiny(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2
)


@functools.cache
def started(mesh, model):
    """(trainer, its first state): compiling takes longer than all else here."""
    trainer = Trainer(TrainConfig(model=model), model, make_mesh(MeshShape(*mesh)))
    return trainer, trainer.fresh()


def at(row):
    """A position, as a run stores it."""
    return dataclasses.asdict(Position(row=row))


def keeper(workdir, said=None, mesh=(2, 2, 1, 2), model=MODEL, keep=5):
    trainer = started(mesh, model)[0]
    return Checkpoints(workdir, trainer, keep, (said if said is not None else []).append)


def state_at(checkpoints, step):
    trainer = checkpoints.trainer
    mesh = tuple(trainer.mesh.shape.values())
    state = started(mesh, trainer.model_config)[1]
    scale = lambda tree: {k: v + step for k, v in tree.items()}  # noqa: E731
    optimizer = StableAdamWState(
        jnp.int32(step), scale(state.optimizer.mu), scale(state.optimizer.nu)
    )
    return TrainState(scale(state.params), optimizer)


@pytest.fixture
def two(tmp_path):
    """A workdir with the checkpoints of steps 3 and 6."""
    checkpoints = keeper(tmp_path)
    for step in (3, 6):
        checkpoints.save(state_at(checkpoints, step), at(step))
    checkpoints.wait()
    return tmp_path


def equal(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "mesh",
    [
        (2, 2, 1, 2),
        (1, 1, 1, 1),
        (8, 1, 1, 1),
        pytest.param((1, 2, 2, 2), marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_the_newest_comes_back_on_any_mesh(two, mesh):
    checkpoints = keeper(two, mesh=mesh)
    state, position, folder = checkpoints.restore()
    assert position == at(6) and folder.name == "00000006"
    equal(state, state_at(checkpoints, 6))
    path = "model.layers.1.attn.Wqkv.weight"
    assert state.params[path].sharding == checkpoints.trainer.shardings.params[path]


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest_file(folder / "params")
    os.truncate(file, file.stat().st_size // 2)


def flip(folder):
    """One bit of one weight."""
    file = largest_file(folder / "optimizer")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def lose(folder):
    largest_file(folder / "params").unlink()


def position(folder):
    file = folder / "data" / "state.json"
    file.write_text(file.read_text().replace('"row": 6', '"row": 7'))


def config(folder):
    (folder / "config.json").write_text('{"model_type": "mo')


@pytest.mark.parametrize(
    "damage", [truncate, flip, lose, position, config], ids=lambda f: f.__name__
)
def test_a_damaged_one_is_noticed_and_the_one_before_it_used(two, damage):
    damage(two / "checkpoints" / "00000006")
    said = []
    checkpoints = keeper(two, said)
    state, where, folder = checkpoints.restore()
    assert where == at(3) and folder.name == "00000003"
    equal(state, state_at(checkpoints, 3))
    assert len(said) == 1 and "00000006: damaged" in said[0]
    assert [p.name for p in committed(two)] == ["00000003"]
    checkpoints.save(state_at(checkpoints, 6), at(6))  # the step comes round again
    checkpoints.wait()
    assert keeper(two).restore()[1] == at(6)


def test_a_crash_in_the_middle_of_a_save(two):
    (two / "checkpoints" / "00000006" / "config.json").unlink()
    assert keeper(two).restore()[2].name == "00000003"
    assert not (two / "checkpoints" / "00000006").exists()


def test_another_architecture_is_refused(two):
    other = keeper(two, model=MODEL.replace(intermediate_size=24))
    with pytest.raises(ValueError, match="another model: intermediate_size expected 24, got 16"):
        other.restore()
    assert len(committed(two)) == 2


def test_only_the_newest_are_kept_and_nothing_is_saved_twice(tmp_path):
    checkpoints = keeper(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(checkpoints, step), at(step))
    checkpoints.save(state_at(checkpoints, 3), at(99))
    checkpoints.wait()
    assert [p.name for p in committed(tmp_path)] == ["00000002", "00000003"]
    assert keeper(tmp_path).restore()[1] == at(3)


def test_a_path_of_epath(tmp_path):
    """What a bucket's path is: etils' class, not pathlib's."""
    checkpoints = keeper(epath.Path(tmp_path))
    checkpoints.save(state_at(checkpoints, 3), at(3))
    checkpoints.wait()
    assert keeper(epath.Path(tmp_path)).restore()[1] == at(3)


def test_none_without_a_checkpoint(tmp_path):
    assert keeper(tmp_path).restore() is None


FULL = """
import resource, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import pathlib
from test_checkpoint import at, keeper, state_at, MODEL
from train.cli import leave
model = MODEL.replace(hidden_size=256, vocab_size=1024)
checkpoints = keeper(pathlib.Path({workdir!r}), model=model)
checkpoints.save(state_at(checkpoints, 3), at(3))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(state_at(checkpoints, 6), at(6))
    checkpoints.wait()
except OSError as error:
    print("error:", error)
    leave(2)
"""


def test_a_disk_that_fills_up_during_a_save(tmp_path):
    """No file may grow beyond 100 kB, which meets a writer as a full disk does."""
    code = FULL.format(root=str(ROOT), workdir=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "checkpoint of step 6: could not be written" in lines[0]
    assert lines[0].endswith("00000003")
    assert [p.name for p in committed(tmp_path)] == ["00000003"]
    assert json.loads((tmp_path / "checkpoints/00000003/data/state.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_mark_sees_every_bit_and_no_mesh(dtype):
    rng = np.random.default_rng(0)
    words = np.asarray(rng.normal(size=(6, 5)), dtype)

    def mark(x):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState({"x": jnp.asarray(x)}, StableAdamWState(zero, {}, {}))
        return int(fingerprints(state)["params x"])

    whole = mark(words)
    bits = words.view(np.uint32 if dtype == np.float32 else np.uint16)
    factors = 2 * np.arange(30, dtype=np.uint64).reshape(6, 5) + 1
    assert whole == int((bits.astype(np.uint64) * factors).sum() % 2**32)
    for place in np.ndindex(words.shape):
        for bit in range(bits.itemsize * 8):
            changed = bits.copy()
            changed[place] ^= bits.dtype.type(1 << bit)
            assert (int((changed.astype(np.uint64) * factors).sum()) % 2**32) != whole
    swapped = words.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert mark(swapped) != whole
