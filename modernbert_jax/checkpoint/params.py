"""Parameters of a module as a flat dictionary {path: array}.

A path is the parameter's Hugging Face key, such as "layers.3.attn.Wqkv.weight".
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx

from modernbert_jax.config import ModernBertConfig


def flatten(module: nnx.Module) -> dict[str, Any]:
    """Returns {path: array} for every parameter of a module."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def param_shapes(cls: type, config: ModernBertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape and dtype} for every parameter of `cls(config)`; allocates nothing."""
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(module).items()}


def module_of(cls: type, config: ModernBertConfig, params: Mapping[str, Any]) -> Any:
    """Builds the module `cls(config)` around existing parameters; works under jit."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    flat = {
        path: param.replace(params[".".join(map(str, path))])
        for path, param in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


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
        raise ValueError(f"{what} do not fit the configuration; {'; '.join(parts)}")
