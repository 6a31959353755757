"""The user's own cache folder."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Returns $MODERNBERT_JAX_CACHE, by default modernbert_jax in $XDG_CACHE_HOME or ~/.cache."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "modernbert_jax"
    return pathlib.Path(os.environ.get("MODERNBERT_JAX_CACHE") or default).expanduser()
