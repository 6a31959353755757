"""`python -m train`: the verbs, the flags that configs change, exit codes and names in help."""

import subprocess
import sys
from pathlib import Path

import pytest

from train import cli, configs
from train.pretrain import run as loop
from train.pretrain.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch):
    """The (configuration, name) pairs that `pretrain` would run."""
    calls = []
    monkeypatch.setattr(loop, "run", lambda config, recipe: calls.append((config, recipe)))
    return calls


def test_help_lists_every_verb_and_config_without_importing_jax():
    code = """
import sys
from train import cli
assert cli.main(["--help"]) == 0
assert not {"jax", "numpy", "modernbert_jax"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    verbs = "corpora prepare mixture decontaminate pretrain plan average finetune".split()
    assert [verb.__name__ for verb in cli.VERBS] == verbs
    for verb in cli.VERBS:
        line = next(line for line in done.stdout.splitlines() if f"• {verb.__name__} " in line)
        assert (verb.__doc__ or "").split()[0] in line
    assert all(name in done.stdout for name in configs.names())
    assert "python -m train pretrain --config demo" in done.stdout


@pytest.mark.parametrize("given", [["--config", "demo"], ["--config=demo"]])
def test_a_config_gives_the_defaults(ran, given):
    more = ["--phases.0.learning-rate", "1e-4", "--global-batch-size=16", "--corpus", "a", "b"]
    for args in ([*given, *more], [*more, *given]):
        assert cli.main(["pretrain", *args]) == 0
        config, name = ran.pop()
        demo = configs.load("demo")
        assert name == "demo"
        assert config.phases[0].learning_rate == 1e-4 != demo.phases[0].learning_rate
        assert config.phases[1] == demo.phases[1]
        assert (config.model, config.corpus) == (demo.model, ("a", "b"))


def test_without_a_config(ran):
    assert cli.main(["pretrain", "--seed", "3"]) == 0
    assert ran == [(TrainConfig(seed=3), "")]


def test_help_of_a_config_teaches(capsys):
    assert cli.main(["pretrain", "--config", "bioclinical_base", "--help"]) == 0
    text = capsys.readouterr().out
    assert "    --loss-weighting sequences " in text and "Hardware:" in text
    words = " ".join(text.replace("│", " ").split())  # the box wraps with the terminal's width
    flag = words.index("--global-batch-size INT")
    assert 0 < words.index("(default: 576)", flag) - flag < 120


@pytest.mark.parametrize(
    "args",
    [[], ["fly"], ["pretrain", "--no-such-flag"], ["pretrain", "--config"], ["average"]],
    ids=lambda args: " ".join(args) or "none",
)
def test_bad_command_lines_exit_with_2(capsys, args):
    assert cli.main(args) == 2
    out, error = capsys.readouterr()
    assert not out and error and "Traceback" not in error


def test_names_in_help(capsys, monkeypatch):
    """The command is called as it was started: in a checkout, in a wheel, or as told."""
    for program, started in (
        ("python -m train", "train/__main__.py"),
        ("modernbert-jax", "/usr/bin/modernbert-jax"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        cli.main(["--help"])
        assert f"{program} pretrain --config demo" in capsys.readouterr().out
        cli.main(["average", "--help"])
        assert f"usage: {program} average" in capsys.readouterr().out
    cli.main(["average", "--help"], prog="other")
    assert "usage: other average" in capsys.readouterr().out


def test_retrieval_is_a_task_with_its_own_flags(monkeypatch):
    from train.finetune import retrieval

    calls = []
    monkeypatch.setattr(retrieval, "train", calls.append)
    args = ["finetune", "--data", "d", "--model", "m", "--temperature", "0.1"]
    for task in (["--task", "retrieval"], ["--task=retrieval"]):
        assert cli.main([*args, *task]) == 0
    assert calls == 2 * [retrieval.RetrievalConfig("d", "m", temperature=0.1)]
    assert cli.main([*args, "--task", "negex"]) == 2  # which has no temperature


def test_flags_of_plan():
    args = ["--topology", "v5e:2x2", "--config=demo", "--mfu", "0.5", "--mesh.fsdp", "2"]
    options, name, run = cli.plan_arguments(args, "plan")
    assert (options.topology, options.mfu, name, run.mesh.fsdp) == ("v5e:2x2", 0.5, "demo", 2)
    assert run.model == configs.load("demo").model
