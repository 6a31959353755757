"""`python -m train`: the verbs, the flags that configs change, exit codes and names in help."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from train import cli, configs, flags
from train.corpora.build.prepare import prepare
from train.corpora.reports.catalogue import catalogue
from train.corpora.reports.decontaminate import decontaminate
from train.corpora.reports.mixture import mixture
from train.finetune.config import FinetuneConfig
from train.finetune.retrieval import RetrievalConfig
from train.plan.run import Options
from train.pretrain import run as loop
from train.pretrain.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch):
    """The (configuration, name) pairs that `pretrain` would run."""
    calls = []
    monkeypatch.setattr(
        loop, "run", lambda config, recipe, model_flags: calls.append((config, recipe))
    )
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


def test_help_shows_what_is_used_most(capsys):
    assert cli.main(["pretrain", "--config", "demo", "--help"]) == 0
    short = capsys.readouterr().out
    assert cli.main(["pretrain", "--config", "demo", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert short.index("--corpus ") < short.index("--workdir ") < short.index("--seed ")
    assert "--help-all" in short and "--stall-minutes" not in short
    assert "--stall-minutes" in text and "--model.hidden-size" in text and "--hosts.count" in text


@pytest.mark.parametrize(
    "text, value",
    [("2000", 2000), ("1e6", 10**6), ("160B", 160 * 10**9), ("1.5M", 1_500_000), ("4k", 4000),
     ("160_453_000_000", 160_453_000_000), ("-1", -1)],
)  # fmt: skip
def test_numbers_as_people_write_them(ran, text, value):
    assert flags.whole_number(text) == value
    if value > 10**5:
        assert cli.main(["pretrain", "--phases.0.tokens", text]) == 0
        assert ran.pop()[0].phases[0].tokens == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e-1", "2Q", "nan", "inf", "1e400", "B"])
def test_what_is_no_whole_number(capsys, text):
    with pytest.raises((ValueError, OverflowError)):
        flags.whole_number(text)
    assert cli.main(["pretrain", "--seed", text]) == 2


def test_model_flags_are_those_that_differ_from_the_config(monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "run", lambda config, recipe, model_flags: calls.append(model_flags))
    args = ["--config", "demo", "--model.mlp-dropout", "0.1", "--model.vocab-size", "2048"]
    assert cli.main(["pretrain", *args]) == 0
    assert calls == [["mlp_dropout"]]


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


def test_nothing_unset_is_shown_as_a_number_or_an_empty_text(capsys):
    """A default in the help is a value that works as it is written, or None."""
    assert cli.main(["pretrain", "--help-all"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (
        "init-from", "tokenizer", "text-column", "general-text", "attention", "wandb",
        "global-rope-theta", "profile-step", "epochs", "hosts.coordinator", "hosts.count",
        "hosts.index", "optimizer.max-learning-rate", "phases.0.batch-size-warmup-start",
    ):  # fmt: skip
        text = words[words.index(f"--{name} {{None}}|") :]
        assert text[text.index("(default: ") :].startswith("(default: None)"), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes: expected above 0, or None, got 0.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: .* None to choose"),
        ({"init_from": ""}, "init_from: expected a name, got an empty one; None means unset"),
        ({"profile_step": 0}, "profile_step: expected above 0, or None, got 0"),
    ],
)
def test_what_meant_unset_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes).validate()


# Flags that name a file, a column or a model, and what else the command needs.
NAMES = {
    "prepare": (("--text-column",), "--source s --tokenizer t --out o"),
    "decontaminate": (
        ("--task-column", "--text-column", "--tokenizer", "--out"),
        "--corpus c --task t",
    ),
    "mixture": (("--png",), ""),
    "corpora": (("--source", "--out"), ""),
    "finetune": (
        ("--out", "--text-column", "--text-pair-column", "--label-column"),
        "--task classification --data d --model m",
    ),
    "finetune --task retrieval": (("--teacher",), "--data d --model m"),
}


@pytest.mark.parametrize(
    "verb, flag", [(verb, flag) for verb, (flags, _) in NAMES.items() for flag in flags]
)
def test_an_empty_name_is_refused(verb, flag, capsys):
    """None means unset, and an empty text has no meaning of its own."""
    more = NAMES[verb][1].split()
    assert cli.main([*verb.split(), *more, flag, ""]) == 2
    name = flag.removeprefix("--").replace("-", "_")
    expected = f"error: {name}: expected a name, got an empty one; None means unset\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "flags, options",
    [
        (dataclasses.fields(FinetuneConfig), NAMES["finetune"][0]),
        (dataclasses.fields(RetrievalConfig), NAMES["finetune --task retrieval"][0]),
        (dataclasses.fields(Options), ("--cuda-compiler", "--json")),
        (inspect.signature(prepare).parameters.values(), NAMES["prepare"][0]),
        (inspect.signature(decontaminate).parameters.values(), NAMES["decontaminate"][0]),
        (inspect.signature(mixture).parameters.values(), NAMES["mixture"][0]),
        (inspect.signature(catalogue).parameters.values(), NAMES["corpora"][0]),
    ],
)
def test_what_is_not_set_is_none(flags, options):
    defaults = {f"--{flag.name.replace('_', '-')}": flag.default for flag in flags}
    assert "" not in defaults.values()
    assert {defaults[option] for option in options} == {None}
