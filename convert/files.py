"""What the verbs read and write: a checkpoint in any form, and a DST made whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modernbert_jax import ModernBertConfig
from modernbert_jax.auto import class_of
from modernbert_jax.checkpoint import hf, hub, orbax
from modernbert_jax.checkpoint.files import CONFIG_FILE, TOKENIZER_FILES, read_config

from . import composer, torch_file

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
BIN_FILE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Parameters by our paths; their keys and shapes are those of the configuration.

    cls: the model class that they belong to.
    optimizer: {"step": int, "mu": {path: array}, "nu": {path: array}} or None. tokenizer_dir: a
    folder that may hold tokenizer files. size: bytes of the files that hold the arrays.
    """

    cls: type
    config: ModernBertConfig
    params: dict[str, np.ndarray]
    optimizer: dict[str, Any] | None
    tokenizer_dir: Path
    size: int

    def refuse_values(self, allow_nonfinite: bool) -> None:
        """Raises ValueError for a dtype that is no float, and unless allowed for NaN and inf."""
        _refuse_values(self.params, allow_nonfinite)
        if self.optimizer is not None:
            for name in ("mu", "nu"):
                _refuse_values(self.optimizer[name], allow_nonfinite, f"optimizer {name} ")


# Reading.


def load(source: str, optimizer: bool = False) -> Checkpoint:
    """Reads an HF folder, a hub id or an Orbax folder. Raises ValueError or OSError (one line)."""
    folder = hub.resolve(source)
    return _load_orbax(folder, optimizer) if orbax.is_orbax(folder) else _load_hf(folder, optimizer)


def _load_orbax(folder: Path, optimizer: bool) -> Checkpoint:
    try:
        loaded = orbax.load_orbax(folder, optimizer=optimizer)
    except (ValueError, OSError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{folder}: not a whole Orbax checkpoint ({kind}: {error})") from error
    parts = ("params", "optimizer") if optimizer else ("params",)
    return Checkpoint(
        cls=class_of(loaded["params"], loaded["architecture"]),
        config=loaded["config"],
        params=loaded["params"],
        optimizer=loaded["optimizer"],
        tokenizer_dir=folder,
        size=_size(path for part in parts for path in (folder / part).rglob("*")),
    )


def _load_hf(folder: Path, optimizer: bool) -> Checkpoint:
    if optimizer:
        raise ValueError(f"{folder}: an HF folder holds no optimizer: leave out --optimizer")
    config, architecture = read_config(folder)
    safe, index = hf.WEIGHTS_FILE, hf.INDEX_FILE
    if any((folder / name).exists() for name in (safe, index)):
        tensors, paths = hf.SafetensorsFolder(folder), _shards(folder, safe, index)
    else:
        tensors, paths = _read_bin(folder), _shards(folder, BIN_FILE, BIN_INDEX)
    with _naming(folder):
        cls = class_of(tensors, architecture)
        params = hf.hf_to_params(cls, config, tensors)
    return Checkpoint(cls, config, params, None, folder, _size(paths))


def _shards(folder: Path, whole: str, index: str) -> list[Path]:
    """The one file of weights, or those that the index names."""
    if (folder / whole).exists():
        return [folder / whole]
    return sorted({folder / name for name in hf.read_index(folder / index).values()})


class _OneByOne(dict[str, np.ndarray]):
    """Mapped tensors: reading one lets go of the memory that the one before took."""

    def __getitem__(self, key: str) -> np.ndarray:
        array = super().__getitem__(key)
        torch_file.release_pages(array)
        return array


def _read_bin(folder: Path) -> Mapping[str, np.ndarray]:
    """The tensors of pytorch_model.bin, or of the shards that its index names."""
    if not (folder / BIN_FILE).exists() and not (folder / BIN_INDEX).exists():
        raise ValueError(
            f"{folder}: expected {hf.WEIGHTS_FILE}, {BIN_FILE} or an index of shards, found none"
        )
    tensors = _OneByOne()
    for path in _shards(folder, BIN_FILE, BIN_INDEX):
        if not path.exists():
            raise ValueError(f"{path}: named by the index, not found")
        shard = torch_file.read(path)
        if not isinstance(shard, dict) or not all(
            isinstance(k, str) and isinstance(v, np.ndarray) for k, v in shard.items()
        ):
            raise ValueError(f"{path}: expected a state_dict, names to tensors")
        for key, array in shard.items():
            if key in tensors:
                raise ValueError(f"{path}: {key} is set twice, also in another shard")
            tensors[key] = array
    if not (folder / BIN_FILE).exists():
        missing = sorted(set(hf.read_index(folder / BIN_INDEX)) - set(tensors))
        if missing:
            raise ValueError(f"{folder / BIN_INDEX}: no shard has {', '.join(missing[:5])}")
    return tensors


def load_composer(
    path: Path, folder: Path, config_file: Path | None = None, optimizer: bool = False
) -> Checkpoint:
    """Reads a Composer checkpoint; the tokenizer's files in it are written to `folder`.

    config_file: a FlexBertConfig or an HF config.json, for a checkpoint without its own.
    """
    checkpoint = torch_file.read(path)
    with _naming(path):
        tensors = _OneByOne(composer.to_hf_keys(composer.model_of(checkpoint)))
        tokenizer = composer.tokenizer_of(checkpoint)
        flex = read_json(config_file) if config_file else composer.flex_config_of(checkpoint)
        if flex is None:
            raise ValueError(
                "holds no configuration (state -> integrations): give one with --config FILE, a "
                "FlexBertConfig or an HF config.json"
            )
        is_hf = flex.get("model_type") == "modernbert"
        values = flex if is_hf else composer.hf_config(flex, tokenizer)
        dtype = next((str(array.dtype) for array in tensors.values()), "float32")
        config = ModernBertConfig.from_dict(values | {"dtype": dtype})
        cls = class_of(tensors, None)
        params = hf.hf_to_params(cls, config, tensors)
        state = None
        if optimizer:
            step, *moments = composer.read_moments(checkpoint)
            mu, nu = (hf.hf_to_params(cls, config, _OneByOne(m)) for m in moments)
            state = {"step": step, "mu": mu, "nu": nu}
        for name in TOKENIZER_FILES:
            if name in tokenizer:
                text = json.dumps(tokenizer[name], indent=2, ensure_ascii=False)
                (folder / name).write_text(text + "\n", encoding="utf-8")
    return Checkpoint(cls, config, params, state, folder, path.stat().st_size)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # A file whose parts have other types than any that Composer or transformers writes.
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError that names the file."""
    with _naming(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        return data


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """The tokenizer files of a folder: {name: JSON}."""
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: read_json(path) for path in paths if path.exists()}


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _refuse_values(params: Mapping[str, np.ndarray], allow_nonfinite: bool, what: str = "") -> None:
    bad = []
    for key, array in params.items():
        if array.dtype not in FLOATS:
            raise ValueError(
                f"{what}{key}: expected float32, bfloat16 or float16, got {array.dtype}"
            )
        if not allow_nonfinite and not np.isfinite(array).all():
            bad.append(key)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{what}weights are NaN or infinite: {', '.join(bad[:5])}{more} "
            "(--allow-nonfinite converts them as they are)"
        )


# Writing.


def to_hf(checkpoint: Checkpoint, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """HF's tensors in the memory of `params`, where it can be written to."""
    in_place = all(array.flags.writeable for array in params.values())
    return hf.params_to_hf(checkpoint.cls, checkpoint.config, params, in_place=in_place)


@contextlib.contextmanager
def new(path: Path, overwrite: bool, is_file: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block succeeds.

    Raises ValueError where something is at `path` already, unless `overwrite`; a folder that is no
    checkpoint is never replaced.
    """
    path = path.resolve()
    if path.is_dir() if is_file else path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a {'file' if is_file else 'folder'} to make")
    if path.exists() and (is_file or any(path.iterdir())):
        if not overwrite:
            raise ValueError(f"{path}: exists already; choose another DST or give --overwrite")
        if not is_file and not (path / CONFIG_FILE).exists():
            raise ValueError(f"{path}: holds other things than a checkpoint; remove it yourself")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _put(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _put(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.is_dir():
        path.rename(old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
