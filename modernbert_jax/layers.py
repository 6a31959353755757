"""The parts of the encoder: Linear, LayerNorm, embeddings, RoPE, attention, GeGLU and the layer.

Parameter paths are Hugging Face's keys ("layers.3.attn.Wqkv.weight"). Each Hugging Face tensor is
one Param, shaped by axis:

    Wqkv [D, 3, H, K]   attn.Wo [H, K, D]   Wi [D, 2, F]   mlp.Wo [F, D]   tok_embeddings [V, D]

Choices that differ between frameworks are explicit: exact GELU, LayerNorm with a two-pass variance
in float32, RoPE and softmax in float32, and float32 products at the highest precision.
Source: arXiv 2412.13663; transformers' modeling_modernbert.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from modernbert_jax.attention import Bounds, packed_heads, reference, row_major
from modernbert_jax.attention.rope import Rope, apply_rope
from modernbert_jax.config import ModernBertConfig, init_std
from modernbert_jax.dropout import Key, dropout, fold
from modernbert_jax.precision import matmul_precision

Op = Callable[..., jax.Array]  # has the signature of `modernbert_jax.attention.attention`

_gelu = functools.partial(jax.nn.gelu, approximate=False)
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def _same(x: jax.Array) -> jax.Array:
    return x


def truncated_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, config: ModernBertConfig
) -> jax.Array:
    """Draws from a normal truncated at the configured cutoff.

    `std` is the deviation before truncation, as in torch.nn.init.trunc_normal_.
    """
    cut = config.initializer_cutoff_factor or 3.0
    return (jax.random.truncated_normal(rngs.params(), -cut, cut, shape, jnp.float32) * std).astype(
        config.param_dtype
    )


class Factor(nnx.Module):
    """One factor of a LoRA adapter, weight [*inputs, R] or [R, *outputs]."""

    def __init__(self, weight: nnx.Variable):
        self.weight = weight


class Linear(nnx.Module):
    """einsum(`equation`, x, weight) + bias, computed in config.dtype.

    The equation may have one letter for the first axes of the weight together.
    `modernbert_jax.lora` attaches the factors lora_A and lora_B. While they are active, they add
    lora_scale * (x lora_A) lora_B; once they are merged into the weight, they add nothing.
    """

    lora_A: Factor | None = None
    lora_B: Factor | None = None
    lora_scale: float = 0.0
    lora_active: bool = False

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
        std: float,
        config: ModernBertConfig,
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.dtype = config.dtype
        self.weight = nnx.Param(truncated_normal(rngs, shape, std, config))
        if bias_shape is not None:
            self.bias = nnx.Param(jnp.zeros(bias_shape, config.param_dtype))
        self.has_bias = bias_shape is not None

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        letters = self.equation.partition("->")[0].partition(",")[2]
        outputs = len(letters) - 1
        y = self.product(self.equation, x, lambda w: w.reshape(-1, *w.shape[w.ndim - outputs :]))
        if self.has_bias:
            bias = self.bias[...].astype(dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y + self.adapter(x) if self.lora_active else y

    def product(
        self, equation: str, x: jax.Array, arrange: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns einsum(equation, x, arrange(weight)).

        arrange: joins the input axes of the weight to one, and may reorder its outputs.
        """
        return weighted(equation, x, arrange(self.weight[...].astype(self.dtype)))

    def adapter(self, x: jax.Array, arrange: Callable[[jax.Array], jax.Array] = _same) -> jax.Array:
        """Returns the term of the active adapter; `arrange` reorders the outputs of lora_B."""
        assert self.lora_A is not None and self.lora_B is not None
        dtype = jnp.dtype(self.dtype)
        a = self.lora_A.weight[...].astype(dtype)
        b = arrange(self.lora_B.weight[...].astype(dtype))
        product = functools.partial(jnp.tensordot, axes=1, precision=matmul_precision(dtype))
        low = product(x.astype(dtype), a.reshape(-1, a.shape[-1]))
        return product(low, b) * self.lora_scale

    def full_weight(self) -> jax.Array:
        """Returns the weight and what an active adapter adds to it, in the weight's dtype."""
        weight = self.weight[...]
        if not self.lora_active:
            return weight
        return (weight.astype(jnp.float32) + self.adapter_weight()).astype(weight.dtype)

    def adapter_weight(self) -> jax.Array:
        """Returns lora_scale * lora_A lora_B in float32, in the shape of the weight."""
        assert self.lora_A is not None and self.lora_B is not None
        a, b = (f.weight[...].astype(jnp.float32) for f in (self.lora_A, self.lora_B))
        return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST) * self.lora_scale


def weighted(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns einsum(equation, x, weight), computed in the weight's dtype."""
    dtype = weight.dtype
    return jnp.einsum(equation, x.astype(dtype), weight, precision=matmul_precision(dtype))


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32 and returned in config.dtype."""

    def __init__(self, config: ModernBertConfig):
        self.eps, self.dtype = config.norm_eps, config.dtype
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))
        if config.norm_bias:
            self.bias = nnx.Param(jnp.zeros((config.hidden_size,), config.param_dtype))
        self.has_bias = config.norm_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        ones = (1,) * (y.ndim - 1)
        y = y * self.weight[...].astype(jnp.float32).reshape(*ones, -1)
        if self.has_bias:
            y = y + self.bias[...].astype(jnp.float32).reshape(*ones, -1)
        return y.astype(self.dtype)


class Embedding(nnx.Module):
    """weight [V, D]. pad_token_id gets no gradient, as with torch's padding_idx."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.pad_token_id = config.pad_token_id
        self.weight = nnx.Param(
            truncated_normal(rngs, shape, init_std(config, "embedding"), config)
        )

    def __call__(self, input_ids_BL: jax.Array) -> jax.Array:
        # NaN for an id outside the vocabulary, negative ones too, never another token's row.
        rows = jnp.asarray(self.weight[...]).at[input_ids_BL]
        x_BLD = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        if self.pad_token_id is None:
            return x_BLD
        is_pad_BL1 = (input_ids_BL == self.pad_token_id)[..., None]
        return jnp.where(is_pad_BL1, jax.lax.stop_gradient(x_BLD), x_BLD)


class Embeddings(nnx.Module):
    """Normalized token embeddings; ModernBERT has no position or type embeddings."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.tok_embeddings = Embedding(config, rngs)
        self.norm = LayerNorm(config)

    def __call__(self, tokens: jax.Array, key: Key | None) -> jax.Array:
        """tokens: ids [B, L], or their embeddings [B, L, D] before the norm."""
        x_BLD = self.norm(self.tok_embeddings(tokens) if tokens.ndim == 2 else tokens)
        return dropout(x_BLD.astype(self.config.residual_dtype), self.config.embedding_dropout, key)


class Attention(nnx.Module):
    """Wqkv, RoPE, bounded attention, Wo."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        qkv_bias, out_bias = ((3, H, K), (D,)) if config.attention_bias else (None, None)
        std_in, std_out = init_std(config, "in"), init_std(config, "out")
        self.Wqkv = Linear("BLD,DTHK->BLTHK", (D, 3, H, K), qkv_bias, std_in, config, rngs)
        self.Wo = Linear("BLP,PD->BLD", (H, K, D), out_bias, std_out, config, rngs)

    def __call__(
        self, x_BLD: jax.Array, rope: Rope, bounds: Bounds, attention: Op, key: Key | None
    ) -> jax.Array:
        config = self.config
        scale = config.head_dim**-0.5
        if config.attention_dropout and key is not None:
            # No fused kernel drops probabilities, so this option costs [B, H, L, M] of memory.
            qkv_BLTHK = self.Wqkv(x_BLD)
            out_BLHK = reference.attention(
                apply_rope(qkv_BLTHK[:, :, 0], rope),
                apply_rope(qkv_BLTHK[:, :, 1], rope),
                qkv_BLTHK[:, :, 2],
                bounds,
                scale=scale,
                dropout_rate=config.attention_dropout,
                dropout_key=fold(key, 0),
            )
        elif J := packed_heads(attention, self._shape(x_BLD), bounds):
            qkv_BLGTJK = self._packed_qkv(x_BLD, J)
            out_BLHK = attention(qkv_BLGTJK, None, None, bounds, scale=scale, rope=rope)
        else:
            qkv_BLTHK = self.Wqkv(x_BLD)
            q_BLHK, k_BLHK, v_BLHK = (qkv_BLTHK[:, :, i] for i in range(3))
            out_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, bounds, scale=scale, rope=rope)
        out_BLD = self.Wo(out_BLHK.reshape(*x_BLD.shape[:2], -1))
        out_BLD = dropout(out_BLD, config.attention_dropout, fold(key, 1))
        return dropout(out_BLD, config.attention_out_dropout, fold(key, 2))

    def _shape(self, x_BLD: jax.Array) -> jax.ShapeDtypeStruct:
        """Of q, k and v each."""
        config = self.config
        shape = (*x_BLD.shape[:2], config.num_attention_heads, config.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    def _packed_qkv(self, x_BLD: jax.Array, J: int) -> jax.Array:
        """q, k and v with those of J heads side by side, so that no kernel's operand is copied."""
        (B, L, _), (_, _, H, K) = x_BLD.shape, self.Wqkv.weight.shape

        def by_block(w: jax.Array) -> jax.Array:  # [..., 3, H, K] -> [..., P]
            w = w.reshape(-1, 3, H // J, J, K)
            return jnp.swapaxes(w, 1, 2).reshape(w.shape[0], -1)

        y_BLP = self.Wqkv.product("BLD,DP->BLP", x_BLD, by_block)
        if self.Wqkv.has_bias:
            y_BLP = y_BLP + by_block(self.Wqkv.bias[...].astype(y_BLP.dtype))[None]
        if self.Wqkv.lora_active:
            y_BLP = y_BLP + self.Wqkv.adapter(x_BLD, by_block)
        return y_BLP.reshape(B, L, H // J, 3, J, K)


class MLP(nnx.Module):
    """GeGLU: Wo(act(first half of Wi) * second half of Wi)."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        D, F = config.hidden_size, config.intermediate_size
        in_bias, out_bias = ((2, F), (D,)) if config.mlp_bias else (None, None)
        std_in, std_out = init_std(config, "in"), init_std(config, "out")
        self.Wi = Linear("BLD,DTF->BLTF", (D, 2, F), in_bias, std_in, config, rngs)
        self.Wo = Linear("BLF,FD->BLD", (F, D), out_bias, std_out, config, rngs)

    def __call__(self, x_BLD: jax.Array, key: Key | None) -> jax.Array:
        h_BLTF = self.Wi(x_BLD)
        act = ACTIVATIONS[self.config.hidden_activation]
        h_BLF = act(h_BLTF[:, :, 0].astype(jnp.float32)).astype(h_BLTF.dtype) * h_BLTF[:, :, 1]
        return self.Wo(dropout(h_BLF, self.config.mlp_dropout, key))


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer has no attention norm."""

    def __init__(self, config: ModernBertConfig, index: int, rngs: nnx.Rngs):
        self.has_attn_norm = index > 0
        if self.has_attn_norm:
            self.attn_norm = LayerNorm(config)
        self.attn = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x_BLD: jax.Array, rope: Rope, bounds: Bounds, attention: Op, key: Key | None
    ) -> jax.Array:
        if bounds.window is not None and hasattr(attention, "layer"):  # FusedLocalLayers
            return attention.layer(self, x_BLD, rope, bounds, fold(fold(key, 0), 2))
        x_BLD = row_major(attention, x_BLD)
        h_BLD = self.attn_norm(x_BLD) if self.has_attn_norm else x_BLD
        h_BLD = self.attn(h_BLD, rope=rope, bounds=bounds, attention=attention, key=fold(key, 0))
        x_BLD = x_BLD + h_BLD.astype(x_BLD.dtype)
        h_BLD = self.mlp(self.mlp_norm(x_BLD), fold(key, 1))
        return row_major(attention, x_BLD + h_BLD.astype(x_BLD.dtype))
