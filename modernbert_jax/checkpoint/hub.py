"""Checkpoints by name: a local folder, or a repository of the Hugging Face Hub."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from modernbert_jax.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, TOKENIZER_FILES
from modernbert_jax.checkpoint.hf import INDEX_FILE

MODEL_FILES = (
    CONFIG_FILE, "model*.safetensors", INDEX_FILE, *TOKENIZER_FILES, ADAPTER_FILE,
    # What sentence-transformers adds: its settings, and a numbered folder for each module.
    "modules.json", "*sentence_*.json", "[0-9]*_*.json", "[0-9]*_*.safetensors",
)  # fmt: skip


def resolve(
    path_or_repo: str | os.PathLike[str],
    revision: str | None = None,
    *,
    files: Sequence[str] = MODEL_FILES,
    **hub: Any,
) -> pathlib.Path:
    """Returns the folder of a checkpoint, downloading a hub repository unless it is cached.

    files: names or patterns of the files of a repository that are needed.
    hub: arguments of `huggingface_hub.snapshot_download` (cache_dir, local_files_only, token);
    HF_HUB_OFFLINE is respected. Raises FileNotFoundError for a name that is neither a folder nor a
    hub id, OSError if the hub fails.
    """
    path = pathlib.Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(path_or_repo)
    if path.is_file():
        file = path.suffix in (".pt", ".pth")
        advice = "convert a Composer file with from-composer first" if file else "pass its folder"
        raise NotADirectoryError(f"{text}: expected a checkpoint folder, got a file; {advice}")
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{text}: expected a checkpoint folder or a hub id, found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return pathlib.Path(
            snapshot_download(text, revision=revision, allow_patterns=list(files), **hub)
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{text}: no such folder and not a hub id: {error}") from None
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise OSError(
            f"{text}: not a local folder, and the hub raised {type(error).__name__}: {first}"
        ) from error
