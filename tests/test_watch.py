"""Norms by kind, spikes, stalls, goodput across crashes, and the profiler's window."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.weights import WEIGHTS, weight_of
from train.common.watch import Goodput, Profile, Spikes, Stall, norms_by_kind

ROOT = pathlib.Path(__file__).resolve().parents[1]
KINDS = {
    "embeddings", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", "norms", "head", "decoder",
}  # fmt: skip


def values():
    """Random parameters of a small model, each kind of another size."""
    config = ModernBertConfig.tiny(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=3
    )
    rng = np.random.default_rng(0)
    shapes = param_shapes(ModernBertForMaskedLM, config)
    return {
        path: np.asarray(rng.normal(size=s.shape) * (i + 1), np.float32)
        for i, (path, s) in enumerate(shapes.items())
    }


class TestNorms:
    def test_squares_add_up(self):
        params = values()
        norms = jax.jit(norms_by_kind)(params)
        assert set(norms) == KINDS
        total = sum(float(n) ** 2 for n in norms.values())
        assert total == pytest.approx(float(optax.tree.norm(params)) ** 2, rel=1e-5)

    def test_each_kind(self):
        params = values()
        norms = norms_by_kind(params)
        for kind, pattern in (("attn.Wqkv", ".attn.Wqkv.weight"), ("mlp.Wo", ".mlp.Wo.weight"),
                              ("norms", "norm.weight"), ("decoder", "decoder.bias")):  # fmt: skip
            parts = [v.ravel() for path, v in params.items() if path.endswith(pattern)]
            want = np.linalg.norm(np.concatenate(parts).astype(np.float64))
            assert float(norms[kind]) == pytest.approx(want, rel=1e-5), kind

    def test_sharded_leaves(self):
        params = values()
        mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
        spread = {
            k: jax.device_put(
                v, NamedSharding(mesh, PartitionSpec("fsdp" if v.shape[0] % 4 == 0 else None))
            )
            for k, v in params.items()
        }
        got, want = jax.jit(norms_by_kind)(spread), norms_by_kind(params)
        for kind in KINDS:
            assert float(got[kind]) == pytest.approx(float(want[kind]), rel=1e-6)

    def test_low_precision_is_summed_in_float32(self):
        """bfloat16 holds 1 + 2^-7, but not its square."""
        bias = {"decoder.bias": jnp.full((4096,), 1.0078125, jnp.bfloat16)}
        assert float(norms_by_kind(bias)["decoder"]) == 64.5

    def test_every_key_has_a_kind(self):
        kinds = {row.name: row.kind for row in WEIGHTS}
        assert set(kinds.values()) == KINDS | {"classifier"}
        assert kinds["head.norm.weight"] == kinds["model.embeddings.norm.bias"] == "norms"
        with pytest.raises(ValueError, match="extra.weight"):
            weight_of("extra.weight")


class TestSpikes:
    def falling(self, steps=400):
        """Losses as of a healthy run: they fall and are noisy."""
        noise = np.random.default_rng(0).normal(scale=0.03, size=steps)
        return 2.0 + 8.0 * np.exp(-np.arange(steps) / 60) + noise

    def test_a_healthy_run_is_silent(self):
        spikes = Spikes()
        assert [m for i, x in enumerate(self.falling()) if (m := spikes(i, float(x)))] == []

    def test_a_spike_is_flagged_once(self):
        spikes = Spikes()
        losses = self.falling()
        losses[300:305] += 3.0
        losses[350] += 3.0
        told = {i: m for i, x in enumerate(losses) if (m := spikes(i, float(x)))}
        assert list(told) == [300, 350]
        assert told[300].startswith("step 300: loss spike: 5.")

    def test_a_level_that_stays_becomes_usual(self):
        spikes = Spikes(window=50)
        told = [i for i in range(300) if spikes(i, 2.0 if i < 100 else 4.0 + 0.1 * (i == 250))]
        assert told == [100]

    def test_constant_losses_and_small_noise(self):
        """Without a floor any noise above a constant loss would be a spike."""
        spikes = Spikes()
        assert not any(spikes(i, 2.0) for i in range(100))
        assert spikes(100, 2.05) is None
        assert spikes(101, 3.0)

    def test_nan_is_a_spike(self):
        spikes = Spikes()
        assert not any(spikes(i, 2.0) for i in range(100))
        assert spikes(100, float("nan"))

    def test_the_first_steps_are_silent(self):
        spikes = Spikes()
        assert not any(spikes(i, x) for i, x in enumerate([11.0, 10.9, 50.0, 10.7]))


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


class TestStall:
    def test_shows_the_stacks_of_all_threads_and_repeats(self, tmp_path):
        secret = "a line of a note"
        release = threading.Event()

        def read_a_document(text):
            release.wait(30)
            return text

        reader = threading.Thread(target=read_a_document, args=(secret,), daemon=True)
        reader.start()
        path = tmp_path / "stderr"
        with path.open("w") as file:
            stall = Stall(0.001, file)
            wait_for(lambda: path.read_text().count("Timeout (0:00:00") >= 2)
            stall.close()
        release.set()
        reader.join()
        text = path.read_text()
        assert "in read_a_document" in text
        assert "in test_shows_the_stacks_of_all_threads_and_repeats" in text
        assert secret not in text

    def test_shows_a_call_that_holds_the_interpreter_lock(self, tmp_path):
        """A Python thread could not write while such a call runs."""
        path = tmp_path / "stderr"
        code = (
            "import sys; from train.common.watch import Stall\n"
            "def stuck(): return pow(3, 10**8)\n"
            "Stall(0.002, open(sys.argv[1], 'w')); stuck()"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        try:
            wait_for(lambda: path.exists() and "in stuck" in path.read_text(), 60)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()

    def test_silent_while_steps_are_done(self, tmp_path):
        path = tmp_path / "stderr"
        with path.open("w") as file:
            stall = Stall(0.05, file)  # 3 s
            for _ in range(20):
                stall.beat()
                time.sleep(0.005)
            stall.close()
        assert path.read_text() == ""

    def test_beat_restarts_the_wait(self, tmp_path):
        path = tmp_path / "stderr"
        with path.open("w") as file:
            stall = Stall(0.05, file)  # 3 s
            time.sleep(0.5)
            beat = time.monotonic()
            stall.beat()
            wait_for(lambda: "Timeout" in path.read_text())
            assert time.monotonic() - beat >= 2.9
            stall.close()

    def test_zero_minutes_is_never(self, tmp_path):
        with (tmp_path / "stderr").open("w") as file:
            stall = Stall(0.0, file)
            stall.beat()
            stall.close()
        assert (tmp_path / "stderr").read_text() == ""


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


class TestGoodput:
    def run(self, clock, goodput, steps, *, first, each=10.0):
        """Steps of `each` seconds, 1 of them waiting."""
        for step in range(first, first + steps):
            with goodput.doing("steps"):
                with goodput.doing("waiting"):
                    clock.pass_(1.0)
                clock.pass_(each - 1.0)
            yield step + 1

    def test_every_second_has_one_kind(self, tmp_path):
        clock = Clock()
        goodput = Goodput(tmp_path / "goodput.jsonl", 0, clock)
        clock.pass_(5)  # starting
        with goodput.doing("compiling"):
            clock.pass_(28)
        clock.pass_(2)  # starting again
        with goodput.doing("steps"):
            clock.pass_(60)
            with goodput.doing("evaluating"):
                clock.pass_(7)
            with goodput.doing("saving"):
                clock.pass_(3)
            clock.pass_(15)
        goodput.commit(10)
        seconds = goodput.seconds()
        assert seconds == {
            "starting": 7, "compiling": 28, "steps": 75, "evaluating": 7, "saving": 3,
            "waiting": 0, "wall": 120,
        }  # fmt: skip
        assert goodput.share() == 75 / 120

    @pytest.mark.parametrize("path_type", [pathlib.Path, epath.Path], ids=["local", "bucket"])
    def test_a_crash_loses_what_was_not_saved(self, tmp_path, path_type):
        """100 s of saved steps, 50 s lost, 150 s down, then 90 s of steps: 190 of 390."""
        path, clock = path_type(tmp_path / "goodput.jsonl"), Clock()
        goodput = Goodput(path, 0, clock)
        with goodput.doing("steps"):
            clock.pass_(100)
            goodput.commit(10)
            clock.pass_(50)
        clock.pass_(150)
        goodput = Goodput(path, 10, clock)
        with goodput.doing("steps"):
            clock.pass_(90)
        goodput.commit(19)
        assert goodput.seconds()["steps"] == 190
        assert goodput.share() == 190 / 390

    def test_work_done_again_counts_once(self, tmp_path):
        """The newest checkpoint was damaged: the run goes on from the one before it."""
        path, clock = tmp_path / "goodput.jsonl", Clock()
        goodput = Goodput(path, 0, clock)
        for step in (10, 20, 30):
            with goodput.doing("steps"):
                clock.pass_(100)
            goodput.commit(step)
        goodput = Goodput(path, 20, clock)
        with goodput.doing("steps"):
            clock.pass_(100)
        goodput.commit(30)
        assert goodput.seconds()["steps"] == 300
        assert goodput.share() == 300 / 400

    def test_many_restarts_against_a_simulation(self, tmp_path):
        """Crashes at random; each step's last, kept execution is what counts."""
        rng, clock, path = np.random.default_rng(0), Clock(), tmp_path / "goodput.jsonl"
        start, saved, kept, open_ = clock.now, 0, {}, {}
        for _ in range(20):
            goodput = Goodput(path, saved, clock)
            clock.pass_(float(rng.integers(1, 20)))
            step = saved
            for step in self.run(clock, goodput, int(rng.integers(1, 12)), first=saved):
                open_[step] = 9.0
                if step % 4 == 0:
                    goodput.commit(step)
                    saved, kept, open_ = step, kept | open_, {}
            open_ = {}
            clock.pass_(float(rng.integers(0, 100)))  # down
        last = Goodput(path, saved, clock)
        assert last.seconds()["steps"] == sum(kept.values()) > 0
        assert last.share() == pytest.approx(sum(kept.values()) / (clock.now - start))

    def test_other_hosts_write_nothing(self, tmp_path):
        clock = Clock()
        goodput = Goodput(None, 0, clock)
        with goodput.doing("steps"):
            clock.pass_(10)
        goodput.commit(1)
        assert goodput.share() == 1.0
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("cut", [1, 10, 40])
    def test_a_line_cut_short_is_left_out(self, tmp_path, cut):
        path, clock = tmp_path / "goodput.jsonl", Clock()
        goodput = Goodput(path, 0, clock)
        for step in (10, 20):
            with goodput.doing("steps"):
                clock.pass_(100)
            goodput.commit(step)
        path.write_bytes(path.read_bytes()[: -1 - cut])
        goodput = Goodput(path, 10, clock)  # the checkpoint of step 20 was not seen either
        with goodput.doing("steps"):
            clock.pass_(100)
        goodput.commit(20)
        assert goodput.seconds()["steps"] == 200
        again = Goodput(path, 20, clock)
        assert again.seconds()["steps"] == 200
        kinds = ["start" if "start" in line else line["step"] for line in again.lines]
        assert kinds == ["start", 10, "start", 20, "start"]  # what follows the cut line is read

    def test_survives_kill(self, tmp_path):
        """kill -9 of a process that writes as fast as it can; then the ledger is read again."""
        path = tmp_path / "goodput.jsonl"
        code = (
            "import itertools, pathlib, sys\n"
            "from train.common.watch import Goodput\n"
            "g = Goodput(pathlib.Path(sys.argv[1]), 0)\n"
            "for step in itertools.count(1):\n"
            "    with g.doing('steps'): pass\n"
            "    g.commit(step)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        try:
            wait_for(lambda: path.exists() and path.stat().st_size > 20_000, 60)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        whole = [json.loads(t) for t in path.read_text().split("\n")[:-1]]
        last = max(line["step"] for line in whole)
        again = Goodput(path, last)
        again.commit(last + 1)
        assert 0 < again.share() < 1
        assert len(again.lines) == len(whole) + 2


class TestProfile:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What is asked of jax.profiler, which is not started."""
        calls = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
        return calls

    def test_a_window(self, calls):
        profile = Profile(3, 2, "traces")
        seen = []
        for step in range(1, 8):
            profile.before(step, jnp.zeros(()))
            seen.append(profile.running)
        profile.close()
        assert seen == [False, False, True, True, False, False, False]
        assert calls == ["traces", "stop"]

    def test_closed_in_the_middle(self, calls):
        profile = Profile(1, 5, "traces")
        profile.before(1)
        profile.close()
        profile.close()
        assert calls == ["traces", "stop"]

    @pytest.mark.parametrize("first", [0, 3])
    def test_never(self, calls, first):
        """By default, and where a resumed run is past its window."""
        profile = Profile(first, 2, "traces")
        for step in range(4, 8):
            profile.before(step)
        profile.close()
        assert calls == []

    @pytest.mark.slow
    def test_a_real_trace(self, tmp_path):
        profile = Profile(1, 1, tmp_path)
        profile.before(1)
        out = jax.jit(lambda x: x @ x)(jnp.ones((64, 64)))
        profile.before(2, out)
        assert list(tmp_path.rglob("*.xplane.pb"))
