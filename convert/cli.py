"""The commands that convert checkpoints between Hugging Face's layout, Orbax and Composer."""

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from .files import Checkpoint

# The commands import jax (through .files) when they run, so that --help answers at once.

# In a wheel this package is modernbert_jax.convert, which `python -m convert` does not find.
PROGRAM = "python -m convert" if __package__ == "convert" else "modernbert-jax convert"

DESCRIPTION = f"""Converts ModernBERT checkpoints between three forms:

- a Hugging Face folder: config.json and model.safetensors (or its shards, or pytorch_model.bin)
- an Orbax folder, which training reads and writes: config.json and params/, perhaps optimizer/
- a Composer file (.pt), the form in which ModernBERT was trained; needs torch

Examples:

  {PROGRAM} from-hf answerdotai/ModernBERT-base base/
  {PROGRAM} to-hf runs/notes/final exported/
  {PROGRAM} from-composer ep0-ba52988-rank0.pt start/ --optimizer
  {PROGRAM} to-composer runs/notes/final latest-rank0.pt --optimizer
  {PROGRAM} check exported/ --json parity.json

Every value keeps its bits and its dtype. Nothing in a file is executed. DST appears only when it is
complete. The exit code is 0, 1 if a check fails, and 2 for bad input (one line on stderr).
"""


@dataclass
class _Conversion:
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """The checkpoint to read."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The folder or file to create."""

    overwrite: bool = False
    """Replace the checkpoint at DST."""

    allow_nonfinite: bool = False
    """Also convert weights that are NaN or infinite, which are refused otherwise."""

    def run(self) -> int:
        """Converts, prints a report and returns the exit code."""
        from . import files

        started = time.perf_counter()
        is_file = isinstance(self, ToComposer)
        new = files.new(self.dst, self.overwrite, is_file)
        with new as temporary, tempfile.TemporaryDirectory() as scratch:
            checkpoint = self._load(Path(scratch))
            checkpoint.refuse_values(self.allow_nonfinite)
            self._save(checkpoint, temporary)
        self._report(checkpoint, time.perf_counter() - started)
        return 0

    def _load(self, scratch: Path) -> "Checkpoint":
        from . import files

        return files.load(self.src)

    def _save(self, checkpoint: "Checkpoint", path: Path) -> None:
        from modernbert_jax.checkpoint import orbax

        orbax.save_orbax(
            path,
            architecture=checkpoint.cls.__name__,
            config=checkpoint.config,
            params=checkpoint.params,
            optimizer=checkpoint.optimizer,
            tokenizer_dir=checkpoint.tokenizer_dir,
        )

    def _report(self, checkpoint: "Checkpoint", seconds: float) -> None:
        params, size, state = checkpoint.params, checkpoint.size, checkpoint.optimizer
        count = sum(array.size for array in params.values())
        dtypes = ", ".join(sorted({str(array.dtype) for array in params.values()}))
        moments = f", moments at step {state['step']:,}" if state else ""
        peak = peak_memory()
        name = next(name for name, command in COMMANDS.items() if command is type(self))
        print(f"{name}: {len(params)} tensors, {count:,} parameters, {dtypes}{moments}")
        print(f"  {self.src} ({size / 2**20:.1f} MiB) -> {self.dst}")
        memory = f"peak memory {peak / 2**20:.0f} MiB ({peak / size:.2f} times the file)"
        print(f"  {seconds:.1f} s, {memory}")


@dataclass
class FromHf(_Conversion):
    """Converts a Hugging Face folder or hub id (SRC) to an Orbax folder (DST)."""


@dataclass
class ToHf(_Conversion):
    """Converts an Orbax folder (SRC) to a Hugging Face folder (DST) with a model card."""

    def _save(self, checkpoint: "Checkpoint", path: Path) -> None:
        from modernbert_jax.checkpoint import hf

        from . import files

        hf.write_hf(
            path,
            checkpoint.config,
            files.to_hf(checkpoint, checkpoint.params),
            architecture=checkpoint.cls.__name__,
            tokenizer_dir=checkpoint.tokenizer_dir,
            card={"training": {"Converted from": Path(self.src).name}},
        )


@dataclass
class FromComposer(_Conversion):
    """Converts a Composer checkpoint of FlexBERT (SRC, a .pt file) to an Orbax folder (DST)."""

    optimizer: bool = False
    """Also convert the moments and the step of StableAdamW, so that training can resume."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The configuration, if SRC holds none: JSON of a FlexBertConfig or Hugging Face's
    config.json."""

    def _load(self, scratch: Path) -> "Checkpoint":
        from . import files

        return files.load_composer(Path(self.src), scratch, self.config, self.optimizer)


@dataclass
class ToComposer(_Conversion):
    """Converts a masked LM (SRC: Orbax folder, Hugging Face folder or hub id) to a Composer
    checkpoint (DST, a .pt file)."""

    optimizer: bool = False
    """Also convert the moments and the step of StableAdamW; only an Orbax folder holds them."""

    lr: float = 3e-4
    """Learning rate of the optimizer's parameter groups, which our checkpoints do not hold."""

    weight_decay: float = 1e-5
    """Weight decay of the optimizer's parameter groups; norms and biases have none."""

    def _load(self, scratch: Path) -> "Checkpoint":
        from . import files, torch_file

        torch_file.require_torch("writing")
        return files.load(self.src, self.optimizer)

    def _save(self, checkpoint: "Checkpoint", path: Path) -> None:
        from . import files

        files.save_composer(checkpoint, path, lr=self.lr, weight_decay=self.weight_decay)


@dataclass
class Check:
    """Compares this library with transformers on the same checkpoint, layer by layer, in float32.

    Prints a parity report: the largest error of each layer relative to the largest value of the
    reference. Needs torch and transformers. The exit code is 1 if an error exceeds the tolerance.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A Hugging Face folder, a hub id or an Orbax folder."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file, as JSON with hashes and versions."""

    tolerance: float = 1e-5
    """The largest relative error that passes."""

    def run(self) -> int:
        """Prints the report and returns the exit code."""
        from . import check

        return check.run(self.src, self.json, self.tolerance)


COMMANDS = {
    "from-hf": FromHf,
    "to-hf": ToHf,
    "from-composer": FromComposer,
    "to-composer": ToComposer,
    "check": Check,
}


def parse(argv: list[str] | None = None) -> Any:
    """Returns the command that the arguments describe; exits with code 2 for wrong arguments."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog=PROGRAM,
        description=DESCRIPTION,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a failed check, 2 for bad input."""
    command = parse(argv)
    # A conversion needs no accelerator and must not take memory on one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return command.run()
    except (ValueError, OSError, ImportError) as error:
        from modernbert_jax.untrusted import printable

        print(f"error: {printable(' '.join(str(error).split()), 2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; DST is unchanged", file=sys.stderr)
        return 130


def peak_memory() -> int:
    """Returns the largest amount of memory that this process has used, in bytes."""
    with contextlib.suppress(OSError):  # On Linux getrusage counts the parent process, too.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
