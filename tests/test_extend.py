"""A finished run is extended by a further phase, or by a larger budget from before its decay."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from modernbert_jax import ModernBertConfig
from modernbert_jax.checkpoint.orbax import load_orbax
from train import cli
from train.common.metrics import read_metrics
from train.common.sharding import MeshShape
from train.corpora.synthetic import write_corpus
from train.pretrain import run as loop
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.data import Position
from train.pretrain.extend import Past, count_kept, kept, precedes

ADAPT = Phase("adapt", tokens=4_000, learning_rate=3e-3, warmup_tokens=1_000)
DECAY = Phase("decay", tokens=2_500, mlm_probability=0.15, learning_rate=3e-3, decay_tokens=2_500)
MORE = Phase("more", tokens=2_000, mlm_probability=0.15, learning_rate=1e-3)
LONGER = (
    dataclasses.replace(ADAPT, tokens=7_000),
    dataclasses.replace(DECAY, tokens=3_500, decay_tokens=3_500),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 120, seed=1)
    return folder


def small(corpus, workdir, *phases, **changes) -> TrainConfig:
    model = ModernBertConfig.tiny(
        vocab_size=512, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        attention_out_dropout=0.1,
    )  # fmt: skip
    config = TrainConfig(
        model=model, phases=phases or (ADAPT, DECAY), corpus=(str(corpus),), workdir=str(workdir),
        sequence_length=128, global_batch_size=8, eval_every=100, eval_sequences=8,
        checkpoint_every=2, keep_checkpoints=1, eval_fraction=0.1, mesh=MeshShape(data=1),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The workdir of a finished run of two phases."""
    workdir = tmp_path_factory.mktemp("finished") / "w"
    loop.run(small(corpus, workdir))
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    """A workdir with that run, to extend."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def checkpoints(workdir):
    return sorted((pathlib.Path(workdir) / "checkpoints").iterdir())


def check_equal(workdir, other):
    """Both runs end in the same weights and moments, after the same losses."""
    ours, theirs = (load_orbax(checkpoints(w)[-1], optimizer=True) for w in (workdir, other))
    assert ours["data"]["fingerprints"] == theirs["data"]["fingerprints"]
    for key, value in theirs["params"].items():
        np.testing.assert_array_equal(ours["params"][key], value)
        for part in ("mu", "nu"):
            moment = theirs["optimizer"][part][key]
            np.testing.assert_array_equal(ours["optimizer"][part][key], moment)
    assert losses(workdir) == losses(other)


def losses(workdir):
    lines = read_metrics(pathlib.Path(workdir))
    return [(m["step"], m["loss"]) for m in lines if m["kind"] == "train"]


def test_by_a_phase(corpus, copy, tmp_path, capsys):
    newest = checkpoints(copy)[-1].name
    extended = small(corpus, copy, ADAPT, DECAY, MORE, extend=True)
    result = loop.run(extended)
    out = capsys.readouterr().out
    assert "extend: a further phase, more; nothing is discarded" in out
    assert f"resuming from {copy / 'checkpoints' / newest}" in out
    assert [p["phase"] for p in result["phases"]] == ["adapt", "decay", "more"]
    loop.run(small(corpus, tmp_path / "alone", ADAPT, DECAY, MORE))
    check_equal(copy, tmp_path / "alone")
    # The same command again resumes, with or without the flag.
    for flag in (True, False):
        assert loop.run(dataclasses.replace(extended, extend=flag))["phases"] == result["phases"]
        assert "extend: " not in capsys.readouterr().out


def test_by_a_larger_budget(corpus, copy, tmp_path, capsys):
    last = losses(copy)[-1][0]
    first_decayed = min(
        m["step"] for m in read_metrics(copy) if m["kind"] == "train" and m["phase"] == "decay"
    )
    names = [path.name for path in checkpoints(copy)]
    assert names == [f"{first_decayed - 1:08d}", f"{last:08d}"]  # one is kept for this
    loop.run(small(corpus, copy, *LONGER, extend=True))
    out = capsys.readouterr().out
    assert (
        f"extend: phase adapt starts again from step {first_decayed - 1}, before the decay; steps "
        f"{first_decayed} to {last} are discarded" in out
    )
    loop.run(small(corpus, tmp_path / "alone", *LONGER))
    check_equal(copy, tmp_path / "alone")


def test_a_decay_within_a_phase_and_only_it(corpus, tmp_path):
    """The checkpoint before the decay is written although none is due, and kept."""
    one = dataclasses.replace(ADAPT, tokens=5_000, decay_tokens=2_000)
    two = dataclasses.replace(ADAPT, tokens=8_000, decay_tokens=3_000)
    loop.run(small(corpus, tmp_path / "a", one, checkpoint_every=100))
    assert len(checkpoints(tmp_path / "a")) == 2
    loop.run(small(corpus, tmp_path / "a", two, checkpoint_every=100, extend=True))
    loop.run(small(corpus, tmp_path / "b", two))
    check_equal(tmp_path / "a", tmp_path / "b")


def test_a_restart_within_the_extension(corpus, copy, tmp_path, monkeypatch):
    """What ends while it discards or trains is continued by the same command."""
    extended = small(corpus, copy, *LONGER, extend=True)
    remove = loop.Checkpoints.discard_after

    def ends(self, folder):
        remove(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoints, "discard_after", ends)
    with pytest.raises(KeyboardInterrupt):
        loop.run(extended)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.run(extended)
    shutil.rmtree(checkpoints(copy)[-1])
    loop.run(dataclasses.replace(extended, extend=False))
    loop.run(small(corpus, tmp_path / "alone", *LONGER))
    check_equal(copy, tmp_path / "alone")


def test_epochs_keep_what_the_run_has_fixed(corpus, tmp_path, capsys):
    """More epochs move the decay; sequence, step and warm-up stay as they were."""
    changes = {"fit_to_corpus": True, "global_batch_size": 64, "gradient_accumulation_steps": None}
    one = small(corpus, tmp_path, epochs=0.6, **changes)
    loop.run(one)
    before = json.loads((tmp_path / "run.json").read_text())["derived"]
    loop.run(dataclasses.replace(one, epochs=1.0, extend=True))
    after = json.loads((tmp_path / "run.json").read_text())["derived"]
    assert after["phases"][0]["tokens"] > before["phases"][0]["tokens"]
    assert after["phases"][1]["decay_tokens"] > before["phases"][1]["decay_tokens"]
    for name in ("sequence_length", "global_batch_size"):
        assert after[name] == before[name]
    assert after["phases"][0]["warmup_tokens"] == before["phases"][0]["warmup_tokens"] > 0
    assert "are discarded" in capsys.readouterr().out


class TestRefused:
    @pytest.mark.parametrize(
        "phases, message",
        [
            ((ADAPT,), "the run has 2 phases, got 1"),
            ((dataclasses.replace(ADAPT, mlm_probability=0.2), DECAY), "mlm_probability was 0.3"),
            ((dataclasses.replace(ADAPT, warmup_tokens=10), DECAY), "warmup_tokens was 1,000, is"),
            ((dataclasses.replace(ADAPT, tokens=3_000), DECAY), "tokens was 4,000, is 3,000"),
            (
                (ADAPT, dataclasses.replace(DECAY, decay_tokens=1_000)),
                "decay_tokens was 2,500, is 1,000; .* a larger budget has more tokens",
            ),
            ((MORE, ADAPT, DECAY), "phase more: learning_rate was 0.003, is 0.001"),
        ],
    )
    def test_another_change_of_a_phase(self, corpus, copy, phases, message):
        self.refused(small(corpus, copy, *phases, extend=True), copy, message)

    def test_another_flag(self, corpus, copy):
        changed = small(corpus, copy, *LONGER, extend=True, seed=3)
        self.refused(changed, copy, "another configuration: seed was 17, is 3")

    def test_without_the_flag(self, corpus, copy):
        self.refused(small(corpus, copy, *LONGER), copy, "or --extend for a larger budget")
        more = small(corpus, copy, ADAPT, DECAY, MORE)
        self.refused(more, copy, "or --extend for a larger budget or further phases")

    def test_no_checkpoint_from_before_the_decay(self, corpus, copy):
        shutil.rmtree(checkpoints(copy)[0])
        extended = small(corpus, copy, *LONGER, extend=True)
        self.refused(extended, copy, "no checkpoint from before its decay is left")

    def test_another_corpus(self, corpus, copy, tmp_path):
        other = tmp_path / "other"
        write_corpus(other, 130, seed=2)
        record = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps(record | {"corpus": [str(other)]}))
        extended = small(other, copy, *LONGER, extend=True)
        self.refused(extended, copy, "phase adapt: the corpus is not the one")

    def test_nothing_to_extend(self, corpus, tmp_path, capsys):
        args = ["pretrain", "--config", "notebook", "--workdir", str(tmp_path), "--extend"]
        assert cli.main(args) == 2
        assert "leave --extend out to begin a run" in capsys.readouterr().err

    @staticmethod
    def refused(config, workdir, message):
        """One line, and nothing has been removed or recorded."""
        files = {path.name: path.read_text() for path in workdir.glob("*.json*")}
        names = [path.name for path in checkpoints(workdir)]
        with pytest.raises(ValueError, match=message):
            loop.run(config)
        assert [path.name for path in checkpoints(workdir)] == names
        assert {path.name: path.read_text() for path in workdir.glob("*.json*")} == files


def past(phase, tokens, began):
    return Past(Position(phase=phase, phase_tokens=tokens), began)


def test_which_checkpoints_are_kept():
    phases = (Phase("a", tokens=100), Phase("b", tokens=100, decay_tokens=40))
    pasts = {
        "a1": past(0, 50, 40), "a2": past(0, 105, 95), "b1": past(1, 50, 40),
        "b2": past(1, 65, 55), "b3": past(1, 75, 65), "b4": past(1, 101, 95),
    }  # fmt: skip
    assert kept(pasts, phases) == {"a2", "b2"}
    assert kept({"a1": pasts["a1"]}, phases) == {"a1"}
    assert precedes(pasts["b2"], phases, 1) and not precedes(pasts["b2"], phases, 0)
    assert count_kept(phases) == 2
    assert count_kept((ADAPT, DECAY)) == 1
    assert count_kept((DECAY,)) == count_kept((ADAPT,)) == 0
