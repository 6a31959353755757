"""File names and small writes that every checkpoint layout shares.

Paths are pathlib's, or etils' epath for buckets (gs://...).
"""

import os
import pathlib
import shutil
from typing import Any

from modernbert_jax.config import ModernBertConfig
from modernbert_jax.tokenizer import FILES as TOKENIZER_FILES
from modernbert_jax.untrusted import MAX_MODEL_JSON, printable, read_json, refuse_pointer

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"


def absolute_path(path: str | os.PathLike[str]) -> Any:
    """The absolute form of a local path; any other kind of path is returned unchanged."""
    return pathlib.Path(path).absolute() if isinstance(path, str | pathlib.Path) else path


def write_text(path: Any, text: str) -> None:
    """Writes a text file atomically: readers see the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Any, content: bytes) -> None:
    """Writes a binary file atomically: it is complete on the disk before it has its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        if isinstance(path, pathlib.Path):  # a file in a bucket has no descriptor
            os.fsync(file.fileno())
    temporary.replace(path)


def remove_tree(folder: Any) -> None:
    """Removes a directory and everything in it."""
    folder.rmtree() if hasattr(folder, "rmtree") else shutil.rmtree(folder)


def copy_tokenizer(source: str | os.PathLike[str] | None, folder: Any) -> None:
    """Copies the tokenizer files that exist in `source`, tokenizer.json last.

    Raises ValueError for a Git LFS pointer.
    """
    if source is None:
        return
    for name in reversed(TOKENIZER_FILES):
        path = absolute_path(source) / name
        if path.exists() and path != folder / name:
            refuse_pointer(path)
            write_bytes(folder / name, path.read_bytes())


def read_config(folder: Any) -> tuple[ModernBertConfig, str | None]:
    """Reads config.json: the configuration and the model class it names, None if it names none.

    Raises FileNotFoundError if the file is missing, ValueError if it is not a valid configuration
    or the folder holds a PEFT adapter.
    """
    path = absolute_path(folder) / CONFIG_FILE
    refuse_adapter(path.parent)
    if not path.exists():
        # Such as 0_Transformer of sentence-transformers, or checkpoint-500 of a Trainer.
        inner = sorted(str(p.parent) for p in path.parent.glob(f"*/{CONFIG_FILE}"))
        hint = f"; the model is in a folder below it, load that: {', '.join(inner[:3])}"
        raise FileNotFoundError(
            f"{folder}: expected {CONFIG_FILE}, found none{hint if inner else ''}"
        )
    config = ModernBertConfig.from_json(path)
    names = read_json(path, MAX_MODEL_JSON).get("architectures")
    return config, str(names[0]) if isinstance(names, list) and names else None


def states_dtype(folder: Any) -> bool:
    """Whether config.json states a dtype, as `dtype` or `torch_dtype`."""
    data = read_json(absolute_path(folder) / CONFIG_FILE, MAX_MODEL_JSON)
    return bool(data.get("dtype") or data.get("torch_dtype"))


def refuse_adapter(folder: Any) -> None:
    """Raises ValueError if a folder holds a PEFT adapter: only the changes to another model."""
    path = folder / ADAPTER_FILE
    if not path.exists():
        return
    refuse_pointer(path)
    try:
        base = printable(read_json(path, MAX_MODEL_JSON)["base_model_name_or_path"])
    except (ValueError, KeyError):
        base = "its base model"
    raise ValueError(
        f"{folder}: expected a model, found a PEFT adapter ({ADAPTER_FILE}); merge it into {base} "
        "with lora.load_adapter and lora.merge (or peft's merge_and_unload), then save_pretrained, "
        "and load the result"
    )
