"""Runs under attack: damaged checkpoints, a disk that fills up, hosts that were given other things.

`make attack` runs all trials, `make test` a tenth of them. They are seeded.
"""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import pytest

from modernbert_jax.checkpoint.orbax import load_orbax
from tests.test_durability import Workdir
from tests.test_hosts import Job
from train.common.workdir import committed
from train.corpora.synthetic import write_corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


def seeds(count):
    """Seeds of trials, of which `make test` runs a tenth."""
    return [i if i % 10 == 0 else pytest.param(i, marks=SLOW) for i in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 300, seed=1)
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("checkpoints")
    Workdir(workdir, 1, 2)
    return workdir


def damage(path, how, draw):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        for _ in range(1 if how == "a bit" else 64):
            if content:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


@pytest.mark.parametrize("seed", seeds(60))
def test_a_damaged_file_of_a_checkpoint(two_steps, tmp_path, seed):
    """The newest checkpoint is used, or the one before it: never a mixture, never an error."""
    draw = random.Random(seed)
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    files = sorted(p for p in (tmp_path / "checkpoints" / "00000002").rglob("*") if p.is_file())
    kinds = sorted({(p.suffix, p.parent.name, len(p.name) > 20) for p in files})
    kind = kinds[seed % len(kinds)]
    path = draw.choice([p for p in files if (p.suffix, p.parent.name, len(p.name) > 20) == kind])
    damage(path, draw.choice(["deleted", "emptied", "cut", "longer", "a bit", "bits"]), draw)
    assert Workdir(tmp_path).restored() in ((1, 100), (2, 200))


FLAGS = (
    "--phases.0.tokens", "30000", "--phases.0.warmup-tokens", "0", "--sequence-length", "128",
    "--global-batch-size", "8", "--model.vocab-size", "512", "--model.hidden-size", "64",
    "--model.intermediate-size", "96", "--mesh.data", "1",
    "--checkpoint-every", "1", "--keep-checkpoints", "99", "--eval-every", "99",
    "--eval-sequences", "8",
)  # fmt: skip


@SLOW
@pytest.mark.parametrize("megabytes", [6, 9, 14])
def test_a_disk_that_fills_up(corpus, megabytes):
    """One line, exit code 2, the last checkpoint intact; with room the same command goes on."""
    folder = pathlib.Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        command = [sys.executable, "-m", "train", "pretrain", "--corpus", str(corpus), *FLAGS]
        command += ["--workdir", str(folder / "w")]
        run = lambda: subprocess.run(  # noqa: E731
            command, cwd=ROOT, capture_output=True, text=True, timeout=500,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        )  # fmt: skip
        done = run()
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1, done.stderr
        assert "No space left" in errors[0]
        # Orbax's threads may still call into an event loop that it closed; Python ignores that.
        assert done.stderr.count("Traceback") == done.stderr.count("Exception ignored in")
        kept = committed(folder / "w")
        for checkpoint in kept:
            load_orbax(checkpoint, optimizer=True)
        subprocess.run([*mount[:3], "-o", "remount,size=400m", "tmpfs", str(folder)], check=True)
        done = run()
        assert done.returncode == 0, done.stderr
        assert not kept or f"resuming from {kept[-1]}" in done.stdout
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


@SLOW
@pytest.mark.parametrize("name", ["checkpoint_every", "eval_every", "seed"])
def test_hosts_with_other_flags(corpus, tmp_path, name):
    job = Job(corpus, tmp_path, changes=({}, {name: 5}))
    output = job.end()
    assert job.codes() == [1, 1], output
    for text in output:
        assert f"error: hosts: process 1 differs from process 0 in {name}" in text
    assert not list(tmp_path.glob("checkpoints/*"))


@SLOW
@pytest.mark.parametrize("notes", [300, 200])
def test_hosts_with_other_text_under_the_same_path(tmp_path, notes):
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        write_corpus(tmp_path / str(index) / "notes", notes if index else 300, seed=index)
    folders = [str(tmp_path / str(index)) for index in (0, 1)]
    job = Job("notes", tmp_path / "w", folders=folders)
    output = job.end()
    assert job.codes() == [1, 1], output
    for text in output:
        assert "error: hosts: process 1 differs from process 0 in the corpora" in text


@SLOW
def test_hosts_with_a_workdir_of_their_own(corpus, tmp_path):
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
    job = Job(corpus, "w", folders=[str(tmp_path / str(index)) for index in (0, 1)])
    output = job.end()
    assert job.codes() == [1, 1], output
    for text in output:
        assert "process 1 does not see the files of process 0" in text
