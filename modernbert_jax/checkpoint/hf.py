"""Hugging Face folders: config.json, safetensors (one file or shards), tokenizer and model card.

Nothing that is read is executed: there is no pickle here.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from modernbert_jax.card import CARD_FILE, MARK, model_card
from modernbert_jax.checkpoint.files import CONFIG_FILE, copy_tokenizer, write_text
from modernbert_jax.checkpoint.params import check_dtypes, check_keys, check_sizes, param_shapes
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.untrusted import (
    MAX_HEADER,
    MAX_MODEL_JSON,
    panics_as_errors,
    parse_json,
    printable,
    read_json,
    refuse_pointer,
    shown,
)
from modernbert_jax.weights import DECODER, EMBEDDING, from_hf, to_hf

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def hf_to_params(
    cls: type, config: ModernBertConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Converts Hugging Face tensors to the parameters {path: array} of `cls`; keeps dtypes.

    Drops a decoder.weight that repeats the tied embedding. Raises ValueError for unknown keys,
    missing keys, wrong shapes, and dtypes other than float32, bfloat16 and float16.
    """
    check_dtypes(tensors)
    check_sizes(config, tensors)
    shapes = {k: tuple(v.shape) for k, v in param_shapes(cls, config).items()}
    check_keys("weights", set(tensors) - tied_copy(config, tensors), shapes)
    return {key: from_hf(key, tensors[key], shape) for key, shape in shapes.items()}


def params_to_hf(
    cls: type, config: ModernBertConfig, params: Mapping[str, Any], *, in_place: bool = False
) -> dict[str, np.ndarray]:
    """Converts the parameters {path: array} of `cls` to Hugging Face tensors; keeps dtypes.

    in_place: reuse the memory of `params` (writable NumPy arrays) for the result, so that no second
    copy of all weights exists. Raises ValueError as `hf_to_params` does.
    """
    shapes = param_shapes(cls, config)
    check_keys("parameters", params, shapes)
    check_dtypes(params)
    for key, array in params.items():
        if tuple(array.shape) != tuple(shapes[key].shape):
            raise ValueError(
                f"{key}: expected shape {tuple(shapes[key].shape)}, got {tuple(array.shape)}"
            )
    tensors = {}
    for key, array in params.items():
        tensors[key] = to_hf(key, array)
        if in_place:
            memory = array.reshape(tensors[key].shape)
            memory[...] = tensors[key]
            tensors[key] = memory
    return tensors


def tied_copy(config: ModernBertConfig, tensors: Mapping[str, np.ndarray]) -> set[str]:
    """Returns {"decoder.weight"} if the file repeats the tied embedding, else an empty set.

    Raises ValueError if the decoder should be tied and its values differ from the embedding's.
    """
    if not config.tie_word_embeddings or not {DECODER, EMBEDDING} <= set(tensors):
        return set()
    if not np.array_equal(tensors[DECODER], tensors[EMBEDDING], equal_nan=False):
        raise ValueError(
            "decoder.weight: expected the same values as the embedding (tie_word_embeddings is "
            "true), got different ones; set tie_word_embeddings to false in config.json to keep "
            "both"
        )
    return {DECODER}


# Reading.


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The tensors of model.safetensors or of its shards, as a mapping that reads them one by one.

    dtypes: {key: name of the dtype}. tied: the index may name a decoder.weight that no shard holds,
    because it is the embedding. file: the name of the one file. Raises FileNotFoundError if there
    are no weights, ValueError for a truncated file, a header too large for ModernBERT, an index
    that points outside the folder, and keys that the index and the shards do not agree on.
    """

    def __init__(
        self, folder: str | os.PathLike[str], tied: bool = False, *, file: str = WEIGHTS_FILE
    ):
        folder = pathlib.Path(folder)
        if (folder / file).exists():
            files, index = [file], None
        elif (folder / INDEX_FILE).exists():
            index = read_index(folder / INDEX_FILE)
            files = sorted(set(index.values()))
        else:
            raise FileNotFoundError(
                f"{folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; "
                "`python -m convert from-hf` reads pytorch_model.bin"
            )
        self._path_of: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._offsets: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        for name in files:
            try:
                start, header = _header(folder / name)
                with panics_as_errors(), safetensors.safe_open(folder / name, "np"):
                    pass  # it checks shapes and offsets against the file
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{folder / name}: listed in the index, not found"
                ) from None
            except Exception as error:  # safetensors raises its own type for a damaged file
                refuse_pointer(folder / name)
                message = f"not a complete safetensors file: {printable(error)}"
                raise ValueError(f"{folder / name}: {message}") from None
            for key, entry in header.items():
                if index is not None and index.get(key) != name:
                    raise ValueError(
                        f"{folder / name}: {key}: the index expects it in {index.get(key)}, "
                        f"found in {name}"
                    )
                if key in self._path_of:
                    raise ValueError(f"{folder / name}: {key} is set twice")
                self._path_of[key] = folder / name
                self._shapes[key] = tuple(entry["shape"])
                self._offsets[key] = start + entry["data_offsets"][0]
                self.dtypes[key] = _dtype(entry["dtype"])
        absent = {DECODER} if tied and EMBEDDING in self._path_of else set()
        if missing := sorted(set(index or ()) - set(self._path_of) - absent):
            raise ValueError(f"{folder / INDEX_FILE}: no shard has {', '.join(missing[:5])}")

    def __getitem__(self, key: str) -> np.ndarray:
        shape, dtype = self._shapes[key], np.dtype(self.dtypes[key])
        path, offset = self._path_of[key], self._offsets[key]
        array = np.fromfile(path, dtype, math.prod(shape), offset=offset)
        return array.reshape(shape)  # also refuses a file that was cut since it was opened

    def __contains__(self, key: object) -> bool:
        return key in self._path_of  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._path_of)

    def __len__(self) -> int:
        return len(self._path_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading the tensor."""
        return self._shapes[key]


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Returns where the tensors of a safetensors file start, and {key: its entry}."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"expected a header of at most {MAX_HEADER:,} bytes, got {size:,}")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"expected a header with tensors, got {shown(header)}")
    header.pop("__metadata__", None)
    if bad := next((key for key in header if key != printable(key)), None):
        raise ValueError(f"expected short names of printable characters, got {shown(bad)}")
    return 8 + size, header


def _dtype(name: str) -> str:
    """NumPy's name of a dtype in safetensors: float8_e4m3 for F8_E4M3."""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex"}
    return re.sub(r"^(BF|F|I|U|C)(?=\d)", lambda match: kinds[match[1]], name).lower()


def read_index(path: pathlib.Path) -> dict[str, str]:
    """Reads {key: file name} from an index. Raises ValueError for names outside the folder."""
    weight_map = read_json(path, MAX_MODEL_JSON).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected JSON with a weight_map, got {shown(weight_map)}")
    names = {str(k): str(v) for k, v in weight_map.items()}
    for name in set(names.values()):
        plain = name == os.path.basename(name) == printable(name)
        if not plain or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{path}: expected plain file names, got {shown(name)}")
    if bad := next((key for key in names if key != printable(key)), None):
        raise ValueError(f"{path}: expected short, printable names of tensors, got {shown(bad)}")
    return names


# Writing.


def write_hf(
    folder: str | os.PathLike[str],
    config: ModernBertConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = 5 * 1024**3,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder: config.json, weights, tokenizer files and README.md.

    architecture: the model's class, such as "ModernBertForMaskedLM". max_shard_size: in bytes;
    larger models are written as shards with an index. card: facts for the README.md, see
    `card.model_card`. Each file is written atomically, config.json last, and weight files of an
    earlier save are removed.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    folder = pathlib.Path(folder)
    data = {"architectures": [architecture]} | config.to_dict()
    text = model_card(data, sum(t.size for t in tensors.values()), card)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in split.filename_to_tensors:
            old.unlink(missing_ok=True)
    for name, keys in split.filename_to_tensors.items():
        write_safetensors(folder / name, {key: tensors[key] for key in keys})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(tokenizer_dir, folder)
    _put_card(folder / CARD_FILE, text)
    write_text(folder / CONFIG_FILE, json.dumps(data, indent=2) + "\n")


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)  # safetensors makes files that only their owner can read
    temporary.replace(path)


def write_card(folder: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Rewrites the README.md of a Hugging Face folder, of any encoder, with these facts.

    Raises FileNotFoundError if the folder holds no model, ValueError as `card.model_card` does.
    """
    folder = pathlib.Path(folder)
    data = read_json(folder / CONFIG_FILE, MAX_MODEL_JSON)
    tensors = SafetensorsFolder(folder)
    parameters = sum(math.prod(tensors.shape(key)) for key in tensors)
    _put_card(folder / CARD_FILE, model_card(data, parameters, card))


def _put_card(path: pathlib.Path, text: str) -> None:
    """Writes the card unless a person has written or edited the one that exists."""
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)
