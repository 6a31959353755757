"""int8 weights, through qwix: a smaller model, or faster products.

    model = quantize(ModernBertForMaskedLM.from_pretrained(path), "weights")

The weights of the encoder's linear layers and of a head's dense layer become int8, each output with
a float32 scale of its own: absmax / 127.5. Embeddings, norms, biases, the decoder and the final
classifier stay as they are. Adapters (`lora.add_lora`) can be added before or after, and trained
upon "weights" (QLoRA, arXiv 2305.14314).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from modernbert_jax.checkpoint.params import Int8
from modernbert_jax.layers import Linear, weighted
from modernbert_jax.lora import linear_layers
from modernbert_jax.untrusted import shown
from modernbert_jax.weights import weight_of

MODES = ("weights", "dynamic")

Model = TypeVar("Model", bound=nnx.Module)


class Int8Linear(Linear):
    """A Linear whose weight is int8, with a float32 scale per output.

    dynamic: also round each token's inputs to int8, with a scale per token, and multiply integers.
    """

    scale: nnx.Variable
    dynamic: bool

    def product(
        self, equation: str, x: jax.Array, arrange: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        import qwix

        weight, scale = arrange(self.weight[...]), arrange(self.scale[...])
        if self.dynamic:
            return _integer_product(x, qwix.QArray(weight, scale)).astype(self.dtype)

        def product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
            full = qwix.dequantize(qwix.QArray(weight, scale))
            return weighted(equation, x, full.astype(self.dtype))

        # Otherwise the backward pass of adapters would keep every dequantized weight.
        return jax.checkpoint(product)(x, weight, scale)

    def full_weight(self) -> jax.Array:
        """Raises ValueError: merging and fused local layers need a float weight."""
        raise ValueError(
            "weight: expected a float weight, got int8; merge adapters before `quantize`, and call "
            "the model without fused local layers"
        )


@jax.custom_vjp
def _integer_product(x: jax.Array, weight: Any) -> jax.Array:
    """Returns x times a qwix.QArray, over the last axis of x and the first of the weight."""
    import qwix

    tokens = tuple(range(x.ndim - 1))
    rounded = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=tokens)
    return qwix.dot_general(rounded, weight, (((x.ndim - 1,), (0,)), ((), ())))


def _refuse_gradient(*_: Any) -> Any:
    raise ValueError(
        'mode "dynamic": expected inference, got a gradient, which rounded inputs do not have; '
        'train adapters upon quantize(model, "weights")'
    )


_integer_product.defvjp(_refuse_gradient, _refuse_gradient)


def quantize(model: Model, mode: str = "weights") -> Model:
    """Makes the weights of a model's linear layers int8, in place, and returns the model.

    mode: "weights" only stores them so, and multiplies in config.dtype. "dynamic" also rounds the
    inputs of these layers to int8, token by token, and multiplies integers; it is for inference.
    Calls, scan_layers, `shard_params` (afterwards), pipelines and embedders work as before; make
    these from the quantized model. The model holds 2.2 (base) or 2.9 (large) times fewer bytes than
    in float32, of which the embeddings keep most.
    Raises ImportError without qwix, TypeError for what is no module, and ValueError for another
    mode, a model without linear layers of ModernBERT, a quantized one, and one that several devices
    share.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected {' or '.join(MODES)}, got {shown(mode)}")
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: expected a model, got {type(model).__name__}; quantize the model that you "
            "make it from"
        )
    try:
        import qwix
    except ImportError:
        raise ImportError(
            "quantize: expected the package qwix, found none; pip install 'modernbert_jax[int8]'"
        ) from None
    layers = [
        (layer, row)
        for path, layer in linear_layers(model)
        if (row := weight_of(f"{path}.weight")).kind != "classifier"
    ]
    if not layers:
        raise ValueError("model: expected linear layers of ModernBERT, found none")
    for layer, _ in layers:
        weight = layer.weight[...]
        if weight.dtype == jnp.int8:
            raise ValueError("model: expected float weights, got int8; load the model again")
        sharding = getattr(weight, "sharding", None)  # a traced weight has none
        if sharding is not None and len(sharding.device_set) > 1:
            raise ValueError(
                "model: expected weights on one device, got several; quantize first, then call "
                "shard_params(model, mesh)"
            )
    for layer, row in layers:
        weight = layer.weight[...].astype(jnp.float32)
        outputs = tuple(range(row.inputs, weight.ndim))
        rounded = qwix.quantize(weight, jnp.int8, channelwise_axes=outputs)
        layer.__class__ = Int8Linear  # its other parts, adapters included, stay
        layer.weight, layer.scale = Int8(rounded.qvalue), nnx.Variable(rounded.scale)
        layer.dynamic = mode == "dynamic"
    return model
