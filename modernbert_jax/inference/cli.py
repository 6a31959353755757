"""The commands of the library: exports a model, answers a text, and measures cold starts."""

# argparse rather than tyro: three small commands do not justify a dependency of the library.
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from modernbert_jax.inference.embedder import Embedder
from modernbert_jax.inference.pipelines import pipeline
from modernbert_jax.untrusted import printable


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modernbert_jax", description=(__doc__ or "").split(": ")[1]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a model together with its functions")
    export.add_argument("model", help="folder or hub id")
    export.add_argument("out", help="a new folder, or an earlier export of the same class")
    export.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 512],
        help="lengths of texts, rounded up to those of packed sequences (default 64 512)",
    )  # fmt: skip
    export.add_argument(
        "--platforms", nargs="+", choices=["cpu", "cuda", "tpu"],
        help="by default the platform of this machine",
    )  # fmt: skip
    benchmark = commands.add_parser("benchmark", help="measure a cold start, in two new processes")
    answer = commands.add_parser("answer", help="answer one text, as JSON")
    for command in (benchmark, answer):
        command.add_argument("model", help="folder or hub id")
        command.add_argument("--compile-cache", metavar="DIR", help="folder for compiled programs")
        command.add_argument(
            "--exported", action="store_true", help="use the functions that you exported into MODEL"
        )
        command.add_argument("--text", default="The patient denies [MASK].")
        command.add_argument(
            "--pair", metavar="TEXT",
            help="the second text: of text-ranking the document, of question-answering the "
            "context of the question --text, of text-classification the other text of a pair",
        )  # fmt: skip
        command.add_argument(
            "--labels", nargs="+", metavar="LABEL",
            help="candidate labels of zero-shot-classification",
        )  # fmt: skip
    answer.add_argument("--began", type=float, help=argparse.SUPPRESS)
    for command in (export, benchmark, answer):
        command.add_argument("--task", default="fill-mask", help="a task of pipeline(), or embed")
        command.add_argument("--dtype", help="dtype of computation, by default the file's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, or 2 with one line on stderr for bad input."""
    args = parser().parse_args(argv)
    try:
        if args.command != "export":
            _inputs(args)  # before the model is loaded
        return {"export": _export, "benchmark": _benchmark, "answer": _answer}[args.command](args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {printable(error, 2000)}", file=sys.stderr)
        return 2


def _runner(task: str, model: str, **options: Any) -> Any:
    if task == "embed":
        return Embedder.from_pretrained(model, **options)
    return pipeline(task, model, **options)


def _inputs(args: argparse.Namespace) -> tuple[Any, ...]:
    """Returns the arguments of a call of the task's pipeline.

    Raises ValueError if the task needs --pair or --labels and there is none, or has no use for it.
    """
    takes = {
        "text-ranking": "pair",
        "question-answering": "pair",
        "text-classification": "pair",
        "sentiment-analysis": "pair",
        "zero-shot-classification": "labels",
    }.get(args.task)
    for name in ("pair", "labels"):
        if getattr(args, name) is not None and takes != name:
            raise ValueError(f"--{name}: expected none for {args.task}, got one")
    if takes is None:
        return (args.text,)
    second = getattr(args, takes)
    if args.task in ("text-classification", "sentiment-analysis"):
        return (args.text if second is None else {"text": args.text, "text_pair": second},)
    if second is None:
        raise ValueError(f"--{takes}: expected one for {args.task}, got none")
    return ([args.text, second],) if args.task == "text-ranking" else (args.text, second)


def _export(args: argparse.Namespace) -> int:
    runner = _runner(args.task, args.model, dtype=args.dtype)
    sizes = runner.export(args.out, tokens=args.tokens, platforms=args.platforms)
    print(f"{args.out}: {args.task}, sequences of {', '.join(map(str, sizes))} tokens")
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    given = [args.model, "--task", args.task, "--text", args.text]
    given += ["--compile-cache", args.compile_cache] if args.compile_cache else []
    given += ["--pair", args.pair] if args.pair is not None else []
    given += ["--labels", *args.labels] if args.labels is not None else []
    given += ["--exported"] if args.exported else []
    given += ["--dtype", args.dtype] if args.dtype else []
    for process in ("first process", "second process"):
        print(f"{process}:", flush=True)
        command = [sys.executable, "-m", "modernbert_jax", "answer", *given]
        done = subprocess.run([*command, "--began", str(time.time())], check=False)
        if done.returncode:
            return done.returncode
    return 0


def _answer(args: argparse.Namespace) -> int:
    """Prints the answer, or for `benchmark`, which passes `began`, the times and no text."""
    marks = [args.began or 0.0, time.time()]
    options = {"dtype": args.dtype, "compile_cache": args.compile_cache}
    runner = _runner(args.task, args.model, exported=args.exported, **options)
    marks.append(time.time())
    answer = runner.encode if args.task == "embed" else runner
    inputs = _inputs(args)
    if args.began is None:
        print(json.dumps(answer(*inputs), indent=1, default=lambda x: x.tolist()))
        return 0
    for _ in range(2):
        answer(*inputs)
        marks.append(time.time())
    names = ("python and imports", "weights and tokenizer", "first answer", "second answer")
    for name, start, end in zip(names, marks, marks[1:], strict=False):
        print(f"  {name:<22}{end - start:8.3f} s")
    print(f"  {'cold start in total':<22}{marks[3] - marks[0]:8.3f} s")
    return 0
