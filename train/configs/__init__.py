"""Pretraining experiments. Each file has `get_config()`; its docstring gives the source of the
recipe, the command, the hardware, the hours and the numbers to expect."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes seconds, and `names` answers --help
    from ..pretrain.config import TrainConfig


def names() -> list[str]:
    """The names that `load` accepts, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> "TrainConfig":
    """Returns the configuration of an experiment.

    Raises ValueError with the available names if there is no experiment with this one.
    """
    return _module(name).get_config()


def describe(name: str) -> str:
    """Returns the docstring of an experiment. Raises ValueError as `load` does."""
    return _module(name).__doc__ or ""


def _module(name: str) -> Any:
    if name not in names():
        raise ValueError(f"config: expected one of {', '.join(names())}, got {name!r}")
    return importlib.import_module(f".{name}", __name__)
