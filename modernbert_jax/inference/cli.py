"""The commands of the library: exports a model with its functions; measures a cold start."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from modernbert_jax import Embedder, pipeline


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modernbert_jax", description=(__doc__ or "").split(": ")[1]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export", help="write a model with its functions")
    export.add_argument("model", help="folder or hub id")
    export.add_argument("out", help="a new folder, or one written so before")
    export.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 512],
        help="lengths of texts, each rounded up to a size of row (default 64 512)",
    )  # fmt: skip
    export.add_argument(
        "--platforms", nargs="+", choices=["cpu", "cuda", "tpu"],
        help="by default the one at hand",
    )  # fmt: skip
    timed = verbs.add_parser("benchmark", help="cold start and first answer, in two new processes")
    answer = verbs.add_parser("answer", help="one text, with the times")
    for verb in (timed, answer):
        verb.add_argument("model", help="folder or hub id")
        verb.add_argument("--compile-cache", metavar="DIR", help="keeps compiled programs")
        verb.add_argument("--text", default="The patient denies [MASK].")
    answer.add_argument("--began", type=float, help=argparse.SUPPRESS)
    for verb in (export, timed, answer):
        verb.add_argument("--task", default="fill-mask", help="as for pipeline(), or embed")
        verb.add_argument("--dtype", help="computes; by default the file's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `export`, `time` or `answer`; returns the exit code: 0, or 2 with one line."""
    args = parser().parse_args(argv)
    try:
        return {"export": _export, "benchmark": _benchmark, "answer": _answer}[args.verb](args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _runner(task: str, model: str, **options: Any) -> Any:
    if task == "embed":
        return Embedder.from_pretrained(model, **options)
    return pipeline(task, model, **options)


def _export(args: argparse.Namespace) -> int:
    runner = _runner(args.task, args.model, dtype=args.dtype)
    sizes = runner.export(args.out, tokens=args.tokens, platforms=args.platforms)
    print(f"{args.out}: {args.task}, rows of {', '.join(map(str, sizes))} tokens")
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    given = [args.model, "--task", args.task, "--text", args.text]
    given += ["--compile-cache", args.compile_cache] if args.compile_cache else []
    given += ["--dtype", args.dtype] if args.dtype else []
    for which in ("one process", "the next"):
        print(f"{which}:", flush=True)
        command = [sys.executable, "-m", "modernbert_jax", "answer", *given]
        done = subprocess.run([*command, "--began", str(time.time())], check=False)
        if done.returncode:
            return done.returncode
    return 0


def _answer(args: argparse.Namespace) -> int:
    marks = [time.time() if args.began is None else args.began, time.time()]
    runner = _runner(args.task, args.model, dtype=args.dtype, compile_cache=args.compile_cache)
    marks.append(time.time())
    answer = runner.encode if args.task == "embed" else runner
    for _ in range(2):
        answer(args.text)
        marks.append(time.time())
    names = ("python and imports", "weights and tokenizer", "first answer", "second answer")
    for name, start, end in zip(names, marks, marks[1:], strict=False):
        if name != names[0] or args.began:  # only a parent knows when the process began
            print(f"  {name:<22}{end - start:8.3f} s")
    print(f"  {'cold start, in all':<22}{marks[3] - marks[0]:8.3f} s")
    return 0
