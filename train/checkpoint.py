"""The checkpoints of a run: WORKDIR/checkpoints/00001200, in the library's Orbax layout."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax import ModernBertConfig
from modernbert_jax.pretrained import CONFIG_FILE, load_orbax, save_orbax

from .optimizer import StableAdamWState
from .step import TrainState


def folder_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint directory of a step."""
    return workdir / "checkpoints" / f"{step:08d}"


def committed(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The whole checkpoints, oldest first; config.json is written last and makes one whole."""
    return sorted(
        p.parent for p in workdir.glob(f"checkpoints/*/{CONFIG_FILE}") if p.parent.name.isdigit()
    )


def save(
    workdir: pathlib.Path,
    state: TrainState,
    config: ModernBertConfig,
    data: dict[str, Any],
    *,
    keep: int,
) -> pathlib.Path:
    """Saves a step and then removes all but the newest `keep`. data: where the run stands."""
    step = int(state.optimizer.step)
    folder = folder_of(workdir, step)
    if not (folder / CONFIG_FILE).exists():
        host = jax.tree.map(np.asarray, state)
        save_orbax(
            folder,
            config=config,
            params=host.params,
            optimizer={"step": step, "mu": host.optimizer.mu, "nu": host.optimizer.nu},
            tokenizer_dir=workdir / "tokenizer",
            data=data,
        )
    for old in committed(workdir)[:-keep]:
        (old / CONFIG_FILE).unlink()  # from here on it is not whole
        shutil.rmtree(old)
    return folder


def restore(folder: pathlib.Path, config: ModernBertConfig) -> tuple[TrainState, dict[str, Any]]:
    """(state, data) of a checkpoint. Raises ValueError where it has another architecture."""
    loaded = load_orbax(folder, optimizer=True)
    found, expected = loaded["config"].to_dict(), config.to_dict()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "vocab_size", "layer_types", "tie_word_embeddings"):  # fmt: skip
        if found[name] != expected[name]:
            raise ValueError(
                f"{folder}: a checkpoint of another model: {name} expected {expected[name]}, got "
                f"{found[name]}"
            )
    on_device = lambda tree: {k: jnp.asarray(v) for k, v in tree.items()}  # noqa: E731
    optimizer = loaded["optimizer"]
    moments = StableAdamWState(
        jnp.asarray(optimizer["step"], jnp.int32),
        on_device(optimizer["mu"]),
        on_device(optimizer["nu"]),
    )
    return TrainState(on_device(loaded["params"]), moments), loaded["data"] or {}
