"""What a run survives: explosions, full disks, damaged neighbors, files cut short."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from modernbert_jax.packing import IGNORE_INDEX
from tests.test_checkpoint import MODEL, at, keeper, started, state_at
from tests.test_pretrain import small
from train.common.metrics import MetricsWriter, read_metrics
from train.common.records import read_object
from train.common.watch import Goodput
from train.corpora.synthetic import write_corpus
from train.pretrain import run as loop
from train.pretrain.checkpoint import Diverged, check_evaluation
from train.pretrain.config import Optimizer, Phase
from train.pretrain.step import Trainer
from train.tokens.store import open_store

ONE_DEVICE = (1, 1, 1, 1)


class Workdir:
    """A working directory with checkpoints of the given steps; step n is at row 100 n."""

    def __init__(self, path, *steps, keep=2):
        self.path, self.lines = path, []
        self.checkpoints = keeper(path, self.lines, ONE_DEVICE, keep=keep)
        for step in steps:
            self.save(step)

    def save(self, step, change=lambda state: state):
        self.checkpoints.save(change(state_at(self.checkpoints, step)), at(100 * step))
        self.checkpoints.wait()

    def names(self):
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    def restored(self):
        """(step, row) as a new start finds them."""
        found = keeper(self.path, self.lines, ONE_DEVICE).restore()
        return found and (int(found[0].optimizer.step), found[1]["row"])


def reseal(folder, change):
    """Changes state.json as a program of another version would have written it."""
    path = folder / "data" / "state.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data | {"sha256": digest}))


def a_digit(folder):
    path = folder / "config.json"
    text = path.read_text()
    assert '"vocab_size": 64' in text
    path.write_text(text.replace('"vocab_size": 64', '"vocab_size": 65'))


DAMAGE = {
    "config.json with another digit": a_digit,
    "an empty config.json": lambda folder: (folder / "config.json").write_text(""),
    "config.json of {}": lambda folder: (folder / "config.json").write_text("{}"),
    "an empty state.json": lambda folder: (folder / "data" / "state.json").write_text(""),
    "state.json of a list": lambda folder: (folder / "data" / "state.json").write_text("[]"),
    "a position without its epoch": lambda f: reseal(f, lambda data: data["position"].pop("epoch")),
    "an unknown entry": lambda f: reseal(f, lambda data: data["position"].update(shard=1)),
}


class TestNeighbors:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self, tmp_path, damage):
        workdir = Workdir(tmp_path, 1, 2)
        damage(tmp_path / "checkpoints" / "00000002")
        assert workdir.restored() == (1, 100)
        (line,) = workdir.lines
        assert "00000002: damaged (" in line and "using the checkpoint before it" in line
        assert workdir.names() == ["00000001", "00000002.damaged"]

    def test_a_second_one_of_the_same_step(self, tmp_path):
        workdir = Workdir(tmp_path, 1, 2)
        (tmp_path / "checkpoints" / "00000002.damaged").mkdir()
        a_digit(tmp_path / "checkpoints" / "00000002")
        assert workdir.restored() == (1, 100)
        assert workdir.names() == ["00000001", "00000002.damaged", "00000002.damaged-2"]

    def test_other_names_among_the_checkpoints(self, tmp_path):
        workdir = Workdir(tmp_path, 1, 2)
        for name in ("²", "notes", "-0000003", "٣٣٣٣٣٣٣٣"):
            (tmp_path / "checkpoints" / name).mkdir()
            (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
        (tmp_path / "checkpoints" / "00000009").write_text("a file")
        assert workdir.restored() == (2, 200)
        assert {"²", "notes"} <= set(workdir.names()) and "00000009" not in workdir.names()


def weight_of_nan(state):
    name = next(iter(state.params))
    return state._replace(params={**state.params, name: state.params[name] * jnp.nan})


def huge_weight(state):
    name = next(iter(state.params))
    return state._replace(params={**state.params, name: state.params[name] + 1e3})


def infinite_moment(state):
    name = next(iter(state.params))
    nu = {**state.optimizer.nu, name: state.optimizer.nu[name] + jnp.inf}
    return state._replace(optimizer=state.optimizer._replace(nu=nu))


class TestExplosion:
    @pytest.mark.parametrize("change", [weight_of_nan, huge_weight, infinite_moment])
    def test_is_never_saved_and_removes_nothing(self, tmp_path, change):
        workdir = Workdir(tmp_path, 1, keep=1)
        with pytest.raises(
            Diverged, match=r"step 2: the root mean square of (params|nu) .*not sav"
        ):
            workdir.save(2, change)
        assert workdir.names() == ["00000001"] and workdir.restored() == (1, 100)
        workdir.save(2)
        assert workdir.names() == ["00000002"]

    def test_the_last_step(self, tmp_path):
        """Its loss is computed before its update, so that only the weights show it."""
        write_corpus(tmp_path / "c", 100, seed=1)
        phase = Phase("one", tokens=1_024, learning_rate=1e30)
        config = small(tmp_path / "c", tmp_path / "w", phases=(phase,), eval_every=9)
        for _ in range(2):  # the same command does not resume from what exploded
            with pytest.raises(Diverged, match="last good checkpoint: the start. Lower the lea"):
                loop.run(config)
        assert not (tmp_path / "w" / "export").exists()
        assert not (tmp_path / "w" / "result.json").exists()
        assert not list((tmp_path / "w").glob("checkpoints/*"))

    @pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1.6 * np.log(512)])
    def test_an_evaluation(self, loss):
        check_evaluation(np.log(512) + 0.3, 7, 512)
        with pytest.raises(Diverged, match="step 7: the evaluation loss is"):
            check_evaluation(loss, 7, 512)


class TestFullDisk:
    def test_tensorboard_is_switched_off(self, tmp_path, monkeypatch, capsys):
        """However many numbers follow: its own queue held ten, and then blocked for ever."""
        writer = MetricsWriter(tmp_path, 0)
        writer.write("train", 1, loss=2.0)

        def full(self, event):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(EventsWriter, "write_event", full)
        for step in range(2, 500):
            writer.write("train", step, loss=2.0)
        writer.close()
        error = capsys.readouterr().err
        assert error.count("TensorBoard is switched off") == 1 and "No space left" in error
        assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 500))

    def test_weights_and_biases_is_switched_off(self, tmp_path, monkeypatch, capsys):
        class Run:
            def log(self, values, step):
                raise ConnectionError("no route to host")

        monkeypatch.setattr("train.common.metrics._wandb_run", lambda *a: Run())
        writer = MetricsWriter(tmp_path, 0, "notes")
        writer.write("train", 1, loss=2.0)
        writer.close()
        error = capsys.readouterr().err
        assert error.count("Weights & Biases is switched off") == 1 and "no route" in error

    def test_metrics_end_the_run(self, tmp_path):
        writer = MetricsWriter(tmp_path, 0)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, writer._file.fileno())
        os.close(full)
        with pytest.raises(OSError, match="No space left"):
            writer.write("train", 1, loss=2.0)
        with pytest.raises(OSError, match="No space left"):
            writer.close()

    @pytest.mark.parametrize(
        "error, advice",
        [
            (OSError(errno.ENOSPC, "No space left on device"), True),
            (ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"), True),
            (OSError(errno.EMFILE, "Too many open files"), False),
            (RuntimeError("Barrier timed out: peer 1 is gone"), False),
        ],
        ids=lambda x: str(x)[:24],
    )
    def test_the_message_says_what_happened(self, tmp_path, error, advice):
        workdir = Workdir(tmp_path)
        with pytest.raises(OSError, match="the same command resumes from the start") as caught:
            workdir.checkpoints._fail(error)
        assert ("free disk space" in str(caught.value)) == advice
        assert str(error).split(":")[-1].strip() in str(caught.value)


def test_tensorboard_holds_the_numbers(tmp_path):
    """Read by the record format: a length, its checksum, the event, its checksum."""
    for resumed in (0, 2):
        writer = MetricsWriter(tmp_path, resumed)
        for step in range(resumed + 1, resumed + 4):
            writer.write("train", step, loss=float(step), phase="one")
        writer.close()
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values[-3:] == [(3, "train/loss", 3.0), (4, "train/loss", 4.0), (5, "train/loss", 5.0)]
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts[-1] == 3  # TensorBoard drops what an earlier start wrote from there on


class TestFilesOfAWorkdir:
    def test_a_broken_line_of_metrics_costs_that_line_only(self, tmp_path):
        good = [json.dumps({"kind": "train", "step": step}) for step in range(1, 5)]
        lines = [*good[:2], '{"kind": "tr', "[1]", "", "\x00\x00", '{"step": 9}', *good[2:]]
        (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{")
        assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4]

    def test_a_garbled_ledger(self, tmp_path):
        (tmp_path / "goodput.jsonl").write_bytes(b"\xff\x00garbage\n[]\n")
        goodput = Goodput(tmp_path / "goodput.jsonl", 0)
        goodput.commit(1)
        assert goodput.seconds()["wall"] >= 0

    @pytest.mark.parametrize("text", ["", "[]", '{"seed": 1', "\x00"])
    def test_run_json(self, tmp_path, text):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: expected .* JSON object.*delete it"):
            read_object(tmp_path / "run.json")

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"layout": "array_record 2"}', "\xff"])
    def test_a_manifest(self, tmp_path, text):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: expected .*prepare the corpus agai"):
            open_store(tmp_path)


NAN = float("nan")


@pytest.mark.parametrize(
    "name, value",
    [
        *(("eval_mlm_probability", v) for v in (0.0, 5.0, -1.0, NAN)),
        *(("phase.learning_rate", v) for v in (0.0, -1e-3, NAN, float("inf"))),
        *(("phase.mlm_probability", v) for v in (0.0, 1.0, NAN)),
        *(("phase.final_lr_ratio", v) for v in (-0.1, 1.5, NAN)),
        *(("phase.warmup_tokens", v) for v in (-1, -5_000)),
        *(("optimizer.b1", v) for v in (1.0, -0.1)),
        *(("optimizer.b2", v) for v in (1.5, 1.0, NAN)),
        *(("optimizer.eps", v) for v in (0.0, -1e-6)),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.max_learning_rate", -1.0),
        ("global_rope_theta", -1.0),
        ("seed", -1),
    ],
)
def test_hyperparameters_are_refused_by_name(tmp_path, name, value):
    group, _, field = name.rpartition(".")
    changes = {field: value}
    if group == "phase":
        changes = {"phases": (dataclasses.replace(Phase("one", tokens=9_000), **changes),)}
    elif group == "optimizer":
        changes = {"optimizer": Optimizer(**changes)}
    with pytest.raises(ValueError, match=f"{field}: expected"):
        small(pathlib.Path("c"), tmp_path, **changes).validate()


def test_a_batch_without_masked_tokens():
    """Documents of special tokens only: nothing to predict, and nothing becomes NaN."""
    ids = np.zeros((1, 8, 128), np.int32)
    ids[:, :, :2] = 1, 2
    batch = {
        "input_ids": ids,
        "segment_ids": (ids > 0).astype(np.int32),
        "predict_positions": np.zeros((1, 8, 4), np.int32),
        "labels": np.full((1, 8, 4), IGNORE_INDEX, np.int32),
    }
    trainer = started(ONE_DEVICE, MODEL)[0]
    for weighting in ("tokens", "sequences"):
        config = dataclasses.replace(trainer.config, loss_weighting=weighting, global_batch_size=8)
        one = Trainer(config, trainer.model_config, trainer.mesh)
        arrays = one.to_devices(batch)
        state, metrics = one.train_step(one.fresh(), arrays, np.float32(1e-3), np.float32(1e-3))
        assert float(metrics["loss"]) == float(metrics["accuracy"]) == 0
        assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves((state, metrics)))
