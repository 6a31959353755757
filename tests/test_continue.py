"""Continued pretraining on one's own notes: `pretrain --config continue`."""

import csv
import dataclasses
import gzip
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, pipeline
from modernbert_jax.checkpoint.orbax import load_orbax
from train import cli, configs
from train.common.metrics import read_metrics
from train.corpora.synthetic import synthetic_notes
from train.pretrain import export
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.derive import changes, derived
from train.pretrain.export import before_and_after

SOAK_TRIALS = int(os.environ.get("SOAK_TRIALS", 0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_tokenizer):
    """A seeded checkpoint in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ModernBertConfig.tiny(
        vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=24,
        num_hidden_layers=3, max_position_embeddings=512,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(folder, tokenizer=small_tokenizer)
    return folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder of notes in four formats, and a file that is not read."""
    folder = tmp_path_factory.mktemp("notes")
    texts = list(synthetic_notes(80, 5))
    (folder / "one.txt").write_text(texts[0])
    with gzip.open(folder / "two.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([["id", "note"], *([i, t] for i, t in enumerate(texts[1:20]))])
    lines = [json.dumps({"text": text}) for text in texts[20:40]]
    (folder / "three.jsonl").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"note_text": texts[40:]}), folder / "four.parquet")
    (folder / "scan.pdf").write_bytes(b"%PDF")
    return folder


class TestDerived:
    config = TrainConfig(
        phases=(
            Phase("a", tokens=800, learning_rate=None, warmup_tokens=80),
            Phase("b", tokens=200, learning_rate=None, decay_tokens=200),
        ),
        sequence_length=8192, global_batch_size=64, gradient_accumulation_steps=None,
        epochs=3.0, fit_to_corpus=True,
    )  # fmt: skip

    def test_the_budget_is_each_phases_share_of_the_epochs(self):
        found = derived(self.config, ModernBertConfig.base(), [10**9, 10**8], 8000)
        a, b = found.phases
        assert (a.tokens, a.warmup_tokens) == (24 * 10**8, 24 * 10**7)
        assert (b.tokens, b.decay_tokens) == (6 * 10**7, 6 * 10**7)
        assert found.sequence_length * found.global_batch_size == 8192 * 64

    def test_the_learning_rate_follows_the_width(self):
        for model, rate in ((ModernBertConfig.base(), 1e-4), (ModernBertConfig.large(), 5e-5)):
            found = derived(self.config, model, [10**9, 10**9], 8000)
            assert [phase.learning_rate for phase in found.phases] == [rate, rate]

    @pytest.mark.parametrize(
        "longest, length", [(8192, 8192), (5000, 8192), (4096, 4096), (300, 512), (3, 128)]
    )
    def test_the_sequence_holds_the_longest_chunk(self, longest, length):
        found = derived(self.config, ModernBertConfig.base(), [10**9, 10**9], longest)
        assert found.sequence_length == length
        assert found.global_batch_size == 64 * 8192 // length

    def test_a_small_corpus_has_smaller_steps(self):
        found = derived(self.config, ModernBertConfig.base(), [10**7, 10**7], 1000)
        step = found.global_batch_size * 1024
        assert 300 <= 3 * 10**7 / step < 2 * 300
        tiny = derived(self.config, ModernBertConfig.base(), [10**4, 10**4], 1000)
        assert tiny.global_batch_size == 8

    def test_only_the_micro_batches_follow_from_the_devices(self):
        model, tokens = ModernBertConfig.base(), [10**9, 10**9]
        small = derived(self.config, model, tokens, 8000, devices=8, memory_bytes=12 * 2**30)
        large = derived(self.config, model, tokens, 8000, devices=8, memory_bytes=80 * 2**30)
        cpu = derived(self.config, model, tokens, 8000)
        steps = [c.gradient_accumulation_steps for c in (small, large, cpu)]
        assert steps == [2, 1, 64]
        same = [dataclasses.replace(c, gradient_accumulation_steps=1) for c in (small, large, cpu)]
        assert same[0] == same[1] == same[2]

    def test_what_is_set_stays(self):
        config = configs.load("demo")
        assert derived(config, config.model, [1, 1], 10) == config
        assert not changes(config, config)


def test_from_notes_to_a_model(checkpoint, notes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    workdir = tmp_path / "run"
    general = tmp_path / "general.txt"
    general.write_text("The weather is fine today. " * 30)
    args = [
        "pretrain", "--config", "continue", "--corpus", str(notes), "--workdir", str(workdir),
        "--init-from", str(checkpoint), "--epochs", "2", "--eval-fraction", "0.2",
        "--model.dtype", "float32", "--general-text", str(general), "--mesh.data", "1",
    ]  # fmt: skip
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert "text: 4 files are read; left out: 1 .pdf" in err
    assert "phase adapt: " in out and "peak learning rate 0.0001" in out
    for part in ("80 documents of 80 records", "a step has 8 sequences of ", "plan: ", "adapt: "):
        assert part in out
    assert re.search(r"in total [\d,]+ tokens, about \d+ steps; checkpoints need up to ", out)
    # Once, and after ten steps that were timed.
    (line,) = re.findall(r"about \d+ s of training remain: ([\d,]+) tokens at [\d,]+ tokens/s", out)
    rest = {m["step"]: m["total_tokens"] for m in read_metrics(workdir) if m["kind"] == "train"}
    record = json.loads((workdir / "run.json").read_text())
    total = sum(phase["tokens"] for phase in record["derived"]["phases"])
    assert int(line.replace(",", "")) == total - rest[11]
    result = json.loads((workdir / "result.json").read_text())
    assert [p["phase"] for p in result["phases"]] == ["adapt", "decay"]
    for phase in result["phases"]:
        assert phase["loss"] < phase["before"]["loss"]
    # Each phase's scores are those at its own end.
    lines = [m for m in read_metrics(workdir) if m["kind"] == "eval"]
    ends = {m["phase"]: m["loss"] for m in lines}
    assert [p["loss"] for p in result["phases"]] == [ends["adapt"], ends["decay"]]
    assert ends["adapt"] != ends["decay"]
    assert result["general"]["before"]["loss"] != result["general"]["loss"]
    for line in before_and_after(result):
        assert line in out
    assert (workdir / "before_after.png").read_bytes().startswith(b"\x89PNG")
    assert str(workdir / "before_after.png") in out
    card = (workdir / "export" / "README.md").read_text()
    before = result["phases"][0]["before"]["accuracy"]
    assert f"| {result['phases'][0]['accuracy']:.1%} | {before:.1%} |" in card
    assert record["epochs"] == 2.0
    answers = pipeline("fill-mask", workdir / "export")("the patient has [MASK] fever")
    assert len(answers) == 5
    # Again: nothing to do, the same table.
    assert cli.main(args) == 0
    again = capsys.readouterr().out
    assert before_and_after(result)[1] in again


def test_without_a_tokenizer_beside_the_weights(checkpoint, notes, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    args = ["pretrain", "--config", "continue", "--corpus", str(notes), "--init-from", str(bare)]
    assert cli.main([*args, "--workdir", str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert "expected a tokenizer.json beside the weights" in error and "--tokenizer" in error


def test_recipes_take_the_tokenizer_of_their_checkpoint():
    for name in configs.names():
        config = configs.load(name)
        assert not (config.init_from and config.tokenizer), name
    assert pathlib.Path(configs.__file__).with_name("continue.py").exists()


def test_the_bars_are_the_scores(tmp_path, monkeypatch):
    """Two corpora and a general text: each bar has the length of its score."""
    seen = []
    monkeypatch.setattr(export, "save_figure", lambda figure, path: seen.append((figure, path)))
    part = {"accuracy": 0.25, "loss": 1.0, "a/accuracy": 0.3, "a/loss": 0.5, "b/accuracy": 0.2,
            "b/loss": 2.0}  # fmt: skip
    after = {key: value / 2 for key, value in part.items()}
    general = {"before": {"accuracy": 0.5, "loss": 0.0}, "accuracy": 0.4, "loss": 0.1}
    phase = {"phase": "one", **after, "before": part, "unigram_accuracy": 0.1}
    export.plot_before_and_after(tmp_path, {"phases": [phase], "general": general})
    (figure, path) = seen.pop()
    assert path == tmp_path / "before_after.png"
    accuracy, perplexity = figure.axes
    assert [t.get_text() for t in accuracy.get_yticklabels()] == [
        "one", "one a", "one b", "general text",
    ]  # fmt: skip
    widths = [bar.get_width() for bar in accuracy.patches]
    np.testing.assert_allclose(widths, [25, 30, 20, 50, 12.5, 15, 10, 40])
    widths = [bar.get_width() for bar in perplexity.patches]
    want = np.exp([1.0, 0.5, 2.0, 0.0, 0.5, 0.25, 1.0, 0.1])
    np.testing.assert_allclose(widths, want)
    del phase["before"]
    assert export.plot_before_and_after(tmp_path, {"phases": [phase]}) is None and not seen


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, small_tokenizer):
    """A seeded checkpoint that transformers has made: small, or base with SOAK_TRIALS."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    special = {
        f"{name}_token_id": small_tokenizer.convert_tokens_to_ids(token)
        for name, token in {"pad": "[PAD]", "bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]",
                            "sep": "[SEP]"}.items()
    }  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    config = transformers.ModernBertConfig(**special, **({} if SOAK_TRIALS else small))
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


def command(checkpoint, notes, workdir):
    return [
        sys.executable, "-m", "train", "pretrain", "--config", "continue",
        "--init-from", str(checkpoint), "--corpus", str(notes), "--workdir", str(workdir),
        "--model.dtype", "float32", "--mesh.data", "1", "--epochs", "None", "--no-fit-to-corpus",
        "--sequence-length", "64", "--global-batch-size", "1", "--checkpoint-every", "3",
        "--eval-sequences", "2", "--phases.0.tokens", "700", "--phases.0.warmup-tokens", "200",
        "--phases.1.tokens", "300", "--phases.1.decay-tokens", "300",
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_it_ends_in_the_same_weights(theirs, notes, tmp_path):
    """SIGKILL while it starts, tokenizes, trains or saves; SOAK_TRIALS=10 kills base ten times."""
    root = pathlib.Path(__file__).resolve().parents[1]
    # Each start would compile the same programs again.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)} | cache
    alone, workdir = tmp_path / "alone", tmp_path / "killed"
    subprocess.run(command(theirs, notes, alone), cwd=root, env=env, check=True)
    steps = json.loads((alone / "result.json").read_text())["steps"]
    draw = random.Random(16)
    kills = SOAK_TRIALS or 3
    seen = []
    for i in range(kills):  # each in another part of the run
        target = int((i + draw.random()) * steps / kills)
        delay = draw.random() * (3 if SOAK_TRIALS else 0.5)
        with subprocess.Popen(command(theirs, notes, workdir), cwd=root, env=env) as process:
            while process.poll() is None and len(losses(workdir)) < target:
                time.sleep(0.05)
            time.sleep(delay)
            seen.append(len(losses(workdir)))
            process.kill()
    print("killed after the steps", seen, "of", steps)
    subprocess.run(command(theirs, notes, workdir), cwd=root, env=env, check=True)
    assert losses(workdir) == losses(alone)
    weights = [(w / "export" / "model.safetensors").read_bytes() for w in (workdir, alone)]
    assert weights[0] == weights[1]
    marks = [
        load_orbax(sorted((w / "checkpoints").iterdir())[-1])["data"]["fingerprints"]
        for w in (workdir, alone)
    ]
    assert marks[0] == marks[1]  # the optimizer's moments as well


def losses(workdir):
    return {m["step"]: m["loss"] for m in read_metrics(workdir) if m["kind"] == "train"}
