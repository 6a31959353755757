"""Facts for the model card that every program states: where a run started, and the versions used.

A corpus or checkpoint is called by its name, never by a path of this machine.
"""

import pathlib
from typing import Any

import flax
import jax
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modernbert_jax

NOT_FOR_CARE = "Not tested for use in clinical care; evaluate it on your own data first."
# Folders inside a run's working directory, whose names do not identify the run.
_UNNAMED = ("checkpoints", "export", "model")


def start_facts(start: str) -> dict[str, Any]:
    """Returns {"base_model", "name"} of a starting checkpoint; a local folder has only a name."""
    path = pathlib.Path(start).expanduser()
    if not path.exists():
        try:
            validate_repo_id(start)
            return {"base_model": start, "name": start}
        except HFValidationError:  # a folder that no longer exists
            pass
    return {"name": _name(path)}


def _name(path: pathlib.Path) -> str:
    """Returns the last part of a path that identifies a run, with the step of a checkpoint."""
    parts = [p for p in path.parts if p not in _UNNAMED and not p.isdigit()]
    name = parts[-1] if parts else path.name
    return f"{name}, step {int(path.name):,}" if path.name.isdigit() and parts else name


def versions() -> str:
    """Returns the versions of the libraries that trained the model."""
    return ", ".join(f"{m.__name__} {m.__version__}" for m in (modernbert_jax, jax, flax))
