"""python -m convert VERB: checkpoints between HF's layout, Orbax and Composer."""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import Checkpoint

# The verbs import jax (through .files) when they run: --help answers at once.

EXAMPLES = """examples:
  python -m convert from-hf answerdotai/ModernBERT-base base/
  python -m convert to-hf runs/notes/final exported/
  python -m convert from-composer ep0-ba52988-rank0.pt start/ --optimizer
  python -m convert to-composer runs/notes/final latest-rank0.pt --optimizer
  python -m convert check exported/ --json parity.json

An HF folder holds config.json and model.safetensors (or shards, or pytorch_model.bin); an Orbax
folder holds config.json and params/. Values and dtypes are kept bit for bit. Nothing in a file is
executed. Exit code: 0, 1 for a failed check, 2 for bad input (one line on stderr, DST untouched).
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    args = _parser().parse_args(argv)
    # A conversion needs no accelerator and must not take one's memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; DST is untouched", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Checkpoints between HF's layout, Orbax and Composer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, src: str, dst: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, verb=name)
        sub.add_argument("src", metavar="SRC", help=src)
        sub.add_argument("dst", metavar="DST", type=Path, help=dst)
        sub.add_argument("--overwrite", action="store_true", help="replace what is at DST")
        sub.add_argument(
            "--allow-nonfinite", action="store_true", help="convert NaN and infinite weights too"
        )
        return sub

    folder = "HF folder, hub id or Orbax folder"
    optimizer = "bring StableAdamW's moments and step along"
    verb("from-hf", _to_orbax, "HF's layout to Orbax", folder, "Orbax folder to make")
    verb("to-hf", _to_hf, "Orbax to HF's layout", folder, "HF folder to make")
    sub = verb(
        "from-composer",
        _to_orbax,
        "a Composer checkpoint of FlexBERT to Orbax",
        "Composer's .pt file",
        "Orbax folder to make",
    )
    sub.add_argument("--optimizer", action="store_true", help=optimizer)
    sub.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration, where SRC has none: JSON of a FlexBertConfig or HF's config.json",
    )
    sub = verb(
        "to-composer", _to_composer, "a masked LM to Composer's format", folder, ".pt file to make"
    )
    sub.add_argument("--optimizer", action="store_true", help=optimizer)
    sub.add_argument("--lr", type=float, default=3e-4, help="of its groups (%(default)s)")
    sub.add_argument("--weight-decay", type=float, default=1e-5, help="likewise (%(default)s)")

    text = "a parity certificate: this model against transformers, layer by layer"
    sub = verbs.add_parser("check", help=text, description=text)
    sub.set_defaults(run=_check, verb="check")
    sub.add_argument("src", metavar="DIR", help=folder)
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest error, relative to the reference's largest value (%(default)s)",
    )
    return parser


def _to_orbax(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    from modernbert_jax.checkpoint import orbax

    from . import files

    with files.new(args.dst, args.overwrite) as temporary, tempfile.TemporaryDirectory() as folder:
        checkpoint = _load(args, folder)
        orbax.save_orbax(
            temporary,
            architecture=checkpoint.cls.__name__,
            config=checkpoint.config,
            params=checkpoint.params,
            optimizer=checkpoint.optimizer,
            tokenizer_dir=checkpoint.tokenizer_dir,
        )
    return _report(args, checkpoint, started)


def _to_hf(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    from modernbert_jax.checkpoint import hf

    from . import files

    with files.new(args.dst, args.overwrite) as temporary:
        checkpoint = _load(args)
        hf.write_hf(
            temporary,
            checkpoint.config,
            files.to_hf(checkpoint, checkpoint.params),
            architecture=checkpoint.cls.__name__,
            tokenizer_dir=checkpoint.tokenizer_dir,
            card={"training": {"Converted from": Path(args.src).name}},
        )
    return _report(args, checkpoint, started)


def _to_composer(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    from . import composer, files, torch_file

    with files.new(args.dst, args.overwrite, is_file=True) as temporary:
        checkpoint = _load(args)
        config, state, optimizers = checkpoint.config, checkpoint.optimizer, None
        if state is not None:
            optimizers = composer.write_moments(
                state["step"],
                files.to_hf(checkpoint, state["mu"]),
                files.to_hf(checkpoint, state["nu"]),
                lr=args.lr,
                weight_decay=args.weight_decay,
            )
        tensors = files.to_hf(checkpoint, checkpoint.params)
        tokenizer = files.tokenizer_json(checkpoint.tokenizer_dir)
        obj = composer.checkpoint_of(config.to_dict(), tensors, tokenizer, optimizers)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        torch_file.write(temporary, obj)
    return _report(args, checkpoint, started)


def _check(args: argparse.Namespace) -> int:
    from . import check

    return check.run(args.src, args.json, args.tolerance)


def _load(args: argparse.Namespace, folder: str = "") -> "Checkpoint":
    from . import files

    optimizer = getattr(args, "optimizer", False)
    if args.verb == "from-composer":
        checkpoint = files.load_composer(Path(args.src), Path(folder), args.config, optimizer)
    else:
        checkpoint = files.load(args.src, optimizer)
    checkpoint.refuse_values(args.allow_nonfinite)
    return checkpoint


def _report(args: argparse.Namespace, checkpoint: "Checkpoint", started: float) -> int:
    params, size, state = checkpoint.params, checkpoint.size, checkpoint.optimizer
    count = sum(array.size for array in params.values())
    dtypes = ", ".join(sorted({str(array.dtype) for array in params.values()}))
    moments = f", moments at step {state['step']:,}" if state else ""
    seconds, peak = time.perf_counter() - started, peak_memory()
    print(f"{args.verb}: {len(params)} tensors, {count:,} parameters, {dtypes}{moments}")
    print(f"  {args.src} ({size / 2**20:.1f} MiB) -> {args.dst}")
    print(
        f"  {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB ({peak / size:.2f} times the file)"
    )
    return 0


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    with contextlib.suppress(OSError):  # Linux, where getrusage counts the parent's as well
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
