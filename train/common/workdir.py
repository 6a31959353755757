"""A run's working directory: its committed checkpoints, and which one to start from."""

import os
import pathlib
import re
from typing import Any

from modernbert_jax.checkpoint.files import CONFIG_FILE
from modernbert_jax.checkpoint.hub import resolve


def is_remote(workdir: Any) -> bool:
    """Returns whether a working directory is in a bucket (gs://...)."""
    return "://" in os.fspath(workdir)


def committed(workdir: Any) -> list[Any]:
    """Returns the committed checkpoints, oldest first; config.json is written last of all files."""
    files = workdir.glob(f"checkpoints/*/{CONFIG_FILE}")
    return sorted(path.parent for path in files if is_checkpoint_name(path.parent.name))


def is_checkpoint_name(name: str) -> bool:
    """Returns whether a file name is that of a checkpoint: 00001200, the step."""
    return re.fullmatch(r"[0-9]{8,}", name) is not None


def start_folder(source: str) -> Any:
    """Returns the folder of a checkpoint: the newest one of a run's workdir, a hub id's copy."""
    folder = pathlib.Path(source).expanduser()
    if (folder / "checkpoints").is_dir():
        found = committed(folder)
        if not found:
            raise ValueError(
                f"{source}: expected a committed checkpoint in this workdir, found none"
            )
        return found[-1]
    return resolve(source)
