"""python -m train VERB: the command line, made from the dataclasses."""

import importlib
import pathlib
import pkgutil
import sys

import tyro

USAGE = """usage: python -m train VERB ...

  corpora        lists the corpora: access, license, size, what is on disk
  prepare        turns a corpus into text and shards of tokens, once
  mixture        shows tokens and shares of prepared corpora, with the flags that train on them
  decontaminate  finds documents of a corpus that share word spans with a test set
  pretrain       masked-LM pretraining in phases; takes up a run that was interrupted
  plan           compile a run for devices that are not here: memory, exchanges, hours
  average        the mean of several checkpoints
  finetune       a task over seeds and a grid, with its table of scores; or retrieval

  python -m train pretrain --config demo
  python -m train pretrain --config demo --corpus notes/ --workdir runs/notes
  python -m train pretrain --config demo --phases.0.learning-rate 1e-3 --global-batch-size 16
  python -m train VERB --help                 (pretrain: --config NAME --help, with its values)

configs: {configs}
"""


def config_names() -> list[str]:
    """The experiments in train/configs."""
    folder = pathlib.Path(__file__).parent / "configs"
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]))


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, or 2 with one line on stderr for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format(configs=", ".join(config_names()))
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0 if args else 2
    verbs = {
        "prepare": _prepare,
        "pretrain": _pretrain,
        "plan": _plan,
        "finetune": _finetune,
        "average": _average,
        "corpora": _corpora,
        "mixture": _mixture,
        "decontaminate": _decontaminate,
    }
    if args[0] not in verbs:
        print(
            f"error: expected one of {', '.join(verbs)}, got {args[0]!r}\n\n{usage}",
            file=sys.stderr,
        )
        return 2
    try:
        return verbs[args[0]](args[1:])
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _pretrain(args: list[str]) -> int:
    from .pretrain import run as loop
    from .pretrain.config import TrainConfig

    name, rest = _take(args, "--config")
    default = TrainConfig()
    description = "Masked-LM pretraining in phases."
    if name is not None:
        if name not in config_names():
            raise ValueError(f"--config: expected one of {', '.join(config_names())}, got {name!r}")
        module = importlib.import_module(f".configs.{name}", __package__)
        default, description = module.get_config(), module.__doc__ or description
    config = tyro.cli(
        TrainConfig, prog="python -m train pretrain", args=rest, default=default,
        description=description,
    )  # fmt: skip
    loop.run(config, recipe=name or "")
    return 0


def _prepare(args: list[str]) -> int:
    from .corpora.build.prepare import prepare

    print(tyro.cli(prepare, prog="python -m train prepare", args=args))
    return 0


def _corpora(args: list[str]) -> int:
    from .corpora.reports.catalogue import catalogue

    print(tyro.cli(catalogue, prog="python -m train corpora", args=args))
    return 0


def _mixture(args: list[str]) -> int:
    from .corpora.reports.mixture import mixture

    print(tyro.cli(mixture, prog="python -m train mixture", args=args))
    return 0


def _decontaminate(args: list[str]) -> int:
    from .corpora.reports.decontaminate import decontaminate

    print(tyro.cli(decontaminate, prog="python -m train decontaminate", args=args))
    return 0


def _finetune(args: list[str]) -> int:
    name, rest = _take(args, "--task")
    if name == "retrieval":
        from .finetune import retrieval

        prog = "python -m train finetune --task retrieval"
        retrieval.train(tyro.cli(retrieval.RetrievalConfig, prog=prog, args=rest))
        return 0
    from .finetune.run import FinetuneConfig, finetune

    finetune(tyro.cli(FinetuneConfig, prog="python -m train finetune", args=args))
    return 0


def _average(args: list[str]) -> int:
    from .average import main

    return main(args)


def _plan(args: list[str]) -> int:
    from .plan.search import main

    return main(args)


def _take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of one flag and the other arguments."""
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args):
                raise ValueError(f"{flag}: expected a name after it")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(flag + "="):
            return arg.removeprefix(flag + "="), args[:i] + args[i + 1 :]
    return None, args
