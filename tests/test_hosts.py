"""Two real processes of four devices each, over loopback: against one process, killed, stopped.

`make soak` runs the killing twenty times, at random steps (SOAK_TRIALS).
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from modernbert_jax.checkpoint.orbax import load_orbax
from train.common.hosts import Hosts, connect
from train.common.metrics import read_metrics
from train.corpora.synthetic import write_corpus

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 14  # of the run below

SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dataclasses, os, pathlib
from test_pretrain import small
os.chdir({folder!r})
from train.common.hosts import Hosts
from train.common.sharding import MeshShape
from train.pretrain import run as loop
from train.pretrain.config import Phase
phase = Phase("one", tokens=14_000, mlm_probability=0.30, learning_rate=3e-3, warmup_tokens=2_000)
config = small(
    pathlib.Path({corpus!r}), pathlib.Path({workdir!r}), phases=(phase,), mesh=MeshShape(*{mesh}),
    hosts=Hosts({coordinator!r}, {count}, {index}, heartbeat_seconds=30), eval_every=7,
)
try:
    loop.run(dataclasses.replace(config, **{changes}))
except (OSError, RuntimeError, ValueError) as error:
    sys.exit(f"error: {{error}}")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 300, seed=1)
    return folder


class Job:
    """The processes of one start of a run.

    changes: to the configuration of each. folders: where each runs.
    """

    def __init__(
        self, corpus, workdir, count=2, mesh=(2, 2, 1, 2), changes=({}, {}), folders=(ROOT, ROOT)
    ):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        coordinator = f"127.0.0.1:{port}" if count > 1 else None
        self.workdir = workdir
        self.processes = []
        for index in range(count):
            code = SCRIPT.format(
                root=str(ROOT), corpus=str(corpus), workdir=str(workdir), mesh=mesh,
                coordinator=coordinator, count=count if count > 1 else None,
                index=index if count > 1 else None, changes=changes[index],
                folder=str(folders[index]),
            )  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={
                        **os.environ,
                        "JAX_NUM_CPU_DEVICES": str(8 // count),
                        "JAX_PLATFORMS": "cpu",
                        "OMP_NUM_THREADS": "1",
                    },
                )  # fmt: skip
            )

    def wait_for(self, steps):
        deadline = time.monotonic() + 400
        while len(losses(self.workdir)) < steps:
            for process in self.processes:
                assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, within=400):
        """The output of each process, all of which end by themselves."""
        return [process.communicate(timeout=within)[0] for process in self.processes]

    def codes(self):
        return [process.returncode for process in self.processes]


def losses(workdir):
    return {m["step"]: m["loss"] for m in read_metrics(workdir) if m["kind"] == "train"}


def weights(workdir):
    newest = sorted((workdir / "checkpoints").iterdir())[-1]
    return load_orbax(newest, optimizer=True)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("alone")
    job = Job(corpus, workdir)
    output = job.end()
    assert job.codes() == [0, 0], output
    assert max(losses(workdir)) == STEPS and "8 x" not in output[1]
    return workdir


def same_bits(workdir, alone):
    assert losses(workdir) == losses(alone)
    ours, theirs = weights(workdir), weights(alone)
    assert ours["data"]["position"] == theirs["data"]["position"]
    for key, value in theirs["params"].items():
        np.testing.assert_array_equal(ours["params"][key], value)
        for moment in ("mu", "nu"):
            np.testing.assert_array_equal(
                ours["optimizer"][moment][key], theirs["optimizer"][moment][key]
            )


def test_equals_one_process(alone, corpus, tmp_path):
    job = Job(corpus, tmp_path, count=1)
    output = job.end()
    assert job.codes() == [0], output
    ours, theirs = losses(tmp_path), losses(alone)
    np.testing.assert_allclose(
        [ours[s] for s in range(1, STEPS + 1)], [theirs[s] for s in range(1, STEPS + 1)], atol=1e-5
    )
    got, want = weights(tmp_path)["params"], weights(alone)["params"]
    for key, value in want.items():  # 1e-3 of the rates' sum, at most 3e-3 a step
        np.testing.assert_allclose(got[key], value, atol=1e-3 * 3e-3 * STEPS)


def trials():
    count = int(os.environ.get("SOAK_TRIALS", 0))
    draw = random.Random(count)
    soak = [(draw.randrange(2), draw.randrange(1, STEPS)) for _ in range(count)]
    return soak or [(1, 8), pytest.param(0, 5, marks=pytest.mark.slow)]


@pytest.mark.parametrize("victim, step", trials())
def test_killed_and_started_again_is_the_same_run_bit_for_bit(
    alone, corpus, tmp_path, victim, step
):
    job = Job(corpus, tmp_path)
    job.wait_for(step)
    job.processes[victim].send_signal(signal.SIGKILL)
    job.end(within=90)  # the survivor notices by itself
    assert all(code != 0 for code in job.codes())
    again = Job(corpus, tmp_path)
    output = again.end()
    assert again.codes() == [0, 0], output
    assert step < 7 or "resuming from" in output[0]
    same_bits(tmp_path, alone)


def test_sigterm_on_one_host_stops_all_after_a_save(alone, corpus, tmp_path):
    job = Job(corpus, tmp_path)
    job.wait_for(4)
    job.processes[1].send_signal(signal.SIGTERM)
    output = job.end()
    assert job.codes() == [0, 0], output
    assert "stopped; the same command resumes" in output[0]
    last = max(losses(tmp_path))
    assert last < STEPS
    assert (tmp_path / "checkpoints" / f"{last:08d}" / "config.json").exists()
    again = Job(corpus, tmp_path)
    output = again.end()
    assert again.codes() == [0, 0], output
    same_bits(tmp_path, alone)


@pytest.mark.slow
def test_goes_on_with_other_hosts_and_another_mesh(alone, corpus, tmp_path):
    job = Job(corpus, tmp_path)
    job.wait_for(7)
    job.processes[0].send_signal(signal.SIGTERM)
    job.end()
    assert job.codes() == [0, 0]
    again = Job(corpus, tmp_path, count=1, mesh=(8, 1, 1, 1))
    output = again.end()
    assert again.codes() == [0], output
    assert "mesh: data was 2, is 8" in output[0]
    ours, theirs = losses(tmp_path), losses(alone)
    np.testing.assert_allclose(
        [ours[s] for s in range(1, STEPS + 1)], [theirs[s] for s in range(1, STEPS + 1)], atol=1e-5
    )


AGREE = """
import pathlib
from train.common.hosts import Hosts, agree, check_shared, connect
connect(Hosts({coordinator!r}, 2, {index}))
shared, own = pathlib.Path({folder!r}), pathlib.Path({folder!r}) / "{index}"
own.mkdir()
agree(dict(seed=1, corpora=["a", "b"]))
check_shared(shared)
for check in (
    lambda: agree(dict(seed=1, eval_every=7 + {index})),
    lambda: agree(dict(corpora=["a"] * (1 + 2000 * {index}), **{{"b" * (1 + {index}): 2}})),
    lambda: check_shared(own),
):
    try:
        check()
    except ValueError as error:
        print("refused:", error, flush=True)
"""


def two_processes(script, **values):
    """Runs the script as two processes that meet; returns the output of each, which end with 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script.format(coordinator=coordinator, index=index, **values)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for index in (0, 1)
    ]  # fmt: skip
    output = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    return output


def test_processes_that_differ_are_told_the_same_line(tmp_path):
    for text in two_processes(AGREE, folder=str(tmp_path)):
        refused = [line for line in text.splitlines() if line.startswith("refused: ")]
        assert "process 1 differs from process 0 in eval_every; start all" in refused[0]
        assert "process 1 differs from process 0 in corpora" in refused[1]
        assert "process 1 does not see the files of process 0" in refused[2]
        assert len(refused) == 3


ATTENTION = """
import os, pathlib, sys
os.environ["MODERNBERT_JAX_CACHE"] = {folder!r} + "/{index}"
sys.path.insert(0, "tests")
from train.common.hosts import Hosts, connect
connect(Hosts({coordinator!r}, 2, {index}))
import jax
from modernbert_jax import ModernBertConfig
from modernbert_jax.attention import dispatch
from test_first_use import BOUNDS, NAME, right, wrong
from train.common.sharding import make_mesh
from train.pretrain.config import TrainConfig
from train.pretrain.setup import settle_attention
dispatch._function = lambda name: wrong if {index} else right
dispatch.refusal = lambda name, *a: None if name in (NAME, "xla") else "absent"
model = ModernBertConfig.tiny()
config = settle_attention(TrainConfig(), model, make_mesh(), pathlib.Path({folder!r}))
q = jax.ShapeDtypeStruct((1, 64, 1, model.head_dim), model.dtype)
print("chosen:", dispatch.choose(q, BOUNDS).reason)
"""


def test_a_kernel_that_is_wrong_on_one_host_is_used_on_none(tmp_path):
    first, second = two_processes(ATTENTION, folder=str(tmp_path))
    assert "chosen: xla: pallas_hopper failed its check: wrong on another process" in first
    assert "chosen: xla: pallas_hopper failed its check: error" in second
    assert (tmp_path / "attention.json").read_text() == '{"cpu": "xla"}\n'


LATE = """
import time
import jax
from train.common.hosts import Hosts, connect, first_then_others
connect(Hosts({coordinator!r}, 2, {index}))
jax.devices()
first_then_others("prepare", lambda: time.sleep(35 if {index} == 0 else 0))
print("met", flush=True)
"""


@pytest.mark.slow
def test_others_wait_longer_than_gloo():
    """A first process that prepares for long: Gloo's own collectives give up after 30 s."""
    assert all("met" in text for text in two_processes(LATE))


@pytest.mark.parametrize("hosts", [Hosts("127.0.0.1:1"), Hosts(count=2), Hosts("a:1", 2, 2)])
def test_flags_that_leave_something_open(hosts):
    with pytest.raises(ValueError, match="hosts: expected"):
        connect(hosts)
