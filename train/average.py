"""The mean of several checkpoints' weights, as an HF folder.

    python -m train average CKPT CKPT ... --out DIR

ModernBERT-base was released as the mean of its three best checkpoints of the decay phase and the
last one (arXiv 2412.13663, A.4); for large the best one alone was better.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from modernbert_jax.auto import read_params
from modernbert_jax.checkpoint.files import CONFIG_FILE
from modernbert_jax.checkpoint.hf import params_to_hf, write_hf
from modernbert_jax.checkpoint.hub import resolve

from .common.card import start_facts

# What may differ between the checkpoints: none of it changes what the weights mean.
_FREE = {
    "hf_extra", "dtype", "param_dtype", "residual_dtype", "embedding_dropout", "attention_dropout",
    "attention_out_dropout", "mlp_dropout", "classifier_dropout",
}  # fmt: skip


def average(checkpoints: Sequence[str | os.PathLike], out: str | os.PathLike) -> None:
    """Writes the mean of the checkpoints' weights to `out`, an HF folder.

    checkpoints: HF folders, hub ids or Orbax directories, at least two; tokenizer, config and dtype
    are the first one's. Sums are float64; one checkpoint at a time is in memory beside them.
    Raises ValueError for fewer than two, for another architecture and for a weight that is not
    finite, FileExistsError where `out` holds a checkpoint, FileNotFoundError or OSError where a
    source is none.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"average: expected at least 2 checkpoints, got {len(checkpoints)}")
    out = pathlib.Path(out)
    if (out / CONFIG_FILE).exists():
        raise FileExistsError(f"{out}: expected a new folder, found a checkpoint")
    folders = [resolve(source) for source in checkpoints]
    cls, config, weights = read_params(folders[0])
    dtypes = {path: w.dtype for path, w in weights.items()}
    total = {path: np.zeros(w.shape, np.float64) for path, w in weights.items()}
    for folder in folders:
        _, found, weights = read_params(folder)
        _refuse_others(folders[0], config, set(total), folder, found, set(weights))
        for path, sum_ in total.items():
            if not np.isfinite(weights[path]).all():
                raise ValueError(f"{folder}: {path}: expected finite weights, found NaN or inf")
            sum_ += weights[path]
        del weights
    mean = {path: (total.pop(path) / len(folders)).astype(dtypes[path]) for path in dtypes}
    write_hf(
        out, config, params_to_hf(cls, config, mean, in_place=True),
        tokenizer_dir=folders[0], architecture=cls.__name__,
        card={"training": {"Mean of": [start_facts(os.fspath(c))["name"] for c in checkpoints]}},
    )  # fmt: skip


def _refuse_others(first, config, paths, folder, found, found_paths) -> None:
    for field in dataclasses.fields(config):
        expected, got = getattr(config, field.name), getattr(found, field.name)
        if field.name not in _FREE and expected != got:
            raise ValueError(
                f"{folder}: another architecture: {field.name}: expected {expected} as in {first}, "
                f"got {got}"
            )
    if paths != found_paths:
        odd = ", ".join(sorted(paths ^ found_paths)[:3])
        raise ValueError(f"{folder}: another architecture: not in both it and {first}: {odd}")


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `average`; raises what `average` raises."""
    parser = argparse.ArgumentParser(
        prog="python -m train average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="an HF folder, hub id or Orbax directory"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new HF folder")
    args = parser.parse_args(argv)
    average(args.checkpoints, args.out)
    print(f"the mean of {len(args.checkpoints)} checkpoints: {args.out}")
    return 0
