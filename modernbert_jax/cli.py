"""The command `modernbert-jax`: every command of the project behind one name.

The repository keeps `train` and `convert` at its top level, where they are run as `python -m train`
and `python -m convert`. The wheel installs them inside this package, because two wheels with a
top-level `train` would overwrite each other. Only this module needs to know where they are.
"""

import importlib
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import modernbert_jax

# Each command: the package that runs it, and its line in --help. `convert` has commands of its own.
COMMANDS = {
    "corpora": ("train", "list the corpora: access, license, size, and what is on disk"),
    "prepare": ("train", "turn a corpus into text and shards of tokens"),
    "mixture": ("train", "report the tokens and proportions of prepared corpora"),
    "decontaminate": ("train", "find documents that share word spans with an evaluation set"),
    "pretrain": ("train", "masked-LM pretraining in phases; resumes an interrupted run"),
    "plan": ("train", "compile a run for devices you do not have: memory, collectives, hours"),
    "average": ("train", "average the weights of several checkpoints"),
    "finetune": ("train", "fine-tune on a task over seeds and a grid, or train for retrieval"),
    "convert": ("convert", "convert checkpoints between Hugging Face, Orbax and Composer"),
    "export": ("modernbert_jax", "write a model together with its compiled functions"),
    "benchmark": ("modernbert_jax", "measure the cold start of a model, in two new processes"),
    "answer": ("modernbert_jax", "answer one text, as JSON"),
    "serve": ("serve", "answer requests over HTTP: embeddings, rerank, classify, fill-mask"),
}
# Optional modules that belong to another extra than the one named like the package.
EXTRAS = {"apache_beam": "beam", "datasets": "huggingface", "gcsfs": "gcs"}


def usage() -> str:
    """The text of --help."""
    lines = [f"  {name:<15}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: modernbert-jax COMMAND ...",
            "",
            *lines,
            "",
            "  modernbert-jax COMMAND --help      the flags of a command",
            "  modernbert-jax --version           the version of modernbert_jax",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 with one line on stderr for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(modernbert_jax.__version__)
        return 0
    command = args[0]
    if command not in COMMANDS:
        expected = ", ".join(COMMANDS)
        print(f"error: expected a command ({expected}), got {command!r}", file=sys.stderr)
        return 2
    package = COMMANDS[command][0]
    try:
        run = importlib.import_module(_module(package)).main
        return run(args[1:] if command == package else args)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "train", "convert", "modernbert_jax"):
            raise  # a broken installation, not an extra that was left out
        print(_needs(command, package, missing), file=sys.stderr)
        return 2


def program() -> NoReturn:
    """Runs `main` and ends the process with its exit code."""
    code = main()
    if code:  # After a save that failed, Orbax's threads never end: do not wait for them.
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


def _module(package: str) -> str:
    """The module that runs the commands of a package, in a wheel or in a checkout."""
    if package == "modernbert_jax":
        return "modernbert_jax.inference.cli"
    inside = f"modernbert_jax.{package}"
    return f"{inside if importlib.util.find_spec(inside) else package}.cli"


def _needs(command: str, package: str, missing: str) -> str:
    """One line that names the extra to install."""
    if missing == "torch":  # in no extra: the build for CPU, CUDA or ROCm is the user's choice
        return f"modernbert-jax {command} needs PyTorch: install the build for your hardware"
    extra = EXTRAS.get(missing, package)
    return (
        f'modernbert-jax {command} needs the extra "{extra}" (found no module {missing}): '
        f'pip install "modernbert_jax[{extra}]"'
    )
