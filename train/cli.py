"""The command line: `python -m train VERB`, and the training commands of `modernbert-jax`.

`main` chooses the verb; each verb's function imports what it needs and lets tyro make the flags
from the signature and the docstring of the function or dataclass that does the work.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

import tyro

from . import configs, flags

if TYPE_CHECKING:
    from .plan.run import Options
    from .pretrain.config import TrainConfig

T = TypeVar("T")
# The fields of a dataclass become flags of the command: --seed, not --run.seed.
Flat = Annotated[T, tyro.conf.arg(name="")]
ConfigName = Annotated[
    str,
    tyro.conf.arg(metavar="NAME", help="An experiment in train/configs; its values are defaults."),
]

DESCRIPTION = """Train ModernBERT encoders: corpora, pretraining, plans and fine-tuning.

Examples:

    {prog} pretrain --config demo
    {prog} pretrain --config demo --corpus notes/ --workdir runs/notes
    {prog} pretrain --config demo --phases.0.learning-rate 1e-3 --global-batch-size 16
    {prog} pretrain --config demo --help      the main flags, with the values of that config
    {prog} pretrain --config demo --help-all  every flag
    {prog} VERB --help                        the flags of a verb

configs: {configs}"""


def corpora(args: list[str], prog: str) -> int:
    """List the corpora: access, license, size, and what is on disk."""
    from .corpora.reports.catalogue import catalogue

    return _print_result(catalogue, args, prog)


def prepare(args: list[str], prog: str) -> int:
    """Turn a corpus into text and shards of tokens, once."""
    from .corpora.build.prepare import prepare

    return _print_result(prepare, args, prog)


def mixture(args: list[str], prog: str) -> int:
    """Report tokens and proportions of prepared corpora, and the flags to train on them."""
    from .corpora.reports.mixture import mixture

    return _print_result(mixture, args, prog)


def decontaminate(args: list[str], prog: str) -> int:
    """Find documents of a corpus that share word spans with an evaluation set."""
    from .corpora.reports.decontaminate import decontaminate

    return _print_result(decontaminate, args, prog)


def pretrain(args: list[str], prog: str) -> int:
    """Masked-LM pretraining in phases; resumes an interrupted run."""
    from .pretrain.config import FREQUENT, TrainConfig

    name = _peek(args).config
    default, description = _experiment(name)

    def command(config: ConfigName = name, run: Flat[TrainConfig] = default) -> None:
        from .pretrain import run as loop

        ours, theirs = run.model, default.model
        names = [field.name for field in fields(ours)]
        given = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
        loop.run(run, recipe=config, model_flags=given)

    description = f"{description or pretrain.__doc__}\n\nAll other flags: {flags.ALL}"
    _cli(command, args, prog, description, FREQUENT)
    return 0


def plan(args: list[str], prog: str) -> int:
    """Compile a run for devices you do not have: memory, collectives, hours."""
    from .plan import topologies

    given = _peek(args)
    if given.topology and not {"-h", "--help"} & set(args):
        settings = topologies.environment(given.topology, given.cuda_compiler)
        if any(os.environ.get(name) != value for name, value in settings.items()):
            # A new process: jax reads these variables when it is first imported.
            command_line = [sys.executable, "-m", str(__package__), "plan", *args]
            return subprocess.run(command_line, env=os.environ | settings).returncode
    from modernbert_jax.checkpoint.files import write_text

    from .plan.report import table
    from .plan.run import plan

    options, config, run = plan_arguments(args, prog)
    found = plan(
        run,
        options,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = {"config": config, "command": " ".join([prog, *args])} | found
    print(table(found))
    if options.json is not None:
        write_text(Path(options.json), json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else 1


def plan_arguments(args: list[str], prog: str) -> "tuple[Options, str, TrainConfig]":
    """Parses the flags of `plan`: (its options, the name of the config, the run)."""
    from .plan import run as planner
    from .pretrain.config import FREQUENT, TrainConfig

    name = _peek(args).config
    default, _ = _experiment(name)

    def command(
        options: Flat[planner.Options],
        config: ConfigName = name,
        run: Flat[TrainConfig] = default,
    ) -> tuple[planner.Options, str, TrainConfig]:
        return options, config, run

    description = f"{planner.__doc__}\n\nAll other flags: {flags.ALL}"
    return _cli(command, args, prog, description, FREQUENT)


def average(args: list[str], prog: str) -> int:
    """Average the weights of several checkpoints."""
    from .average import average

    return _print_result(average, args, prog)


def finetune(args: list[str], prog: str) -> int:
    """Fine-tune on a task over seeds and a grid of settings, or train for retrieval."""
    if _peek(args).task == "retrieval":
        from .finetune import retrieval

        def command(task: Literal["retrieval"], run: Flat[retrieval.RetrievalConfig]) -> None:
            retrieval.train(run)

        description = f"{retrieval.RetrievalConfig.__doc__}\n\n{retrieval.described()}"
        _cli(command, args, prog, description)
        return 0
    from .finetune import run as finetuning
    from .finetune.tasks import described

    description = f"{finetuning.FinetuneConfig.__doc__}\n\n{described()}"
    finetuning.finetune(_cli(finetuning.FinetuneConfig, args, prog, description))
    return 0


VERBS = (corpora, prepare, mixture, decontaminate, pretrain, plan, average, finetune)


def main(argv: Sequence[str] | None = None, prog: str = "") -> int:
    """Runs a verb. Returns its exit code: 0, or 2 after a line on stderr for bad input.

    `plan` returns 1 if the run does not fit. prog: the name of the program in help, by default
    `modernbert-jax` or `python -m train`, whichever was called.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    called = Path(sys.argv[0]).name
    prog = prog or (called if called == "modernbert-jax" else f"python -m {__package__}")
    app = tyro.extras.SubcommandApp()
    for verb in VERBS:
        app.command(name=verb.__name__, help=verb.__doc__)(_constant(verb))
    description = DESCRIPTION.format(prog=prog, configs=", ".join(configs.names()))
    try:
        verb = app.cli(args=args[:1], prog=prog, description=description)
        return verb(args[1:], f"{prog} {args[0]}")
    except SystemExit as end:  # of tyro, after --help or after its own message
        return end.code if isinstance(end.code, int) else 0
    except (ValueError, OSError, RuntimeError) as error:
        from modernbert_jax.untrusted import printable

        print(f"error: {printable(error, 2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130


def leave(code: int) -> NoReturn:
    """Ends the process. After a failed save, Orbax's threads never end: this does not wait for
    them if the exit code is not 0. Child processes (Grain's workers) end in any case."""
    if not code:
        sys.exit(0)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class _Peek:
    """Flags that are read first, because they decide which others there are or how to start."""

    config: str = ""
    task: str = ""
    topology: str = ""
    cuda_compiler: str | None = None
    gradient_accumulation_steps: int | None = None  # None: chosen by `plan`


def _peek(args: list[str]) -> _Peek:
    return tyro.cli(_Peek, args=args, add_help=False, return_unknown_args=True)[0]


def _experiment(name: str) -> "tuple[TrainConfig, str]":
    """(the configuration of that name, its description); without a name the defaults and ""."""
    from .pretrain.config import TrainConfig

    return (configs.load(name), configs.describe(name)) if name else (TrainConfig(), "")


def _cli(
    function: Callable[..., T],
    args: list[str],
    prog: str,
    description: str | None = None,
    frequent: Mapping[type, tuple[str, ...]] | None = None,
) -> T:
    """Calls a function with its flags. frequent: what --help shows; see `flags.registry`."""
    rules = flags.registry(args, frequent)
    return tyro.cli(
        function, args=flags.without_all(args), prog=prog, description=description, registry=rules
    )


def _print_result(function: Callable[..., str], args: list[str], prog: str) -> int:
    print(_cli(function, args, prog))
    return 0


def _constant(value: T) -> Callable[[], T]:
    return lambda: value
