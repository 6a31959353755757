"""The files of sentence-transformers that turn an encoder into an embedding model.

`read_sentence` reads modules.json and what it names into a `SentenceModel`, `write_sentence` writes
it, and `SentenceModel.apply` computes it. A module that is not supported is refused by name: left
out, it would give plausible, wrong vectors. Source of the layout: sentence-transformers 2 to 6.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from modernbert_jax.checkpoint.files import write_bytes, write_text
from modernbert_jax.checkpoint.hf import WEIGHTS_FILE, SafetensorsFolder
from modernbert_jax.heads import POOLINGS, pool
from modernbert_jax.precision import einsum
from modernbert_jax.untrusted import MAX_MODEL_JSON, read_json, read_json_list, shown

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
ENCODER_FILE = "sentence_bert_config.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# The classes that files name, the class here that loads each, and its similarities.
COLBERT = "ColBERT"
_CLASSES = {
    "SentenceTransformer": ("Embedder", SIMILARITIES),
    "CrossEncoder": ("Reranker", SIMILARITIES),
    # PyLate computes MaxSim whatever its files say, and some of them say cosine.
    COLBERT: ("MultiVectorEmbedder", ("MaxSim", "maxsim", "cosine")),
}
# Far beyond any model, and far below what exhausts a machine that only reads the files.
_MOST_MODULES, _MOST_FEATURES = 100, 2**20
# What a module reads and writes.
TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
# torch's classes of activations, as module files name them by their last part.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "Sigmoid": jax.nn.sigmoid,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "LeakyReLU": jax.nn.leaky_relu,
    "ELU": jax.nn.elu,
    "SELU": jax.nn.selu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Mish": jax.nn.mish,
    "Softplus": jax.nn.softplus,
    "Hardtanh": jax.nn.hard_tanh,
}
# The settings of the Transformer module that mean what SentenceModel computes.
ENCODER = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": TOKENS,
}
# The flags of releases before 6, in the order in which those concatenate.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Pools each text once per mode and concatenates. include_prompt: whether a prompt counts."""

    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True

    @property
    def name(self) -> str:
        return "+".join(self.modes) + ("" if self.include_prompt else ".noprompt")


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Scales vectors to length 1."""

    reads: str = SENTENCE
    writes: str = SENTENCE

    name = "unit"


@dataclasses.dataclass(frozen=True)
class Dense:
    """activation(x W + b), plus x or its projection if the weights have a residual part."""

    weights: Mapping[str, np.ndarray]  # weight [out, in], bias [out], residual [out, in]
    activation: str = "Tanh"
    residual: bool = False
    reads: str = SENTENCE
    writes: str = SENTENCE

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.weights["weight"].shape[::-1]))
        return f"dense{size}.{self.activation}.{'.'.join(sorted(self.weights))}"


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """torch's LayerNorm of the vectors."""

    weights: Mapping[str, np.ndarray]  # weight [D], bias [D]

    name = "layernorm"


Module = Pooling | Normalize | Dense | LayerNorm


@dataclasses.dataclass(frozen=True)
class SentenceModel:
    """What turns the tokens' hidden states into the vector of a text, and how texts are read.

    The default is that of a folder without modules.json: the mean over the tokens, of length 1.
    modules: applied in order. max_length: in tokens, None if no file states one. prompts: by name.
    default_prompt_name: the prompt of a call that names none. similarity: one of SIMILARITIES.
    truncate_dim: how many numbers of a vector are kept, None for all; `Embedder` cuts it. encoder:
    the folder of the encoder within the model's.
    """

    modules: tuple[Module, ...] = (Pooling(), Normalize())
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"query": "", "document": ""}
    )
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    truncate_dim: int | None = None
    encoder: str = ""

    @property
    def pooling(self) -> Pooling:
        """The last pooling, which makes the vector."""
        return next(m for m in reversed(self.modules) if isinstance(m, Pooling))

    @property
    def normalizes(self) -> bool:
        """Whether the last module scales the vector to length 1."""
        return self.modules[-1] == Normalize()

    @property
    def name(self) -> str:
        """Identifies the computation in the name of an exported function."""
        return "-".join(module.name for module in self.modules)

    def chosen(self, pooling: str | Sequence[str] | None, normalize: bool | None) -> SentenceModel:
        """Returns a copy with another pooling, or with or without a last Normalize; None keeps.

        Raises ValueError for an unknown pooling.
        """
        modules = list(self.modules)
        if pooling is not None:
            modes = _modes("pooling", pooling)
            at = max(n for n, m in enumerate(modules) if isinstance(m, Pooling))
            modules[at] = Pooling(modes, self.pooling.include_prompt)
        if normalize is not None and normalize != self.normalizes:
            modules = [*modules, Normalize()] if normalize else modules[:-1]
        return dataclasses.replace(self, modules=tuple(modules))

    def dimension(self, hidden_size: int, of: str = SENTENCE) -> int:
        """Returns the embedding dimension. Raises ValueError if a module does not fit the others.

        hidden_size: of the encoder. of: SENTENCE, the vectors of texts, or TOKENS, those of tokens.
        """
        sizes = {TOKENS: hidden_size}
        for number, module in enumerate(self.modules, start=1):
            where = f"{MODULES_FILE}: module {number} ({type(module).__name__})"
            if isinstance(module, Pooling):
                sizes[SENTENCE] = sizes[TOKENS] * len(module.modes)
                continue
            reads = SENTENCE if isinstance(module, LayerNorm) else module.reads
            if reads not in sizes:
                raise ValueError(f"{where}: expected a Pooling before it, found none")
            size = sizes[reads]
            if isinstance(module, Normalize):
                sizes[module.writes] = size
                continue
            wanted = module.weights["weight"].shape[-1]
            if wanted != size:
                raise ValueError(f"{where}: expected {size} features, as come in, got {wanted}")
            if isinstance(module, Dense):
                sizes[module.writes] = module.weights["weight"].shape[0]
        return sizes[of]

    def params(self) -> dict[str, np.ndarray]:
        """Returns the weights of all modules, {"NUMBER.KEY": array}, for `apply`."""
        return {
            f"{number}.{key}": array
            for number, module in enumerate(self.modules)
            if isinstance(module, Dense | LayerNorm)
            for key, array in module.weights.items()
        }

    def apply(
        self,
        params: Mapping[str, jax.Array],
        hidden_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        segments: int,
        skip: int = 0,
    ) -> dict[str, jax.Array]:
        """Returns {"token_embeddings": [B, L, D], "sentence_embedding": [B, S, E]}, float32.

        Without a Pooling it returns the first of them only.
        params: of `params`. segments: S, the most texts in a packed sequence. skip: the number of
        tokens of a prompt that pooling leaves out.
        """
        found = {TOKENS: hidden_BLD.astype(jnp.float32)}
        for number, module in enumerate(self.modules):
            if isinstance(module, Pooling):
                vectors = [
                    pool(found[TOKENS], segment_ids_BL, segments, mode, skip=skip)
                    for mode in module.modes
                ]
                found[SENTENCE] = jnp.concatenate(vectors, axis=-1)
            elif isinstance(module, Normalize):
                found[module.writes] = unit(found[module.reads])
            elif isinstance(module, LayerNorm):
                found[SENTENCE] = _layer_norm(found[SENTENCE], _weights(params, number))
            else:
                x = found[module.reads]
                weights = _weights(params, number)
                y = einsum("...D,ED->...E", x, weights["weight"])
                y = y + weights["bias"] if "bias" in weights else y
                y = ACTIVATIONS[module.activation](y)
                if module.residual:
                    own = "residual" in weights
                    y = y + (einsum("...D,ED->...E", x, weights["residual"]) if own else x)
                found[module.writes] = y
        return found


def unit(vectors: jax.Array) -> jax.Array:
    """Scales vectors [..., D] to length 1; zeros stay zeros."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def unit_array(vectors: Any) -> np.ndarray:
    """Returns `unit` of vectors [N, D], or of one, as NumPy's float32 [N, D]."""
    return np.asarray(unit(jnp.atleast_2d(np.asarray(vectors, np.float32))))


def _weights(params: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
    """The float32 weights of a module; vectors as [1, 1, D], the rank of what they are added to."""
    found = {}
    for key, array in params.items():
        if key.startswith(f"{number}."):
            array = jnp.asarray(array, jnp.float32)
            found[key.partition(".")[2]] = array[None, None] if array.ndim == 1 else array
    return found


def _layer_norm(x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * weights["weight"] + weights["bias"]


# Reading.


def read_sentence(folder: pathlib.Path) -> SentenceModel:
    """Reads the files of sentence-transformers in a model's folder.

    Returns the default, the mean of length 1, if there is no modules.json. Raises ValueError, which
    names the file, for a module, an option or a value that is not supported, and for damaged files.
    """
    path = folder / MODULES_FILE
    if not path.exists():
        return SentenceModel()
    settings = read_settings(folder / SETTINGS_FILE, "SentenceTransformer")
    (kind, inner), *entries = read_modules(folder)
    modules = tuple(_READERS[kind](folder / inner) for kind, inner in entries if kind != "Dropout")
    if not any(isinstance(module, Pooling) for module in modules):
        raise ValueError(f"{path}: expected a Pooling, found none")
    if settings.pop("activation_fn"):
        raise ValueError(f"{folder / SETTINGS_FILE}: activation_fn is not supported")
    return SentenceModel(
        modules, encoder=inner, **settings, **read_encoder(folder / inner, ENCODER)
    )


def read_modules(
    folder: pathlib.Path, packages: Sequence[str] = ("sentence_transformers",)
) -> list[tuple[str, str]]:
    """Returns the (kind, folder) of each module in modules.json, the first a Transformer.

    packages: whose modules the caller supports. Raises ValueError for a module that is not
    supported and for a damaged file.
    """
    path = folder / MODULES_FILE
    listed = read_json_list(path, MAX_MODEL_JSON)
    if len(listed) > _MOST_MODULES:
        raise ValueError(f"{path}: expected at most {_MOST_MODULES} modules, got {len(listed):,}")
    entries = [_entry(path, entry, packages) for entry in listed]
    if not entries:
        raise ValueError(f"{path}: expected one Transformer, the first module, got none")
    for number, (kind, _) in enumerate(entries, start=1):
        if (number == 1) != (kind == "Transformer"):
            raise ValueError(
                f"{path}: expected one Transformer, the first module, got {kind} as module {number}"
            )
    return entries


def _entry(path: pathlib.Path, entry: Any, packages: Sequence[str]) -> tuple[str, str]:
    """Returns the kind and the folder of an entry of modules.json."""
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("type", "path")
    ):
        raise ValueError(f"{path}: expected objects with a type and a path, got {shown(entry)}")
    parts = entry["type"].split(".")
    kind = parts[-1]
    if parts[0] not in packages or kind not in {"Transformer", "Dropout", *_READERS}:
        if parts[0] == "pylate":
            raise ValueError(
                f"{path}: {shown(entry['type'])} makes a multi-vector model, which "
                "MultiVectorEmbedder loads"
            )
        raise ValueError(
            f"{path}: {shown(entry['type'])} is not supported; supported are Transformer, "
            f"{', '.join(_READERS)} and Dropout of sentence_transformers"
        )
    if entry.get("kwargs"):
        raise ValueError(f"{path}: {kind}: kwargs are not supported")
    inner = entry["path"]
    nested = inner in (".", "..") or inner != os.path.basename(inner) or "\\" in inner
    if inner and (nested or not inner.isprintable() or len(inner) > 255):
        raise ValueError(f"{path}: expected folders within the model's, got {shown(inner)}")
    # The hub's cache links files, never folders.
    if inner and os.path.islink(path.parent / inner):
        raise ValueError(f"{path}: {shown(inner)}: expected a folder, found a symbolic link")
    return kind, inner


def read_encoder(folder: pathlib.Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"max_length", "lower_case"} of the settings of the Transformer module.

    known: the other settings that the caller supports. Raises ValueError for any other.
    """
    # The name of the architecture was part of it before release 1.
    names = sorted(folder.glob("sentence_*_config.json"))
    path = next(iter(names), folder / ENCODER_FILE)
    data = read_json(path, MAX_MODEL_JSON) if path.exists() else {}
    length, lower = data.pop("max_seq_length", None), data.pop("do_lower_case", False)
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(
            f"{path}: max_seq_length: expected a number from 1 on, got {shown(length)}"
        )
    if not isinstance(lower, bool):
        raise ValueError(f"{path}: do_lower_case: expected true or false, got {shown(lower)}")
    for key, value in data.items():
        if key in ("max_seq_length", "do_lower_case", "unpad_inputs"):  # the last changes the speed
            continue
        if value and value != known.get(key):
            raise ValueError(f"{path}: {shown(key)}: {shown(value)} is not supported")
    return {"max_length": length, "lower_case": lower}


def read_settings(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """Returns {"prompts", "default_prompt_name", "similarity", ...} of a model.

    The others are "activation_fn" and, for a SentenceTransformer, "truncate_dim". kind: its class
    in sentence-transformers. Raises ValueError for another class and for values
    that are not supported.
    """
    data = read_json(path, MAX_MODEL_JSON) if path.exists() else {}
    named = data.get("model_type") or kind
    if named != kind:
        known = isinstance(named, str) and named in _CLASSES
        hint = f", which {_CLASSES[named][0]} loads" if known else ""
        raise ValueError(f"{path}: model_type: expected {kind}, got {shown(named)}{hint}")
    prompts = data.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        raise ValueError(f"{path}: prompts: expected texts by name, got {shown(prompts)}")
    prompts = {k: v or "" for k, v in prompts.items()}
    if kind != "CrossEncoder":
        prompts = {"query": "", "document": ""} | prompts
    default = data.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(
            f"{path}: default_prompt_name: expected one of {', '.join(prompts)}, got "
            f"{shown(default)}"
        )
    similarities = _CLASSES[kind][1]
    similarity = data.get("similarity_fn_name") or similarities[0]
    if similarity not in similarities:
        raise ValueError(
            f"{path}: similarity_fn_name: expected {', '.join(similarities)}, got "
            f"{shown(similarity)}"
        )
    found = {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": similarity,
        "activation_fn": data.get("activation_fn"),
    }
    if kind == "SentenceTransformer":
        dim = data.get("truncate_dim")
        if dim is not None and (type(dim) is not int or dim < 1):
            raise ValueError(f"{path}: truncate_dim: expected a number from 1 on, got {shown(dim)}")
        found["truncate_dim"] = dim
    return found


def resolve_prompt(
    prompts: Mapping[str, str], default: str | None, prompt: str | None, name: str | None
) -> str:
    """Returns the prompt of a call: the given one, the named one, or the default one.

    Raises ValueError for an unknown name, and if a call has both.
    """
    if prompt is not None and name is not None:
        raise ValueError("prompt, prompt_name: expected one of them, got both")
    if prompt is not None:
        return prompt
    name = default if name is None else name
    if name is not None and name not in prompts:
        known = ", ".join(prompts) or "none, as the model has no prompts"
        raise ValueError(f"prompt_name: expected {known}, got {shown(name)}")
    return "" if name is None else prompts[name]


def _read_pooling(folder: pathlib.Path) -> Pooling:
    path = folder / "config.json"
    data = read_json(path, MAX_MODEL_JSON)
    for key in data:
        if key.startswith("pooling_mode_") and key not in _FLAGS:
            raise ValueError(f"{path}: {shown(key)} is not supported")
    modes = data.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if data.get(flag)] or "mean"
    include = data.get("include_prompt", True)
    if not isinstance(include, bool):
        raise ValueError(f"{path}: include_prompt: expected true or false, got {shown(include)}")
    return Pooling(_modes(f"{path}: pooling_mode", modes), include)


def _modes(name: str, modes: Any) -> tuple[str, ...]:
    listed = [modes] if isinstance(modes, str) else modes
    known = isinstance(listed, list | tuple) and listed and all(m in POOLINGS for m in listed)
    if not known or len(set(listed)) < len(listed):
        raise ValueError(
            f"{name}: expected {', '.join(POOLINGS)}, or several, each once, got {shown(modes)}"
        )
    return tuple(listed)


def _read_normalize(folder: pathlib.Path) -> Normalize:
    path = folder / "config.json"
    data = read_json(path, MAX_MODEL_JSON) if path.exists() else {}
    return Normalize(*_names(path, data))


def _names(path: pathlib.Path, data: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what a module reads and writes."""
    reads = data.get("module_input_name") or SENTENCE
    writes = data.get("module_output_name") or reads
    for key, name in (("module_input_name", reads), ("module_output_name", writes)):
        if name not in (TOKENS, SENTENCE):
            raise ValueError(f"{path}: {key}: expected {TOKENS} or {SENTENCE}, got {shown(name)}")
    if reads == TOKENS and writes == SENTENCE:
        raise ValueError(f"{path}: expected a Pooling from {TOKENS} to {SENTENCE}")
    return reads, writes


def _size(path: pathlib.Path, data: Mapping[str, Any], key: str) -> int:
    size = data.get(key)
    if type(size) is not int or not 1 <= size <= _MOST_FEATURES:
        raise ValueError(
            f"{path}: {key}: expected a number from 1 to {_MOST_FEATURES:,}, got {shown(size)}"
        )
    return size


def activation_name(where: str, path: Any) -> str:
    """Returns the class of a torch activation that a file names, a key of ACTIVATIONS.

    Raises ValueError for any other.
    """
    parts = path.split(".") if isinstance(path, str) else [""]
    if parts[0] != "torch" or parts[-1] not in ACTIVATIONS:
        raise ValueError(
            f"{where}: {shown(path)} is not supported; supported are torch's "
            f"{', '.join(ACTIVATIONS)}"
        )
    return parts[-1]


def read_dense(folder: pathlib.Path) -> Dense:
    """Reads a Dense module. Raises ValueError for what is not supported, and for damaged files."""
    path = folder / "config.json"
    data = read_json(path, MAX_MODEL_JSON)
    read, wrote = (_size(path, data, key) for key in ("in_features", "out_features"))
    activation = activation_name(
        f"{path}: activation_function", data.get("activation_function", "torch.nn.Tanh")
    )
    residual = data.get("use_residual") or False
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (wrote, read)}
    if data.get("bias", True):
        expected["linear.bias"] = (wrote,)
    if residual and read != wrote:
        expected["residual.weight"] = (wrote, read)
    names = {"linear.weight": "weight", "linear.bias": "bias", "residual.weight": "residual"}
    weights = _tensors(folder, expected)
    weights = {names[key]: array for key, array in weights.items()}
    return Dense(weights, activation, bool(residual), *_names(path, data))


def _read_layer_norm(folder: pathlib.Path) -> LayerNorm:
    path = folder / "config.json"
    size = _size(path, read_json(path, MAX_MODEL_JSON), "dimension")
    weights = _tensors(folder, {"norm.weight": (size,), "norm.bias": (size,)})
    return LayerNorm({key.partition(".")[2]: array for key, array in weights.items()})


def _tensors(
    folder: pathlib.Path, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Reads the weights of a module; checks names and shapes."""
    if not (folder / WEIGHTS_FILE).exists() and (folder / "pytorch_model.bin").exists():
        raise ValueError(
            f"{folder}: expected {WEIGHTS_FILE}, found pytorch_model.bin, a pickle, which could "
            "run code; load the model with sentence-transformers and save it again"
        )
    tensors = SafetensorsFolder(folder)
    shapes = {key: tensors.shape(key) for key in tensors}
    if shapes != expected:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: expected {_listed(expected)}, got {_listed(shapes)}"
        )
    return {key: np.asarray(tensors[key], np.float32) for key in tensors}


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items())[:5])


_READERS: dict[str, Callable[[pathlib.Path], Module]] = {
    "Pooling": _read_pooling,
    "Dense": read_dense,
    "Normalize": _read_normalize,
    "LayerNorm": _read_layer_norm,
}


# Writing.


def write_sentence(
    folder: str | os.PathLike[str], model: SentenceModel, hidden_size: int, max_length: int | None
) -> None:
    """Writes the files that `read_sentence` and every release of sentence-transformers read.

    folder: holds the encoder. hidden_size: of the encoder. max_length: in tokens.
    """
    root = pathlib.Path(folder)
    entries = [("", "Transformer")]
    width = hidden_size
    for number, module in enumerate(model.modules, start=1):
        kind = type(module).__name__
        inner = f"{number}_{kind}"
        entries.append((inner, kind))
        (root / inner).mkdir(parents=True, exist_ok=True)
        if isinstance(module, Pooling):
            config = _pooling_config(module, width)
        elif isinstance(module, Normalize):
            config = {"module_input_name": module.reads, "module_output_name": module.writes}
        elif isinstance(module, LayerNorm):
            config = {"dimension": len(module.weights["weight"])}
            _write_tensors(root / inner, {f"norm.{k}": v for k, v in module.weights.items()})
        else:
            write_dense(root / inner, module)
            width = len(module.weights["weight"]) if module.writes == TOKENS else width
            continue
        write_json(root / inner / "config.json", config)
    write_json(
        root / ENCODER_FILE, {"max_seq_length": max_length, "do_lower_case": model.lower_case}
    )
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": model.similarity,
    }
    if model.truncate_dim is not None:
        settings["truncate_dim"] = model.truncate_dim
    write_json(root / SETTINGS_FILE, settings)
    # The names of releases before 6, which the later ones read too.
    write_modules(root, [(path, f"sentence_transformers.models.{kind}") for path, kind in entries])


def write_modules(root: pathlib.Path, entries: Sequence[tuple[str, str]]) -> None:
    """Writes modules.json. entries: the folder and the type of each module."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(entries)
    ]
    write_json(root / MODULES_FILE, modules)


def write_dense(folder: pathlib.Path, module: Dense) -> None:
    """Writes the settings and the weights of a Dense module into its own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"weight": "linear.weight", "bias": "linear.bias"}
    tensors = {names.get(k, "residual.weight"): v for k, v in module.weights.items()}
    _write_tensors(folder, tensors)
    write_json(folder / "config.json", _dense_config(module))


def _pooling_config(module: Pooling, width: int) -> dict[str, Any]:
    config: dict[str, Any] = {"word_embedding_dimension": width}
    if module.modes == tuple(mode for mode in _FLAGS.values() if mode in module.modes):
        config |= {flag: mode in module.modes for flag, mode in _FLAGS.items()}
    else:  # an order that only release 6 has
        config["pooling_mode"] = list(module.modes)
    return config | {"include_prompt": module.include_prompt}


def _dense_config(module: Dense) -> dict[str, Any]:
    wrote, read = module.weights["weight"].shape
    config: dict[str, Any] = {
        "in_features": read,
        "out_features": wrote,
        "bias": "bias" in module.weights,
        "activation_function": f"torch.nn.{module.activation}",
    }
    if (module.reads, module.writes) != (SENTENCE, SENTENCE):
        config |= {"module_input_name": module.reads, "module_output_name": module.writes}
    return config | ({"use_residual": True} if module.residual else {})


def _write_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    write_bytes(folder / WEIGHTS_FILE, content)


def write_json(path: pathlib.Path, data: Any) -> None:
    """Writes a file of settings."""
    write_text(path, json.dumps(data, indent=2) + "\n")
