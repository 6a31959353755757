"""LoRA adapters: low-rank additions to linear layers, trained while the model's weights rest.

A layer with an adapter computes x W + b + (alpha / rank) (x A) B. Adapters are read and written as
PEFT's folders, so that peft and this library exchange them. Training them alone needs one filter:

    lora.add_lora(model, rank=8, alpha=16)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=lora.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, lora.LoRAParam))(model)

Source: arXiv 2106.09685; the layout of PEFT's adapter_config.json and adapter_model.safetensors.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from modernbert_jax.checkpoint.files import ADAPTER_FILE, write_text
from modernbert_jax.checkpoint.hf import SafetensorsFolder, write_safetensors
from modernbert_jax.checkpoint.params import check_dtypes, variables
from modernbert_jax.layers import Factor, Linear
from modernbert_jax.untrusted import MAX_MODEL_JSON, read_json, shown
from modernbert_jax.weights import (
    find_weight,
    from_hf,
    hf_shape,
    is_adapter,
    to_hf,
    weight_of,
)

__all__ = ["LoRAParam", "add_lora", "load_adapter", "merge", "save_adapter", "unmerge"]

WEIGHTS_FILE = "adapter_model.safetensors"
LoRAParam = nnx.LoRAParam  # the nnx filter of the factors of adapters

_PREFIX = "base_model.model."  # of each key in PEFT's file
_MAX_RANK = 2**16

# The settings of PEFT that change no result of an adapter that is read: descriptions, settings of
# training and initialization, and those that the keys of the weights repeat.
_NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
    "ensure_weight_tying", "corda_config",
})  # fmt: skip
_READ = frozenset({"r", "lora_alpha", "use_rslora", "modules_to_save"})


class _MergedFactor(nnx.Variable):
    """A factor that is merged into the weight: no parameter, until it is taken out again."""


def add_lora(
    model: nnx.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = ("Wqkv", "Wo", "Wi"),
    *,
    rngs: nnx.Rngs | None = None,
) -> None:
    """Adds adapters to the linear layers of a model, in place; its outputs do not change yet.

    rank: R, the inner size of the adapters. alpha: their products are multiplied by alpha / rank.
    targets: names of linear layers, or ends of their paths: "Wo" is attn.Wo and mlp.Wo, "mlp.Wo" is
    only the second; "dense" and "classifier" are those of the heads. rngs (stream: params): draws
    the first factor as PEFT does, uniformly up to the inputs ** -0.5; by default from seed 0. The
    second one is zero. Both are float32, whatever the dtype of the weights is.
    Raises ValueError for an invalid rank or alpha, a target that names no linear layer, and a model
    that has adapters already.
    """
    check_lora(rank, alpha, targets)
    layers = dict(linear_layers(model))
    _refuse_adapters(layers)
    for target in targets:
        if not any(_ends(path, target) for path in layers):
            names = dict.fromkeys(path.rpartition(".")[2] for path in layers)
            raise ValueError(f"targets: expected some of {', '.join(names)}, got {shown(target)}")
    rngs = rngs or nnx.Rngs(0)
    for path, layer in layers.items():
        if any(_ends(path, target) for target in targets):
            a, b = _factor_shapes(layer, path, rank)
            bound = math.prod(a[:-1]) ** -0.5
            first = jax.random.uniform(rngs.params(), a, jnp.float32, -bound, bound)
            _attach(layer, first, jnp.zeros(b, jnp.float32), alpha / rank)


def check_lora(rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Raises ValueError for a rank, an alpha or targets that no model takes."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"rank: expected 1 to {_MAX_RANK:,}, got {shown(rank)}")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a positive number, got {shown(alpha)}")
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets: expected names such as ('Wqkv', 'Wo'), got {shown(targets)}")


def attach(model: nnx.Module, factors: Mapping[str, Any], scale: float) -> None:
    """Sets the factors of adapters, in place; works under jit.

    factors: {path: array}, such as "model.layers.0.attn.Wo.lora_A.weight", two for each layer, as
    `variables(model, LoRAParam)` has them. scale: alpha / rank.
    """
    layers = dict(linear_layers(model))
    for stem in dict.fromkeys(path.rpartition(".lora_")[0] for path in factors):
        a, b = (jnp.asarray(factors[f"{stem}.lora_{x}.weight"], jnp.float32) for x in "AB")
        _attach(layers[stem], a, b, scale)


def merge(model: nnx.Module) -> None:
    """Adds the adapters to the weights, in place: then the model costs what it did without them.

    The adapters stay in the model, inactive and no parameters, so that `unmerge` can take them out
    again and `save_adapter` can write them. Raises ValueError if none is active, and for int8
    weights, which cannot hold the sum.
    """
    layers = _adapted(model, active=True)
    if any(layer.weight.dtype == jnp.int8 for layer in layers):
        raise ValueError(
            "merge: expected float weights, got int8; the adapters work unmerged, or merge them "
            "into the float model and quantize that"
        )
    for layer in layers:
        layer.weight.set_value(layer.full_weight())
        _set_kind(layer, _MergedFactor)


def unmerge(model: nnx.Module) -> None:
    """Takes merged adapters out of the weights, in place, and makes them active again.

    Raises ValueError if none is merged, and for weights in another dtype than float32, whose
    rounding cannot be undone.
    """
    layers = _adapted(model, active=False)
    for layer in layers:
        if layer.weight.dtype != jnp.float32:
            raise ValueError(
                f"unmerge: expected float32 weights, got {layer.weight.dtype}, in which merging "
                "rounds; load the model and the adapter again"
            )
    for layer in layers:
        layer.weight.set_value(layer.weight[...] - layer.adapter_weight())
        _set_kind(layer, LoRAParam)


def save_adapter(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Writes the adapters as a folder that peft and `load_adapter` read.

    base_model: the name or path of the model they belong to, for adapter_config.json.
    modules_to_save: modules of the model that are written in full beside the adapters, such as
    ("head", "classifier") of a classifier that was trained with them.
    Raises ValueError if the model has no adapters, and for an unknown or adapted module.
    """
    layers = dict(linear_layers(model))
    adapted = {path: layer for path, layer in layers.items() if layer.lora_A is not None}
    if not adapted:
        raise ValueError("save_adapter: expected a model with adapters, got none; see add_lora")
    ranks = {layer.lora_A.weight.shape[-1] for layer in adapted.values()}
    scales = {layer.lora_scale for layer in adapted.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise ValueError("save_adapter: expected adapters of one rank and alpha, got several")
    rank, scale = ranks.pop(), scales.pop()
    tensors = {}
    for path, layer in adapted.items():
        for name in ("lora_A", "lora_B"):
            key = f"{path}.{name}.weight"
            tensors[_PREFIX + key] = to_hf(key, getattr(layer, name).weight[...])
    params = variables(model)
    for module in modules_to_save:
        own = [k for k in params if _within(k, module) and not is_adapter(k)]
        if not own or any(_within(f"{path}.weight", module) for path in adapted):
            raise ValueError(
                "modules_to_save: expected modules of the model without adapters, such as "
                f"'classifier', got {shown(module)}"
            )
        tensors |= {_PREFIX + key: to_hf(key, params[key][...]) for key in own}
    names = sorted({path.rpartition(".")[2] for path in adapted})
    if {path for path in layers if any(_ends(path, name) for name in names)} != set(adapted):
        names = sorted(adapted)
    alpha = scale * rank
    content = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": names,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_FILE).unlink(missing_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_text(folder / ADAPTER_FILE, json.dumps(content, indent=2) + "\n")


def load_adapter(model: nnx.Module, folder: str | os.PathLike[str]) -> None:
    """Reads a PEFT folder of LoRA adapters into a model, in place; they are active then.

    The model must be of the class that the adapters were trained with, because its paths are their
    keys. Modules that the folder holds in full (modules_to_save) replace the model's. lora_dropout,
    which only peft's training applies, is ignored.
    Raises FileNotFoundError if a file is missing, and ValueError for other kinds of adapters, for
    settings that are not supported, for tensors that do not fit the model, and if the model has
    adapters already.
    """
    folder = pathlib.Path(folder)
    for name in (ADAPTER_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected {name} of a PEFT adapter, found none")
    rank, scale, full = _read_settings(folder / ADAPTER_FILE)
    tensors = SafetensorsFolder(folder, file=WEIGHTS_FILE)
    check_dtypes(tensors)
    layers, params = dict(linear_layers(model)), variables(model)
    _refuse_adapters(layers)
    values: dict[str, np.ndarray] = {}
    for key in tensors:
        path = key.removeprefix(_PREFIX)
        shape: tuple[int, ...] | None = None
        if is_adapter(path):
            stem, _, factor = path.removesuffix(".weight").rpartition(".lora_")
            if stem in layers:
                shape = _factor_shapes(layers[stem], stem, rank)["AB".index(factor)]
        elif path in params and any(_within(path, module) for module in full):
            shape = params[path].shape
        if shape is None or not key.startswith(_PREFIX):
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key}: expected an adapter of a linear layer of "
                f"{type(model).__name__}, or a parameter in modules_to_save; load the adapter into "
                "the class that it was trained with"
            )
        if tensors.shape(key) != (expected := hf_shape(path, shape)):
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key}: expected shape {expected}, got "
                f"{tensors.shape(key)}"
            )
        values[path] = from_hf(path, tensors[key], shape)
    factors = {path for path in values if is_adapter(path)}
    stems = {path.rpartition(".lora_")[0] for path in factors}
    missing = {f"{stem}.lora_{x}.weight" for stem in stems for x in "AB"} - factors
    missing |= {path for path in params if any(_within(path, m) for m in full)} - values.keys()
    if missing or not stems:
        what = ", ".join(sorted(missing)[:5]) or "lora_A and lora_B of a layer"
        raise ValueError(f"{folder / WEIGHTS_FILE}: expected {what}, found none")
    attach(model, {path: values[path] for path in factors}, scale)
    for path in values.keys() - factors:
        old = params[path][...]
        params[path][...] = jax.device_put(jnp.asarray(values[path], old.dtype), old.sharding)


def _read_settings(path: pathlib.Path) -> tuple[int, float, list[str]]:
    """Returns the rank, the scale and the names of the modules that are stored in full."""
    data = read_json(path, MAX_MODEL_JSON)
    if data.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected 'LORA', got {shown(data.get('peft_type'))}")
    for name, value in data.items():
        if name not in _NEUTRAL | _READ and value not in (None, False, {}, [], "none"):
            raise ValueError(
                f"{path}: {name}: not supported, got {shown(value)}; merge the adapter with peft "
                "(merge_and_unload, then save_pretrained) and load the result"
            )
    rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"{path}: r: expected 1 to {_MAX_RANK:,}, got {shown(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: lora_alpha: expected a number, got {shown(alpha)}")
    full = data.get("modules_to_save") or []
    if not isinstance(full, list) or not all(isinstance(name, str) for name in full):
        raise ValueError(f"{path}: modules_to_save: expected names, got {shown(full)}")
    return rank, alpha / (math.sqrt(rank) if data.get("use_rslora") else rank), full


def linear_layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Yields the path of each linear layer of ModernBERT and the layer."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and find_weight(f"{name}.weight"):
            yield name, module


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _within(path: str, module: str) -> bool:
    """Whether a parameter belongs to a module, which is named as a target is."""
    return f".{module}." in f".{path}"


def _refuse_adapters(layers: dict[str, Any]) -> None:
    if any(layer.lora_A is not None for layer in layers.values()):
        raise ValueError("model: expected one without adapters, got one that has some")


def _factor_shapes(layer: Any, path: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inputs, shape = weight_of(f"{path}.weight").inputs, layer.weight.shape
    return (*shape[:inputs], rank), (rank, *shape[inputs:])


def _attach(layer: Any, a: jax.Array, b: jax.Array, scale: float) -> None:
    sharding = getattr(layer.weight[...], "sharding", None)  # a traced weight has none
    if isinstance(sharding, NamedSharding):  # small, so each device of the weight's has a copy
        a, b = jax.device_put((a, b), NamedSharding(sharding.mesh, PartitionSpec()))
    layer.lora_A, layer.lora_B = Factor(LoRAParam(a)), Factor(LoRAParam(b))
    layer.lora_scale, layer.lora_active = scale, True


def _adapted(model: nnx.Module, active: bool) -> list[Any]:
    found = [layer for _, layer in linear_layers(model) if layer.lora_A is not None]
    found = [layer for layer in found if layer.lora_active == active]
    if not found:
        what = "active" if active else "merged"
        raise ValueError(f"model: expected {what} adapters, got none")
    return found


def _set_kind(layer: Any, kind: type[nnx.Variable]) -> None:
    for factor in (layer.lora_A, layer.lora_B):
        factor.weight = kind(factor.weight[...])
    layer.lora_active = kind is LoRAParam
