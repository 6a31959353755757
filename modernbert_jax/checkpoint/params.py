"""Parameters of a module as a flat dictionary {path: array}.

A path is the parameter's Hugging Face key, such as "layers.3.attn.Wqkv.weight".
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

from modernbert_jax.checkpoint.files import states_dtype
from modernbert_jax.config import DTYPES, ModernBertConfig
from modernbert_jax.weights import EMBEDDING, check_axes, is_adapter


class Int8(nnx.Variable):
    """An int8 weight of a quantized model; no parameter, since nothing trains it."""


def variables(module: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Any]:
    """Returns {path: variable} for every variable of a kind, those of LoRA adapters included."""
    flat = nnx.to_flat_state(nnx.state(module, kind))
    return {".".join(map(str, path)): variable for path, variable in flat}


def flatten(module: nnx.Module) -> dict[str, Any]:
    """Returns {path: array} for every parameter of a module.

    Raises ValueError for a module with int8 weights or with LoRA adapters that are not merged: what
    reads these parameters has no place for them.
    """
    if variables(module, Int8):
        raise ValueError(
            "model: expected float weights, got int8; save, export and train the float model, and "
            "call quantize(model) after loading it"
        )
    params = {path: param.get_value() for path, param in variables(module).items()}
    if any(map(is_adapter, params)):
        raise ValueError(
            "model: expected one without LoRA adapters, or with merged ones; call "
            "lora.merge(model) first, or save the adapters with lora.save_adapter(model, folder)"
        )
    return params


def with_arrays(module: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Returns {path: array} of a model, and a function that builds it around such arrays.

    The function works under jit. What it builds has the model's int8 weights and adapters, but not
    its dropout.
    """
    module = nnx.view(module, deterministic=True)
    getattr(module, "model", module).dropout_rngs = None
    graph, state = nnx.split(module)
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}

    def build(arrays: Mapping[str, Any]) -> Any:
        filled = {path: leaf.replace(arrays[key]) for key, (path, leaf) in flat.items()}
        return nnx.merge(graph, nnx.from_flat_state(filled))

    return {key: leaf.get_value() for key, (_, leaf) in flat.items()}, build


def param_shapes(cls: type, config: ModernBertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape and dtype} for every parameter of `cls(config)`; allocates nothing.

    Raises ValueError if the class gives a name of ModernBERT's to a parameter of other axes.
    """
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    params = flatten(module)
    for path, param in params.items():
        check_axes(path, param.shape, config)
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}


def module_of(cls: type, config: ModernBertConfig, params: Mapping[str, Any], seed: int = 0) -> Any:
    """Builds the module `cls(config)` around existing parameters; works under jit.

    Variables that are no parameters, such as the keys of dropout, are initialized from `seed`.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(seed))))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    others = tuple(key for key, (_, leaf) in flat.items() if not isinstance(leaf, nnx.Param))
    values = {**params, **(initialize(cls, config, seed, others) if others else {})}
    filled = {path: leaf.replace(values[key]) for key, (path, leaf) in flat.items()}
    return nnx.merge(graph, nnx.from_flat_state(filled))


def initialize(
    cls: type, config: ModernBertConfig, seed: int, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Returns the initial values of some variables; the compiler drops the others."""

    def some() -> dict[str, jax.Array]:
        flat = variables(cls(config, rngs=nnx.Rngs(seed)), nnx.Variable)
        return {path: flat[path].get_value() for path in paths}

    return jax.jit(some)()


def check_keys(what: str, found: Collection[str], expected: Collection[str]) -> None:
    """Raises ValueError that lists the unknown and the missing keys, if there are any."""
    parts = []
    for name, keys in (
        ("unknown", sorted(set(found) - set(expected))),
        ("missing", sorted(set(expected) - set(found))),
    ):
        if keys:
            parts.append(f"{name} keys: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    if parts:
        if any(map(is_adapter, set(found) - set(expected))):
            parts.append(
                "LoRA adapters among them: of a training run, load export/; see lora.load_adapter"
            )
        raise ValueError(f"{what} do not fit the configuration; {'; '.join(parts)}")


def check_sizes(config: ModernBertConfig, arrays: Mapping[str, Any]) -> None:
    """Raises ValueError unless the sizes in config.json are those of a checkpoint's arrays.

    Called before anything is built: building a module takes time for each layer, and a head that
    the file lacks takes memory, both as config.json states them.
    """
    shape_of = getattr(arrays, "shape", None) or (lambda key: tuple(arrays[key].shape))
    found = set()
    for key in arrays:
        prefix, layers, rest = key.removeprefix("model.").partition("layers.")
        if layers and not prefix:
            found.add(rest.partition(".")[0])
    # An absent layer is listed by check_keys; the names of thousands would be made only for that.
    if config.num_hidden_layers > 2 * len(found) + 10:
        raise ValueError(
            f"weights do not fit the configuration; num_hidden_layers: expected {len(found)}, as "
            f"in the weights, got {config.num_hidden_layers}"
        )
    expected = (config.vocab_size, config.hidden_size)
    for key in (EMBEDDING, EMBEDDING.removeprefix("model.")):
        if key in arrays and (shape := tuple(shape_of(key))) != expected:
            raise ValueError(f"{key}: expected shape {expected}, got {shape}")


def dtypes_of(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path: name of the dtype}; of a `SafetensorsFolder`, without reading a tensor."""
    known = getattr(arrays, "dtypes", None)
    return known or {path: str(array.dtype) for path, array in arrays.items()}


def check_dtypes(arrays: Mapping[str, Any], also: Collection[str] = ()) -> None:
    """Raises ValueError for the first array that is not float32, bfloat16 or float16."""
    for path, dtype in dtypes_of(arrays).items():
        if dtype not in DTYPES and dtype not in also:
            hint = ""
            if dtype == "float64":
                hint = "; load it with from_pretrained, which casts it, and save_pretrained"
            raise ValueError(f"{path}: expected float32, bfloat16 or float16, got {dtype}{hint}")


def widest_dtype(arrays: Mapping[str, Any]) -> str:
    """Returns the dtype that holds the values of all arrays, by name: one of `DTYPES`."""
    found = set(dtypes_of(arrays).values())
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else "float32"


def with_dtype(
    config: ModernBertConfig, folder: Any, arrays: Mapping[str, Any]
) -> ModernBertConfig:
    """Returns the configuration with the widest dtype of the arrays if config.json states none."""
    if states_dtype(folder):
        return config
    dtype = widest_dtype(arrays)
    return config.replace(dtype=dtype, param_dtype=dtype)
