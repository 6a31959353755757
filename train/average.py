"""Averages the weights of several checkpoints."""

import dataclasses
import os
import pathlib
from typing import Annotated

import numpy as np
import tyro

from modernbert_jax.auto import read_params
from modernbert_jax.checkpoint.files import CONFIG_FILE
from modernbert_jax.checkpoint.hf import params_to_hf, write_hf
from modernbert_jax.checkpoint.hub import resolve

from .common.card import start_facts

# Fields that may differ between the checkpoints: they do not change the meaning of the weights.
_MAY_DIFFER = {
    "hf_extra", "dtype", "param_dtype", "residual_dtype", "embedding_dropout", "attention_dropout",
    "attention_out_dropout", "mlp_dropout", "classifier_dropout",
}  # fmt: skip


Checkpoints = Annotated[
    tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT CHECKPOINT ...")
]


def average(checkpoints: Checkpoints, out: str) -> str:
    """Average the weights of several checkpoints into a Hugging Face folder. Returns a summary.

    ModernBERT-base was released as the mean of its last checkpoint and the three best ones of the
    decay phase (arXiv 2412.13663, A.4); for large the best checkpoint alone was better.

    Sums are in float64; besides them, one checkpoint at a time is in memory. Raises ValueError for
    fewer than two checkpoints, for another architecture and for weights that are not finite,
    FileExistsError if `out` holds a checkpoint, and FileNotFoundError or OSError if a source holds
    none.

    Args:
        checkpoints: At least two Hugging Face folders, hub ids or Orbax directories. Tokenizer,
            config and dtype are taken from the first one.
        out: A new Hugging Face folder.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"average: expected at least 2 checkpoints, got {len(checkpoints)}")
    target = pathlib.Path(out)
    if (target / CONFIG_FILE).exists():
        raise FileExistsError(f"{target}: expected a new folder, found a checkpoint")
    folders = [resolve(source) for source in checkpoints]
    cls, config, weights = read_params(folders[0])
    dtypes = {path: w.dtype for path, w in weights.items()}
    total = {path: np.zeros(w.shape, np.float64) for path, w in weights.items()}
    for folder in folders:
        _, found, weights = read_params(folder)
        _check_architecture(folders[0], config, set(total), folder, found, set(weights))
        for path, sum_ in total.items():
            if not np.isfinite(weights[path]).all():
                raise ValueError(f"{folder}: {path}: expected finite weights, found NaN or inf")
            sum_ += weights[path]
        del weights
    mean = {path: (total.pop(path) / len(folders)).astype(dtypes[path]) for path in dtypes}
    write_hf(
        target, config, params_to_hf(cls, config, mean, in_place=True),
        tokenizer_dir=folders[0], architecture=cls.__name__,
        card={"training": {"Mean of": [start_facts(os.fspath(c))["name"] for c in checkpoints]}},
    )  # fmt: skip
    return f"averaged {len(checkpoints)} checkpoints into {out}"


def _check_architecture(first, config, paths, folder, found, found_paths) -> None:
    for field in dataclasses.fields(config):
        expected, got = getattr(config, field.name), getattr(found, field.name)
        if field.name not in _MAY_DIFFER and expected != got:
            raise ValueError(
                f"{folder}: another architecture: {field.name}: expected {expected} as in {first}, "
                f"got {got}"
            )
    if paths != found_paths:
        odd = ", ".join(sorted(paths ^ found_paths)[:3])
        raise ValueError(f"{folder}: another architecture: only one of it and {first} has {odd}")
