"""Reads a checkpoint in any form, and writes a destination completely or not at all."""

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

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.auto import class_of
from modernbert_jax.checkpoint import hf, hub, orbax
from modernbert_jax.checkpoint.files import CONFIG_FILE, TOKENIZER_FILES, read_config
from modernbert_jax.checkpoint.params import widest_dtype, with_dtype
from modernbert_jax.untrusted import printable, read_json, shown
from modernbert_jax.weights import DECODER, EMBEDDING

from . import composer, flexbert, moments, torch_file

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
BIN_FILE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The parameters {path: array} of the model class `cls`, and what belongs to them.

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
        """Raises ValueError for integer weights, and for NaN and infinity unless allowed."""
        _refuse_values(self.params, allow_nonfinite)
        if self.optimizer is not None:
            for name in ("mu", "nu"):
                _refuse_values(self.optimizer[name], allow_nonfinite, f"optimizer {name} ")


# Reading.


def load(source: str, optimizer: bool = False) -> Checkpoint:
    """Reads a Hugging Face folder, a hub id or an Orbax folder.

    Raises ValueError or OSError, with one line.
    """
    folder = hub.resolve(source)
    return _load_orbax(folder, optimizer) if orbax.is_orbax(folder) else _load_hf(folder, optimizer)


def _load_orbax(folder: Path, optimizer: bool) -> Checkpoint:
    loaded = orbax.load_orbax(folder, optimizer=optimizer)
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
        tensors = hf.SafetensorsFolder(folder, config.tie_word_embeddings)
        paths = _shards(folder, safe, index)
    else:
        tensors = _read_bin(folder, config.tie_word_embeddings)
        paths = _shards(folder, BIN_FILE, BIN_INDEX)
    with _naming(folder):
        cls = class_of(tensors, architecture)
        params = hf.hf_to_params(cls, config, tensors)
        config = with_dtype(config, folder, tensors)
    return Checkpoint(cls, config, params, None, folder, _size(paths))


def _shards(folder: Path, single: str, index: str) -> list[Path]:
    """Returns the single file of weights, or the files that the index names."""
    if (folder / single).exists():
        return [folder / single]
    return sorted({folder / name for name in hf.read_index(folder / index).values()})


class _OneByOne(dict[str, np.ndarray]):
    """Tensors mapped from a file; each access releases the memory that the last one took."""

    _last: np.ndarray | None = None

    def __getitem__(self, key: str) -> np.ndarray:
        if self._last is not None:
            torch_file.release_pages(self._last)
        self._last = super().__getitem__(key)
        return self._last


def _read_bin(folder: Path, tied: bool) -> Mapping[str, np.ndarray]:
    """Reads the tensors of pytorch_model.bin, or of the shards that its index names.

    tied: as in `hf.SafetensorsFolder`.
    """
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
            if key != printable(key):
                raise ValueError(f"{path}: expected short, printable names, got {shown(key)}")
            if key in tensors:
                raise ValueError(f"{path}: {key} is set twice, also in another shard")
            tensors[key] = array
    if not (folder / BIN_FILE).exists():
        absent = {DECODER} if tied and EMBEDDING in tensors else set()
        missing = sorted(set(hf.read_index(folder / BIN_INDEX)) - set(tensors) - absent)
        if missing:
            raise ValueError(f"{folder / BIN_INDEX}: no shard has {', '.join(missing[:5])}")
    return tensors


def load_composer(
    path: Path, folder: Path, config_file: Path | None = None, optimizer: bool = False
) -> Checkpoint:
    """Reads a Composer checkpoint and writes the tokenizer's files inside it to `folder`.

    config_file: a FlexBertConfig or an HF config.json, for a checkpoint that holds none.
    """
    if path.is_dir():
        kind = "an Orbax folder, which training reads as it is; to-hf converts it"
        if not orbax.is_orbax(path):
            kind = "a folder; from-hf converts a Hugging Face folder"
        raise IsADirectoryError(f"{path}: expected a Composer file (.pt), got {kind}")
    checkpoint = torch_file.read(path)
    with _naming(path):
        tensors = _OneByOne(composer.to_hf_keys(composer.model_of(checkpoint)))
        tokenizer = composer.tokenizer_of(checkpoint)
        values = read_json(config_file) if config_file else composer.flex_config_of(checkpoint)
        if values is None:
            raise ValueError(
                "holds no configuration (state -> integrations): give one with --config FILE, a "
                "FlexBertConfig or an HF config.json"
            )
        if values.get("model_type") != "modernbert":
            values = flexbert.hf_config(values, tokenizer)
        config = ModernBertConfig.from_dict(values | {"dtype": widest_dtype(tensors)})
        cls, state = ModernBertForMaskedLM, None
        params = hf.hf_to_params(cls, config, tensors)
        if optimizer:
            step, *pair = moments.read_moments(checkpoint)
            mu, nu = (hf.hf_to_params(cls, config, _OneByOne(m)) for m in pair)
            state = {"step": step, "mu": mu, "nu": nu}
        for name in TOKENIZER_FILES:
            if name in tokenizer:
                text = json.dumps(tokenizer[name], indent=2, ensure_ascii=False)
                (folder / name).write_text(text + "\n", encoding="utf-8")
    return Checkpoint(cls, config, params, state, folder, path.stat().st_size)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name of the file before an error about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error, 1000)}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # The parts of the file have types that neither Composer nor transformers writes.
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {printable(error)})") from error


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
    """Converts parameters or moments to HF tensors, in the memory of `params` if it is writable."""
    in_place = all(array.flags.writeable for array in params.values())
    return hf.params_to_hf(checkpoint.cls, checkpoint.config, params, in_place=in_place)


def save_composer(checkpoint: Checkpoint, path: Path, *, lr: float, weight_decay: float) -> None:
    """Writes a Composer checkpoint; lr and weight_decay go into the optimizer's groups, if any."""
    state, optimizers = checkpoint.optimizer, None
    if state is not None:
        mu, nu = (to_hf(checkpoint, state[name]) for name in ("mu", "nu"))
        optimizers = moments.write_moments(state["step"], mu, nu, lr=lr, weight_decay=weight_decay)
    tensors = to_hf(checkpoint, checkpoint.params)
    paths = [checkpoint.tokenizer_dir / name for name in TOKENIZER_FILES]
    tokenizer = {file.name: read_json(file) for file in paths if file.exists()}
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = composer.checkpoint_of(checkpoint.config, tensors, tokenizer, optimizers)
    torch_file.write(path, parts)


@contextlib.contextmanager
def new(path: Path, overwrite: bool, is_file: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it replaces `path` when the block succeeds.

    Raises ValueError if something exists at `path`, unless `overwrite`; a folder that is not a
    checkpoint is never replaced.
    """
    path = path.resolve()
    if path.is_dir() if is_file else path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a {'file' if is_file else 'folder'} to create")
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
