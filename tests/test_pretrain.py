"""The main job from its command line: both phases, exact resume, refusals."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tokenizers

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.orbax import load_orbax
from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.tokenizer import AutoTokenizer, add_tokens
from train import cli
from train.common.hosts import Hosts, connect
from train.common.metrics import MetricsWriter, read_metrics
from train.common.sharding import MeshShape, make_mesh
from train.corpora.build.bpe import train_bpe
from train.corpora.build.prepare import prepare
from train.corpora.synthetic import write_corpus
from train.pretrain import run as loop, setup
from train.pretrain.checkpoint import Diverged
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.data import build_row, eval_batches
from train.pretrain.session import SaveClock, Session, StopSignal
from train.pretrain.setup import masking_of, model_config_of, open_workdir, prepare as prepare_run
from train.pretrain.step import Trainer
from train.tokens.store import open_store

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 300, seed=1)
    return folder


def small(corpus, workdir, **changes) -> TrainConfig:
    model = ModernBertConfig.tiny(
        vocab_size=512, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        attention_out_dropout=0.1,
    )  # fmt: skip
    phases = (
        Phase("one", tokens=9_000, mlm_probability=0.30, learning_rate=3e-3, warmup_tokens=2_000),
        Phase("two", tokens=6_000, mlm_probability=0.15, learning_rate=3e-3, decay_tokens=6_000),
    )
    config = TrainConfig(
        model=model, phases=phases, corpus=str(corpus), workdir=str(workdir), sequence_length=128,
        global_batch_size=8, gradient_accumulation_steps=2, eval_every=5, eval_sequences=8,
        checkpoint_every=3, log_every=1,
        eval_fraction=0.1, mesh=MeshShape(data=1), fill_mask=("The patient was [MASK].",),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One whole run, left alone."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    config = small(corpus, workdir)
    return config, loop.run(config)


def losses(workdir):
    return {m["step"]: m["loss"] for m in read_metrics(workdir) if m["kind"] == "train"}


class TestRun:
    def test_phases_clocks_and_steps(self, finished):
        config, result = finished
        lines = [m for m in read_metrics(pathlib.Path(config.workdir)) if m["kind"] == "train"]
        assert (
            [m["step"] for m in lines]
            == list(range(1, len(lines) + 1))
            == list(range(1, result["steps"] + 1))
        )
        one, two = ([m for m in lines if m["phase"] == name] for name in ("one", "two"))
        assert one and two
        assert one[-1]["phase_tokens"] >= 9_000 > one[-2]["phase_tokens"]
        assert two[0]["phase_tokens"] < 1_100  # the clock restarts
        assert two[-1]["total_tokens"] == result["total_tokens"]
        assert two[-1]["total_tokens"] == one[-1]["phase_tokens"] + two[-1]["phase_tokens"]
        assert one[0]["learning_rate"] == 0 and two[0]["learning_rate"] == 3e-3
        assert two[-1]["learning_rate"] < two[0]["learning_rate"]
        share = lambda part: sum(m["masked"] for m in part) / sum(  # noqa: E731
            m["total_tokens"] - previous for m, previous in zip(
                part, [part[0]["total_tokens"] - part[0]["phase_tokens"]]
                + [m["total_tokens"] for m in part[:-1]], strict=True)
        )  # fmt: skip
        assert abs(share(one) - 0.30) < 0.03 and abs(share(two) - 0.15) < 0.03
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.3

    def test_what_it_leaves_behind(self, finished):
        config, result = finished
        workdir = pathlib.Path(config.workdir)
        assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert list((workdir / "tensorboard").glob("events*"))
        assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
        checkpoints = sorted(p.name for p in (workdir / "checkpoints").iterdir())
        # The two newest, and the last one before the decay, from which a larger budget starts.
        one = [m["step"] for m in read_metrics(workdir) if m.get("phase") == "one"]
        assert len(checkpoints) == 3 and checkpoints[-1] == f"{result['steps']:08d}"
        assert checkpoints[0] == f"{max(one):08d}"
        newest = workdir / "checkpoints" / checkpoints[-1]
        exported = ModernBertForMaskedLM.from_pretrained(workdir / "export")
        restored = ModernBertForMaskedLM.from_pretrained(newest)
        ids = np.arange(12, dtype=np.int32)[None]
        np.testing.assert_array_equal(exported(ids).logits, restored(ids).logits)
        card = (workdir / "export" / "README.md").read_text()
        assert f"- Tokens seen: {result['total_tokens']:,}\n- Steps: {result['steps']}\n" in card
        accuracies = [f"{phase['accuracy']:.1%}" for phase in result["phases"]]
        for name, accuracy in zip(("one", "two"), accuracies, strict=True):
            assert re.search(rf"^\| {name} \| all \| [\d.]+ \| {accuracy} \|", card, re.M)
        assert str(workdir.parent) not in card

    def test_transformers_reads_the_export(self, finished):
        transformers = pytest.importorskip("transformers")
        import torch

        folder = pathlib.Path(finished[0].workdir) / "export"
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("The patient has a [MASK].", return_tensors="pt")
        with torch.no_grad():
            want = theirs(**inputs).logits.numpy()
        ours = ModernBertForMaskedLM.from_pretrained(folder)
        got = ours(**{k: v.numpy() for k, v in inputs.items()}).logits
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    def test_again_does_nothing_new(self, finished):
        config, result = finished
        before = losses(pathlib.Path(config.workdir))
        again = loop.run(config)
        assert again["phases"] == result["phases"]
        assert losses(pathlib.Path(config.workdir)) == before

    def test_no_text_in_the_records(self, finished):
        """Neither metrics nor manifests hold a sentence of the corpus."""
        workdir = pathlib.Path(finished[0].workdir)
        source = pathlib.Path(finished[0].corpus[0])
        first = next(source.glob("*.jsonl")).read_text().splitlines()[0]
        sentence = json.loads(first)["text"][:40]
        for path in [workdir / "metrics.jsonl", workdir / "run.json",
                     workdir / "export" / "README.md",
                     *workdir.glob("tokens/*/*/manifest.json")]:  # fmt: skip
            assert sentence not in path.read_text()


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import json, pathlib
from test_pretrain import small
from train.pretrain import run as loop, setup
loop.run(small(pathlib.Path({corpus!r}), pathlib.Path({workdir!r})))
"""


def start(corpus, workdir):
    code = SCRIPT.format(root=str(ROOT), corpus=str(corpus), workdir=str(workdir))
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def killed_after(process, workdir, steps, how=signal.SIGKILL):
    deadline = time.monotonic() + 300
    while len(losses(workdir)) < steps:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate()


class TestResume:
    @pytest.mark.parametrize(
        "kills", [[7], pytest.param([2, 7, 10, 12], marks=pytest.mark.slow)], ids=str
    )
    def test_killed_and_started_again_is_the_same_run_bit_for_bit(
        self, finished, corpus, tmp_path, kills
    ):
        for steps in kills:
            killed_after(start(corpus, tmp_path), tmp_path, steps)
        process = start(corpus, tmp_path)
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
        assert kills == [2] or "resuming from" in output
        alone = pathlib.Path(finished[0].workdir)
        assert losses(tmp_path) == losses(alone)
        newest = sorted((alone / "checkpoints").iterdir())[-1].name
        ours, theirs = (load_orbax(w / "checkpoints" / newest, optimizer=True)
                        for w in (tmp_path, alone))  # fmt: skip
        for part in ("position", "fingerprints"):
            assert ours["data"][part] == theirs["data"][part]
        for part in ("mu", "nu"):
            for key, value in theirs["optimizer"][part].items():
                np.testing.assert_array_equal(ours["optimizer"][part][key], value)
        for key, value in theirs["params"].items():
            np.testing.assert_array_equal(ours["params"][key], value)

    @pytest.mark.slow
    def test_sigterm_saves_and_leaves(self, finished, corpus, tmp_path):
        process = start(corpus, tmp_path)
        killed_after(process, tmp_path, 4, signal.SIGTERM)
        assert process.returncode == 0
        seen = max(losses(tmp_path))
        assert (tmp_path / "checkpoints" / f"{seen:08d}" / "config.json").exists()
        again = start(corpus, tmp_path)
        output = again.communicate()[0].decode()
        assert again.returncode == 0, output
        assert losses(tmp_path) == losses(pathlib.Path(finished[0].workdir))

    @pytest.mark.slow
    def test_ctrl_c_saves_and_leaves(self, finished, corpus, tmp_path):
        process = start(corpus, tmp_path)
        killed_after(process, tmp_path, 4, signal.SIGINT)
        assert process.returncode  # a script must not go on as if the run were complete
        assert (tmp_path / "checkpoints" / f"{max(losses(tmp_path)):08d}" / "config.json").exists()
        again = start(corpus, tmp_path)
        output = again.communicate()[0].decode()
        assert again.returncode == 0, output
        assert losses(tmp_path) == losses(pathlib.Path(finished[0].workdir))

    def test_a_half_written_checkpoint_is_not_taken(self, finished, corpus, tmp_path):
        config = small(corpus, tmp_path, phases=(small(corpus, tmp_path).phases[0],))
        loop.run(config)
        folders = sorted((tmp_path / "checkpoints").iterdir())
        (folders[-1] / "config.json").unlink()
        again = loop.run(config)
        assert again["steps"] == max(losses(tmp_path))
        alone = losses(pathlib.Path(finished[0].workdir))
        assert losses(tmp_path) == {s: alone[s] for s in losses(tmp_path)}

    def test_another_corpus_under_the_same_path_is_noticed(self, tmp_path):
        folder = tmp_path / "corpus"
        write_corpus(folder, 200, seed=1)
        phase = Phase("one", tokens=5_000, learning_rate=1e-3)
        config = small(folder, tmp_path / "w", phases=(phase,), checkpoint_every=2)
        loop.run(config)
        newest = sorted((tmp_path / "w" / "checkpoints").iterdir())[-1]
        (newest / "config.json").unlink()
        write_corpus(folder, 220, seed=2)
        with pytest.raises(ValueError, match="the corpus is not the one"):
            loop.run(config)


def test_flags_of_the_model_beside_a_checkpoint(finished, corpus, tmp_path):
    """What applies to a run holds; what the checkpoint decides is refused by name."""
    config = finished[0]
    model = config.model.replace(
        hidden_size=64, mlp_dropout=0.2, embedding_dropout=0.3, max_position_embeddings=4096
    )
    config = dataclasses.replace(config, model=model, init_from=config.workdir)
    tokenizer = AutoTokenizer.from_pretrained(config.workdir + "/tokenizer")
    flags = ["mlp_dropout", "embedding_dropout", "max_position_embeddings", "vocab_size"]
    made = model_config_of(config, tokenizer, flags)
    assert (made.mlp_dropout, made.embedding_dropout) == (0.2, 0.3)
    assert (made.max_position_embeddings, made.hidden_size) == (4096, 32)
    with pytest.raises(ValueError, match="--model.hidden-size: the checkpoint .* has 32, got 64"):
        model_config_of(config, tokenizer, ["hidden_size"])


class TestStopSignal:
    def test_a_second_ctrl_c_leaves_at_once(self, capsys):
        before = signal.getsignal(signal.SIGINT)
        with contextlib.closing(StopSignal()) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received and stop.interrupted
            assert "Ctrl-C again leaves at once" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before

    def test_ctrl_c_ends_the_run_with_a_checkpoint(self, corpus, tmp_path, monkeypatch):
        flags = Session.flags

        def interrupted(session, batch):
            if session.clock.count == 4:
                signal.raise_signal(signal.SIGINT)
            session.clock.count += 1
            return flags(session, batch)

        monkeypatch.setattr(Session, "flags", interrupted)
        monkeypatch.setattr(SaveClock, "count", 0, raising=False)
        with pytest.raises(KeyboardInterrupt):
            loop.run(small(corpus, tmp_path))
        newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert newest == max(losses(tmp_path)) >= 5


def test_a_checkpoint_is_due_by_the_clock(corpus, tmp_path, monkeypatch):
    """A clock that is due once, in the second step: seen by all hosts one step later."""
    calls = []

    def due(clock):
        calls.append(None)
        return len(calls) == 2

    monkeypatch.setattr(SaveClock, "due", due)
    changes = {"checkpoint_every": 1000, "keep_checkpoints": 9}
    config = small(corpus, tmp_path, phases=small(corpus, tmp_path).phases[:1], **changes)
    steps = loop.run(config)["steps"]
    saved = [int(path.name) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert saved == [3, steps] and steps > 4


def test_a_workdir_without_a_checkpoint_is_used_again(corpus, tmp_path, capsys):
    """A first start that ended before its first checkpoint leaves nothing that binds the next."""
    config = small(corpus, tmp_path, phases=small(corpus, tmp_path).phases[:1])
    other = dataclasses.replace(config.model, vocab_size=300)
    prepare_run(dataclasses.replace(config, model=other, seed=3), open_workdir(config))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    loop.run(config)
    out = capsys.readouterr().out
    assert "no checkpoint yet, so that the run starts anew with other flags (model, seed)" in out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 512
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == config.seed
    assert losses(tmp_path)[1] != 1.0


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(corpus, tmp_path):
    good = Phase("one", tokens=2_000, learning_rate=1e-3)
    bad = Phase("two", tokens=9_000, learning_rate=1e30)
    config = small(corpus, tmp_path, phases=(good, bad), checkpoint_every=100, keep_checkpoints=1)
    for _ in range(2):
        with pytest.raises(Diverged, match=r"step \d+: the loss is .*last good checkpoint: ") as e:
            loop.run(config)
        (kept,) = (tmp_path / "checkpoints").iterdir()
        assert f"last good checkpoint: {kept}. Lower" in str(e.value)
        assert load_orbax(kept)["data"]["position"]["phase"] == 1


def test_starts_from_a_checkpoint_with_and_without_moments(finished, corpus, tmp_path):
    first = pathlib.Path(finished[0].workdir)
    newest = sorted((first / "checkpoints").iterdir())[-1]
    phase = (Phase("more", tokens=2_000, learning_rate=0.0 + 1e-12),)
    export = small(corpus, tmp_path / "a", phases=phase, init_from=str(first / "export"))
    loop.run(export)
    weights = lambda folder: load_orbax(folder)["params"]  # noqa: E731
    done = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    assert done.name == "00000002"
    for key, value in weights(newest).items():
        # Weight decay is fully decoupled: 1e-5 of a weight in each of the two steps.
        np.testing.assert_allclose(weights(done)[key], value, rtol=3e-5, atol=1e-9)
    moments = small(
        corpus, tmp_path / "b", phases=phase, init_from=str(newest), init_optimizer=True
    )
    assert loop.run(moments)["steps"] == finished[1]["steps"] + 2  # the step never restarts
    with pytest.raises(ValueError, match="init_optimizer needs an Orbax checkpoint"):
        loop.run(dataclasses.replace(export, init_optimizer=True, workdir=str(tmp_path / "c")))


def test_a_vocabulary_that_grew(finished, corpus, tmp_path, capsys):
    """The tokenizer has more tokens than the checkpoint: rows and moments are added, none moves."""
    first = pathlib.Path(finished[0].workdir)
    newest = sorted((first / "checkpoints").iterdir())[-1]
    tokenizer = AutoTokenizer.from_pretrained(newest)
    assert add_tokens(tokenizer, ["tachypnoe", "dyspnoe"]) == 2
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    phase = (Phase("more", tokens=2_000, learning_rate=1e-4),)
    config = small(
        corpus, tmp_path / "a", phases=phase, init_from=str(newest), init_optimizer=True,
        tokenizer=str(tmp_path / "tokenizer"), mesh=MeshShape(data=1, fsdp=2),
    )  # fmt: skip
    old = load_orbax(newest, optimizer=True)
    model = model_config_of(config, tokenizer)
    assert model.vocab_size == 576  # 514 ids, rounded up to a multiple of 64
    trainer = Trainer(config, model, make_mesh(config.mesh))
    state = setup.start_state(config, trainer)
    assert int(state.optimizer.step) == old["optimizer"]["step"]
    rows = {"model.embeddings.tok_embeddings.weight", "decoder.bias"}
    for key, value in old["params"].items():
        new, mu, nu = (x[key] for x in (state.params, state.optimizer.mu, state.optimizer.nu))
        assert mu.shape == nu.shape == new.shape and mu.sharding == new.sharding
        assert (new.shape == value.shape) == (key not in rows)
        n = len(value)
        np.testing.assert_array_equal(new[:n], value)
        np.testing.assert_array_equal(mu[:n], old["optimizer"]["mu"][key])
        np.testing.assert_array_equal(nu[:n], old["optimizer"]["nu"][key])
        assert not np.any(mu[n:]) and not np.any(nu[n:])
        mean = value.mean(axis=0) if value.ndim == 2 else 0.0
        np.testing.assert_allclose(new[n:], np.broadcast_to(mean, new[n:].shape), atol=1e-6)
    assert "vocabulary: 512 rows in the checkpoint, 576 now" in capsys.readouterr().out

    result = loop.run(config)  # it trains, and the same command finds its checkpoint
    done = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    assert load_orbax(done)["config"].vocab_size == 576
    assert loop.run(config)["steps"] == result["steps"]

    other = train_bpe(["an unrelated text of other words"] * 20, 300)
    add_tokens(other, [f"word{i}" for i in range(600)])
    with pytest.raises(ValueError, match="expected the checkpoint's own tokenizer with added"):
        model_config_of(config, other)


class TestBadInput:
    """One line with the remedy, a non-zero exit, and nothing trained."""

    def refused(self, capsys, tmp_path, *args, expect):
        workdir = tmp_path / "w"
        code = cli.main(["pretrain", "--config", "demo", "--workdir", str(workdir), *args])
        error = capsys.readouterr().err
        assert code == 2
        lines = [line for line in error.strip().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and all(part in lines[0] for part in expect), error
        assert "Traceback" not in error
        assert not list(workdir.glob("checkpoints/*")) if workdir.is_dir() else True

    def test_not_text(self, capsys, tmp_path):
        folder = tmp_path / "c"
        folder.mkdir()
        (folder / "a.txt").write_bytes(bytes(range(256)) * 4)
        self.refused(capsys, tmp_path, "--corpus", str(folder), expect=["a.txt"])

    def test_empty_corpus(self, capsys, tmp_path):
        (tmp_path / "c").mkdir()
        self.refused(capsys, tmp_path, "--corpus", str(tmp_path / "c"), expect=[".txt", ".csv"])

    def test_no_such_corpus(self, capsys, tmp_path):
        self.refused(capsys, tmp_path, "--corpus", str(tmp_path / "no"), expect=["found none"])

    def test_vocabulary_beyond_the_models(self, capsys, tmp_path, finished):
        tokenizer = pathlib.Path(finished[0].workdir) / "tokenizer"
        self.refused(
            capsys, tmp_path, "--corpus", *finished[0].corpus, "--tokenizer", str(tokenizer),
            "--model.vocab-size", "64", "--model.pad-token-id", "2",
            expect=["512 ids", "vocab_size is 64", "--model.vocab-size 512"],
        )  # fmt: skip

    def test_budget_below_one_step(self, capsys, tmp_path):
        self.refused(
            capsys, tmp_path, "--phases.0.tokens", "1000", "--phases.0.warmup-tokens", "0",
            expect=["phase phase1", "1,000 tokens is below one step"],
        )  # fmt: skip

    def test_rows_longer_than_the_model(self, capsys, tmp_path):
        self.refused(
            capsys, tmp_path, "--sequence-length", "2048", expect=["max_position_embeddings 1024"]
        )

    def test_unwritable_workdir(self, capsys, tmp_path):
        (tmp_path / "w").write_text("a file")
        self.refused(capsys, tmp_path, expect=["cannot be written", "another --workdir"])

    def test_workdir_of_another_configuration(self, finished):
        config = finished[0]
        with pytest.raises(ValueError, match="another configuration: seed was 17, is 18"):
            loop.run(dataclasses.replace(config, seed=18))
        phases = (dataclasses.replace(config.phases[0], mlm_probability=0.2), config.phases[1])
        with pytest.raises(ValueError, match="phases 0 mlm_probability was 0.3, is 0.2"):
            loop.run(dataclasses.replace(config, phases=phases))

    def test_workdir_of_a_version_with_other_random_numbers(self, tmp_path, capsys):
        """A run that began with the option --prng resumes, and the log says what changes."""
        config = TrainConfig(workdir=str(tmp_path))
        old = json.loads(json.dumps(dataclasses.asdict(config))) | {"prng": "rbg"}
        (tmp_path / "run.json").write_text(json.dumps(old))
        setup._record(config, tmp_path, setup._previous(config, tmp_path))
        assert "prng: the run began with rbg, an option that is gone" in capsys.readouterr().out
        setup._previous(config, tmp_path)  # said once
        assert "prng" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        "flags, expect",
        [
            (["--attention", "flash"], "attention: expected one of reference, xla"),
            (["--wandb", "notes"], "pip install wandb"),
            (["--mesh.data", "9"], "expected data x fsdp x sequence x tensor"),
            (["--corpus", "no/such/folder"], "found none"),
        ],
        ids=lambda x: x[0].strip("-") if isinstance(x, list) else "",
    )
    def test_before_anything_is_written(self, capsys, monkeypatch, tmp_path, flags, expect):
        monkeypatch.setitem(sys.modules, "wandb", None)
        self.refused(capsys, tmp_path, *flags, expect=[expect])
        assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())

    def test_a_mesh_that_does_not_fit_before_tokenization(self, capsys, finished, tmp_path):
        config = finished[0]
        tokenizer = pathlib.Path(config.workdir) / "tokenizer"
        self.refused(
            capsys, tmp_path, "--corpus", *config.corpus, "--tokenizer", str(tokenizer),
            "--model.intermediate-size", "33", "--mesh.data", "1", "--mesh.tensor", "2",
            expect=["expected 33 to be a multiple of mesh axis tensor = 2"],
        )  # fmt: skip
        assert not (tmp_path / "w" / "tokens").exists()

    def test_unknown_config_and_verb(self, capsys):
        assert cli.main(["pretrain", "--config", "nothing"]) == 2
        assert "demo, " in capsys.readouterr().err
        assert cli.main(["fly"]) == 2
        assert "Available subcommands: corpora, prepare," in capsys.readouterr().err
        assert cli.main(["--help"]) == 0
        assert "configs: " in capsys.readouterr().out


def test_prepared_tokens_are_a_corpus_and_scores_are_told_apart(finished, corpus, tmp_path, capsys):
    """prepare, then pretrain on its shards and on text: two corpora, scored each for itself."""
    tokenizer = pathlib.Path(finished[0].workdir) / "tokenizer"
    notes = tmp_path / "notes"
    write_corpus(notes, 150, seed=5)
    out = tmp_path / "shards"
    for _ in range(2):  # the second time finds all done
        code = cli.main(
            ["prepare", "--source", str(notes), "--tokenizer", str(tokenizer), "--out", str(out),
             "--sequence-length", "128", "--eval-fraction", "0.1"]
        )  # fmt: skip
        assert code == 0
        assert "150 documents" in capsys.readouterr().out
    phase = Phase("one", tokens=3_000, learning_rate=1e-3)
    config = dataclasses.replace(
        small(corpus, tmp_path / "w", phases=(phase,), tokenizer=str(tokenizer), eval_sequences=64),
        corpus=(str(corpus), str(out)),
    )
    scores = loop.run(config)["phases"][0]
    parts = [scores[f"{name}/loss"] for name in (corpus.name, "shards")]
    assert parts[0] != parts[1] and min(parts) < scores["loss"] < max(parts)
    assert cli.main(["prepare", "--source", str(notes), "--tokenizer", str(tokenizer),
                     "--out", str(notes)]) == 2  # fmt: skip
    assert "expected a new folder" in capsys.readouterr().err
    assert list(notes.iterdir())


def test_pretrain_makes_the_tokens_of_prepare(finished, tmp_path):
    """The same folder gives the same ids and fingerprint, whichever of the two reads it."""
    config = finished[0]
    workdir = pathlib.Path(config.workdir)
    (made,) = (workdir / "tokens").iterdir()
    prepare(
        config.corpus[0], str(workdir / "tokenizer"), str(tmp_path / "out"), workers=2,
        sequence_length=config.sequence_length, eval_fraction=config.eval_fraction,
    )  # fmt: skip
    ours, theirs = open_store(made), open_store(tmp_path / "out")
    lines = (pathlib.Path(config.corpus[0]) / "notes.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    share = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") / 2**64 for t in texts]
    first = next(text for text, s in zip(texts, share, strict=True) if s >= 0.1)
    backend = tokenizers.Tokenizer.from_file(str(workdir / "tokenizer" / "tokenizer.json"))
    ids = backend.encode(" " + first, add_special_tokens=False).ids
    for split in ("train", "eval"):
        numbers = np.arange(len(theirs[split].lengths))
        assert len(numbers) > 10 and ours[split].fingerprint == theirs[split].fingerprint
        assert ours[split].tokenizer == theirs[split].tokenizer
        for got, want in zip(ours[split].read(numbers), theirs[split].read(numbers), strict=True):
            np.testing.assert_array_equal(got, want)
    head = ours["train"].read(np.array([0]))[0].tolist()
    assert head[1:-1] == ids[: len(head) - 2]


def test_packed_evaluation_equals_one_document_per_sequence(finished):
    """Evaluation packs documents for speed; the numbers are those of unpacked ones."""
    config = finished[0]
    workdir = pathlib.Path(config.workdir)
    (folder,) = (workdir / "tokens").iterdir()
    store = open_store(folder)["eval"]
    tokenizer = AutoTokenizer.from_pretrained(workdir / "tokenizer")
    masking = masking_of(config, tokenizer, config.eval_mlm_probability)
    config = dataclasses.replace(config, eval_sequences=10_000)
    model = ModernBertConfig.from_json(workdir / "export" / "config.json")
    trainer = Trainer(config, model, make_mesh(MeshShape(data=1)))
    params = load_orbax(sorted((workdir / "checkpoints").iterdir())[-1])["params"]

    def sums(batches):
        parts = [
            [float(x) for x in trainer.eval_step(params, {k: v[None] for k, v in b.items()})]
            for b in batches
        ]
        return np.sum(parts, axis=0)

    packed = eval_batches(store, masking, config)
    seed = (config.seed, 0, 2**31)
    rows = [
        build_row(store, np.array([piece]), masking, config.sequence_length, seed)
        for piece in range(len(store.lengths))
    ]
    empty = {k: np.full_like(v, IGNORE_INDEX if k == "labels" else 0) for k, v in rows[0].items()}
    pad = [empty] * (-len(rows) % 4)
    rows += pad
    unpacked = [
        {k: np.stack([row[k] for row in rows[i : i + 4]]) for k in packed[0]}
        for i in range(0, len(rows), 4)
    ]
    got, want = sums(packed), sums(unpacked)
    assert len(packed) < len(unpacked)
    assert got[1:].tolist() == want[1:].tolist()  # correct predictions, masked tokens
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_weights_and_biases_gets_the_numbers(tmp_path, monkeypatch):
    class Run:
        logged: list = []

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.logged.append("finished")

    asked = {}
    fake = types.SimpleNamespace(init=lambda **k: asked.update(k) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path, 0, "notes")
    writer.write("train", 1, loss=2.0, phase="one")
    writer.close()
    assert asked["project"] == "notes"
    assert Run.logged == [(1, {"train/loss": 2.0}), "finished"]


@pytest.mark.parametrize(
    "variables, several",
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script, not one of srun's tasks
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # JAX_PLATFORMS=cpu
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, True),
    ],
    ids=str,
)
def test_what_the_environment_says_of_processes(monkeypatch, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **k: calls.append((a, k)))
    connect(Hosts(heartbeat_seconds=7))
    assert calls == ([((), {"heartbeat_timeout_seconds": 7})] if several else [])
