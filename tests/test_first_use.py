"""The first-use check, with a stand-in for a kernel on this CPU: what passes, fails and is kept."""

import functools
import json
import multiprocessing
import os
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertModel, attention as op
from modernbert_jax.attention import dispatch, first_use, reference
from modernbert_jax.attention.rope import rotated
from train.common.sharding import make_mesh
from train.pretrain.config import TrainConfig
from train.pretrain.setup import settle_attention

NAME = "pallas_hopper"
Q = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
BOUNDS = op.make_bounds(jnp.ones((1, 64), jnp.int32))
check = functools.partial(op.check, dtype="float32", head_dim=8)


def right(*arrays, scale):
    return reference.attention(*arrays, scale=scale)


def wrong(*arrays, scale):
    return right(*arrays, scale=scale * 1.1)


def wrong_gradient(q, k, v, bounds, *, scale):
    return right(q, k, jax.lax.stop_gradient(v), bounds, scale=scale)


def raises(*arrays, scale):
    raise RuntimeError("ptxas exited with error code 2\nand much more")


def nan(*arrays, scale):
    return right(*arrays, scale=scale) * jnp.nan


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Returns install(function): makes it the only kernel, which this CPU supports.

    install.calls counts its traces; install.forget() stands for a new process.
    """
    monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "LENGTH", 90)
    monkeypatch.setattr(first_use, "_OUTCOMES", {})
    whole = dispatch.refusal
    monkeypatch.setattr(
        dispatch, "refusal", lambda name, *a: None if name == NAME else whole(name, *a)
    )
    own = dispatch._function

    def install(function):
        def counted(*arrays, scale):
            install.calls += 1
            return function(*arrays, scale=scale)

        turning = functools.partial(rotated, counted)
        monkeypatch.setattr(dispatch, "_function", lambda n: turning if n == NAME else own(n))

    install.calls = 0
    install.forget = first_use._OUTCOMES.clear
    return install


def test_a_right_kernel_is_run_once_and_then_remembered(kernel, tmp_path):
    kernel(right)
    before = op.choose(Q, BOUNDS)
    assert before.name == "xla" and before.unchecked == (NAME,)
    assert f"{NAME} not checked on this cpu yet" in before.reason and kernel.calls == 0
    lines = []
    assert check(log=lines.append).name == NAME
    assert lines == [f"attention: {NAME}: passed its check on cpu"]
    calls = kernel.calls
    assert calls > 0
    kernel.forget()  # the next process finds the record, and runs nothing
    assert op.choose(Q, BOUNDS).name == NAME and check().name == NAME
    assert kernel.calls == calls
    # Another dtype, head size or kind of layer's tiles is another kernel.
    other = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    assert op.choose(other, BOUNDS).name == "xla"
    (record,) = (tmp_path / "attention").glob("*.json")
    assert not list((tmp_path / "attention").glob(".*"))
    facts = json.loads(record.read_text())["facts"]
    assert facts["device"] == "cpu" and facts["runtime"] and facts["jax"][0] == jax.__version__


@pytest.mark.parametrize(
    "function, reason",
    [
        (wrong, "error .*, tolerance 2e-05"),
        (wrong_gradient, "error 1.*, tolerance 2e-05"),
        (raises, "RuntimeError: ptxas exited with error code 2"),
        (nan, "error nan, tolerance 2e-05"),
    ],
)
def test_a_kernel_that_fails_is_warned_of_and_never_used(kernel, function, reason):
    kernel(function)
    with pytest.warns(UserWarning, match=f"{NAME}: failed its check on cpu .{reason}.; it is not"):
        choice = check()
    assert choice.name == "xla" and f"{NAME} failed its check" in choice.reason
    kernel.forget()
    with warnings.catch_warnings():  # remembered: neither run nor warned of again
        warnings.simplefilter("error")
        kernel(right)
        assert check().name == "xla"
        assert op.choose(Q, BOUNDS).unchecked == ()


def test_other_code_driver_or_version_is_checked_again(kernel, monkeypatch):
    kernel(right)
    assert check().name == NAME
    monkeypatch.setattr(first_use, "_source_digest", lambda: "another")
    kernel.forget()
    assert op.choose(Q, BOUNDS).unchecked == (NAME,)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"facts": 1}', '{"passed": true}', '{"started": "now"}']
)
def test_a_damaged_record_counts_for_nothing(kernel, tmp_path, text):
    kernel(right)
    check()
    (record,) = (tmp_path / "attention").glob("*.json")
    kernel.forget()
    record.write_text(text)
    assert op.choose(Q, BOUNDS).name == "xla"
    assert check().name == NAME  # written again
    kernel.forget()
    assert op.choose(Q, BOUNDS).name == NAME


def test_a_record_that_was_changed_to_another_kernel_counts_for_nothing(kernel, tmp_path):
    kernel(right)
    check()
    (record,) = (tmp_path / "attention").glob("*.json")
    value = json.loads(record.read_text())
    value["facts"]["source"] = "another"
    record.write_text(json.dumps(value))
    kernel.forget()
    assert op.choose(Q, BOUNDS).name == "xla"


def _crash(folder):
    os.environ["MODERNBERT_JAX_CACHE"] = folder
    first_use._OUTCOMES.clear()
    first_use.examine(NAME, lambda *a, scale: os._exit(7), jax.devices()[0], "float32", 8)


def test_a_check_that_crashed_is_a_failure_for_the_next_process(kernel, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_crash, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 7
    kernel(right)
    choice = check()
    assert choice.name == "xla" and "crashed or hung in it; delete " in choice.reason
    assert kernel.calls == 0
    (record,) = (tmp_path / "attention").glob("*.json")
    record.unlink()
    kernel.forget()
    assert check().name == NAME


def test_a_check_that_another_process_is_running_is_not_waited_for(kernel, tmp_path):
    kernel(right)
    facts = first_use._facts(NAME, jax.devices()[0], "float32", 8)
    first_use._write(facts, {"started": [first_use.time.time(), "another host", 1]})
    assert op.choose(Q, BOUNDS).unchecked == (NAME,)
    assert check().name == NAME


def _check(folder, ready):
    os.environ["MODERNBERT_JAX_CACHE"] = folder
    ready.wait()
    outcome = first_use.examine(NAME, right, jax.devices()[0], "float32", 8)
    os._exit(0 if outcome.passed else 1)


def test_two_processes_at_once_leave_one_good_record(kernel, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    both = [context.Process(target=_check, args=(str(tmp_path), ready)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [p.suffix for p in (tmp_path / "attention").iterdir()] == [".json"]
    assert op.choose(Q, BOUNDS).name == NAME


def test_a_folder_that_cannot_be_written_is_warned_of(kernel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path / "file"))
    kernel(right)
    with pytest.warns(UserWarning, match="cannot be written .*; set MODERNBERT_JAX_CACHE"):
        assert check().name == NAME


def test_nothing_is_run_inside_a_trace(kernel):
    kernel(right)

    @jax.jit
    def traced(x):
        assert check().name == "xla"
        return x

    traced(jnp.ones(3))
    assert kernel.calls == 0
    x = jnp.ones(Q.shape)
    with pytest.warns(UserWarning, match=f"{NAME} not checked .*attention.check"):
        jax.jit(lambda x: op.attention(x, x, x, BOUNDS, scale=1.0))(x)
    assert kernel.calls == 0
    check()
    calls = kernel.calls
    jax.jit(lambda x: op.attention(x, x, x, BOUNDS, scale=2.0))(x)
    assert kernel.calls == calls + 1  # once it has passed, it is what jit uses


def test_an_absent_device_is_not_run_on(kernel, monkeypatch):
    kernel(right)
    monkeypatch.setitem(op.PROVEN, (NAME, "sm90"), op.COMPILED)
    absent = types.SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
    lines = []
    assert check(absent, log=lines.append).name == NAME and kernel.calls == 0
    assert lines == [f"attention: {NAME}: assumed for sm90, where a run checks it first"]


def test_one_process_where_it_fails_is_enough(kernel):
    kernel(right)
    choice = check(everywhere=lambda passed: False)
    assert choice.name == "xla" and "wrong on another process of this job" in choice.reason
    kernel.forget()
    assert check(everywhere=lambda passed: passed).name == NAME  # the other job is another


class TestTheRunKeepsToItsChoice:
    @staticmethod
    def settle(workdir, attention=None):
        config = TrainConfig(attention=attention)
        mesh = make_mesh(devices=jax.devices()[:1])
        return settle_attention(config, ModernBertConfig.tiny(), mesh, workdir).attention

    @staticmethod
    def record(workdir):
        return json.loads((workdir / "attention.json").read_text())

    def test_a_resumed_run_takes_the_same(self, kernel, tmp_path, capsys):
        kernel(right)
        for _ in range(2):
            assert self.settle(tmp_path) is None and self.record(tmp_path) == {"cpu": NAME}
        assert capsys.readouterr().out == f"attention: {NAME}: passed its check on cpu\n" * 2

    def test_a_run_that_began_without_the_kernel_goes_on_without_it(self, kernel, tmp_path, capsys):
        (tmp_path / "attention.json").write_text('{"cpu": "xla", "NVIDIA H100": "pallas_hopper"}')
        kernel(right)
        assert self.settle(tmp_path) == "xla"
        assert f"attention: xla, as before; --attention {NAME} would" in capsys.readouterr().out
        assert self.settle(tmp_path, NAME) == NAME  # named
        assert f"attention: was xla, is {NAME}" in capsys.readouterr().out
        assert self.record(tmp_path) == {"cpu": NAME, "NVIDIA H100": "pallas_hopper"}

    def test_a_kernel_that_fails_since_is_refused_by_name(self, kernel, tmp_path):
        (tmp_path / "attention.json").write_text(f'{{"cpu": "{NAME}"}}')
        kernel(wrong)
        with (
            pytest.warns(UserWarning, match="failed its check"),
            pytest.raises(ValueError, match=f"attention: this run used {NAME} on cpu.*--attention"),
        ):
            self.settle(tmp_path)
        assert self.settle(tmp_path, "xla") == "xla"

    def test_a_damaged_record_is_named(self, kernel, tmp_path):
        kernel(right)
        (tmp_path / "attention.json").write_text('{"cpu": 7}')
        with pytest.raises(ValueError, match="attention.json: expected one of reference, .*got 7"):
            self.settle(tmp_path)


def test_loading_a_model_checks_its_device(kernel, tmp_path):
    model = ModernBertModel(ModernBertConfig.tiny(), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "model")
    kernel(right)
    loaded = ModernBertModel.from_pretrained(tmp_path / "model")
    head_dim = loaded.config.head_dim
    assert op.choose(jax.ShapeDtypeStruct((1, 8, 1, head_dim), jnp.float32), BOUNDS).name == NAME


def test_a_measured_kernel_is_not_run(kernel, monkeypatch):
    kernel(raises)
    monkeypatch.setitem(op.PROVEN, (NAME, "cpu"), op.MEASURED)
    assert check().name == NAME and kernel.calls == 0


@pytest.mark.parametrize("rotates", [True, False])
def test_the_form_that_training_uses_is_checked_too(monkeypatch, tmp_path, rotates):
    """A kernel that is right by itself but forgets the rotation of a packed call fails."""
    monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "LENGTH", 90)
    monkeypatch.setattr(first_use, "_OUTCOMES", {})

    def turned(x_BLHK, rope):
        first, second = jnp.split(x_BLHK, 2, axis=-1)
        z = (first + 1j * second) * (rope[0] + 1j * rope[1])[:, :, None]
        return jnp.concatenate([z.real, z.imag], axis=-1).astype(x_BLHK.dtype)

    def kernel(q, k, v, bounds, *, scale, rope=None):
        if k is None:
            q, k, v = (q[:, :, :, i].reshape(*q.shape[:2], -1, q.shape[-1]) for i in range(3))
        if rope is not None and rotates:
            q, k = turned(q, rope), turned(k, rope)
        return right(q, k, v, bounds, scale=scale)

    outcome = first_use.examine(NAME, kernel, jax.devices()[0], "float32", 8, per_block=4)
    assert outcome.passed is rotates
    assert first_use.examine(NAME, kernel, jax.devices()[0], "float32", 8).passed
