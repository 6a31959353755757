"""Changes the number of tokens or layers of a model, with its configuration, in place."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from modernbert_jax.config import ModernBertConfig
from modernbert_jax.sharding import param_shardings
from modernbert_jax.untrusted import shown
from modernbert_jax.weights import EMBEDDING


def resize_vocabulary(
    model: Any, n: int, pad_to_multiple_of: int | None, new: jax.Array | None
) -> None:
    """Implements `Pretrained.resize_token_embeddings`; `new` [n, D] has the rows to add, or None.

    None adds the mean of the rows. As in transformers, the decoder's bias of an added token is 0 if
    the decoder is tied to the embedding, else the mean of the biases.
    """
    size = padded(n, pad_to_multiple_of)
    embedding = getattr(model, "model", model).embeddings.tok_embeddings
    old = embedding.weight.get_value()
    if isinstance(old.sharding, NamedSharding):  # refuses a size that the mesh does not divide
        grown = jax.ShapeDtypeStruct((size, *old.shape[1:]), old.dtype)
        mesh: Any = old.sharding.mesh
        param_shardings({EMBEDDING: grown}, mesh)
    _set_config(model, vocab_size=size)
    _resize(embedding.weight, size, new)
    decoder = getattr(model, "decoder", None)
    tied = model.config.tie_word_embeddings
    for name, rows in (("weight", new), ("bias", jnp.zeros(size) if tied else None)):
        if isinstance(own := getattr(decoder, name, None), nnx.Variable):
            _resize(own, size, rows)


def padded(n: int, multiple: int | None) -> int:
    """Returns n rounded up to a multiple. Raises ValueError for what are no positive integers."""
    for name, value in (("n", n), ("pad_to_multiple_of", 1 if multiple is None else multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")
    return n if multiple is None else -(-n // multiple) * multiple


def drop_layers(model: Any, indices: Iterable[int]) -> None:
    """Implements `Pretrained.drop_layers`."""
    encoder = getattr(model, "model", model)
    check_layers(encoder)
    count, dropped = len(encoder.layers), sorted(set(indices))
    if bad := [i for i in dropped if i not in range(1, count)]:
        why = "; layer 0 has no attention norm, so no other can be the first" if 0 in bad else ""
        raise ValueError(f"indices: expected 1 to {count - 1}, got {shown(bad[0])}{why}")
    kept = [i for i in range(count) if i not in dropped]
    kinds = encoder.config.layer_types
    encoder.layers = nnx.List([encoder.layers[i] for i in kept])
    _set_config(model, num_hidden_layers=len(kept), layer_types=tuple(kinds[i] for i in kept))


def check_layers(model: Any) -> None:
    """Raises ValueError if a model does not have the number of layers of its configuration."""
    encoder = getattr(model, "model", model)
    layers, expected = getattr(encoder, "layers", None), encoder.config.num_hidden_layers
    if layers is not None and len(layers) != expected:
        raise ValueError(
            f"layers: expected {expected} (num_hidden_layers), got {len(layers)}; "
            "model.drop_layers(indices) removes layers and changes the configuration with them"
        )


def _resize(variable: nnx.Variable, size: int, new: jax.Array | None) -> None:
    old = variable.get_value()
    split = isinstance(sharding := old.sharding, NamedSharding)
    if split:  # on explicit axes, split arrays do not concatenate
        old, new = jax.device_put((old, new), NamedSharding(sharding.mesh, PartitionSpec()))
    added = size - len(old)
    if added <= 0:
        value = old[:size]
    else:
        mean = jnp.mean(old.astype(jnp.float32), axis=0, keepdims=True)
        rows = jnp.repeat(mean, added, axis=0) if new is None else new[len(old) :]
        value = jnp.concatenate([old, rows.astype(old.dtype)])
    variable.set_value(jax.device_put(value, sharding) if split else value)


def _set_config(model: Any, **changes: Any) -> None:
    """Replaces fields in every configuration that the parts of a model hold."""
    config = model.config.replace(**changes)  # judged before anything changes
    for _, part in nnx.iter_modules(model):
        module: Any = part
        if isinstance(getattr(module, "config", None), ModernBertConfig):
            module.config = config
