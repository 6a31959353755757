"""The encoder: embeddings, RoPE, attention, GeGLU, blocks. Knows no mesh and holds no state.

Parameter paths are HF's keys ("layers.3.attn.Wqkv.weight"), one Param per HF tensor, shaped by
axis:

    Wqkv [D, 3, H, K]   attn.Wo [H, K, D]   Wi [D, 2, F]   mlp.Wo [F, D]   tok_embeddings [V, D]

Differences between frameworks are written out: exact GELU, LayerNorm with a two-pass variance in
float32, RoPE and softmax in float32, and float32 matmuls at the highest precision (a TPU or GPU
would otherwise round their inputs). Source: arXiv 2412.13663; transformers' modeling_modernbert.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.core import Tracer

from modernbert_jax.attention import (
    Bounds,
    attention as default_attention,
    make_bounds,
    reference,
    segment_ids_from_mask,
)
from modernbert_jax.checkpoint.pretrained import Pretrained
from modernbert_jax.config import FULL, ModernBertConfig, init_std

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


@struct.dataclass
class BaseModelOutput:
    """last_hidden_state: hidden_BLD. hidden_states: the embeddings, then each layer's output; the
    last is last_hidden_state, after the final norm, as in transformers. attentions: each layer's
    probabilities_BHLM."""

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


T = TypeVar("T")
Rope = tuple[jax.Array, jax.Array]  # cos and sin, as `rope_tables` makes them
Op = Callable[..., jax.Array]  # attention, as `modernbert_jax.attention.attention`


# Small pieces.


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Float32 means float32 on every backend; smaller types take the fast path."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None or the rate is 0."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
    """The key of one use; None stays None (no dropout)."""
    return None if key is None else jax.random.fold_in(key, number)


def truncated_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, config: ModernBertConfig
) -> jax.Array:
    """Normal of `std`, redrawn beyond the cut-off; `std` is the parent's, as torch has it."""
    cut = config.initializer_cutoff_factor or 3.0
    return (jax.random.truncated_normal(rngs.params(), -cut, cut, shape, jnp.float32) * std).astype(
        config.param_dtype
    )


class Linear(nnx.Module):
    """einsum(`equation`, x, weight) + bias in config.dtype; the weight's shape is by axis."""

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
        y = jnp.einsum(
            self.equation,
            x.astype(dtype),
            self.weight[...].astype(dtype),
            precision=precision_of(dtype),
        )
        if self.has_bias:
            bias = self.bias[...].astype(dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32, returned in config.dtype."""

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


def rope_tables(positions_BL: jax.Array, head_dim: int, theta: float) -> Rope:
    """cos and sin of the RoPE angles in float32, each [B, L, K/2]; positions in tokens."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BLHK: jax.Array, tables: Rope) -> jax.Array:
    """Rotates the two halves of each head (NeoX layout, not interleaved) in float32."""
    cos, sin = (t[:, :, None, :] for t in tables)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHK.dtype)


# Modules.


class Embeddings(nnx.Module):
    """Token embeddings, normalised; no position and no type embeddings."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.tok_embeddings = Embedding(config, rngs)
        self.norm = LayerNorm(config)

    def __call__(
        self,
        input_ids_BL: jax.Array,
        key: jax.Array | None,
        inputs_embeds_BLD: jax.Array | None = None,
    ) -> jax.Array:
        if inputs_embeds_BLD is None:
            inputs_embeds_BLD = self.tok_embeddings(input_ids_BL)
        x_BLD = self.norm(inputs_embeds_BLD)
        return dropout(x_BLD.astype(self.config.residual_dtype), self.config.embedding_dropout, key)


class Embedding(nnx.Module):
    """weight [V, D]. The look-up of pad_token_id passes no gradient, as torch's padding_idx."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.pad_token_id = config.pad_token_id
        self.weight = nnx.Param(
            truncated_normal(rngs, shape, init_std(config, "embedding"), config)
        )

    def __call__(self, input_ids_BL: jax.Array) -> jax.Array:
        x_BLD = jnp.take(self.weight[...], input_ids_BL, axis=0)
        if self.pad_token_id is None:
            return x_BLD
        is_pad_BL1 = (input_ids_BL == self.pad_token_id)[..., None]
        return jnp.where(is_pad_BL1, jax.lax.stop_gradient(x_BLD), x_BLD)


class Attention(nnx.Module):
    """Wqkv, RoPE, bounded attention, Wo."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        bias = config.attention_bias
        self.Wqkv = Linear(
            "BLD,DTHK->BLTHK",
            (D, 3, H, K),
            (3, H, K) if bias else None,
            init_std(config, "in"),
            config,
            rngs,
        )
        self.Wo = Linear(
            "BLHK,HKD->BLD",
            (H, K, D),
            (D,) if bias else None,
            init_std(config, "out"),
            config,
            rngs,
        )

    def __call__(
        self, x_BLD: jax.Array, rope: Rope, bounds: Bounds, attention: Op, key: jax.Array | None
    ) -> jax.Array:
        config = self.config
        qkv_BLTHK = self.Wqkv(x_BLD)
        q_BLHK = apply_rope(qkv_BLTHK[:, :, 0], rope)
        k_BLHK = apply_rope(qkv_BLTHK[:, :, 1], rope)
        v_BLHK = qkv_BLTHK[:, :, 2]
        scale = config.head_dim**-0.5
        if config.attention_dropout and key is not None:
            # No fused kernel drops probabilities: this field costs the full [L, M] of every head.
            out_BLHK = reference.attention(
                q_BLHK,
                k_BLHK,
                v_BLHK,
                bounds,
                scale=scale,
                dropout_rate=config.attention_dropout,
                dropout_key=fold(key, 0),
            )
        else:
            out_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, bounds, scale=scale)
        out_BLD = self.Wo(out_BLHK)
        out_BLD = dropout(out_BLD, config.attention_dropout, fold(key, 1))
        return dropout(out_BLD, config.attention_out_dropout, fold(key, 2))


class MLP(nnx.Module):
    """GeGLU: Wo(act(first half) * second half)."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        D, F = config.hidden_size, config.intermediate_size
        bias = config.mlp_bias
        self.Wi = Linear(
            "BLD,DTF->BLTF",
            (D, 2, F),
            (2, F) if bias else None,
            init_std(config, "in"),
            config,
            rngs,
        )
        self.Wo = Linear(
            "BLF,FD->BLD", (F, D), (D,) if bias else None, init_std(config, "out"), config, rngs
        )

    def __call__(self, x_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
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
        self, x_BLD: jax.Array, rope: Rope, bounds: Bounds, attention: Op, key: jax.Array | None
    ) -> jax.Array:
        h_BLD = self.attn_norm(x_BLD) if self.has_attn_norm else x_BLD
        h_BLD = self.attn(h_BLD, rope, bounds, attention, fold(key, 0))
        x_BLD = x_BLD + h_BLD.astype(x_BLD.dtype)
        h_BLD = self.mlp(self.mlp_norm(x_BLD), fold(key, 1))
        return x_BLD + h_BLD.astype(x_BLD.dtype)


# What people bring along from other models, and what to do about it.
NOT_HERE = {
    "token_type_ids": "ModernBERT has none, so leave them out: `del inputs['token_type_ids']`; "
    "texts that share a row are told apart by segment_ids",
    "labels": "expected none, models give logits and not a loss; take one from optax, or train "
    "with `python -m train finetune`",
    "head_mask": "expected none, heads cannot be masked here",
    "return_dict": "expected none, results always have names (`.logits`)",
    "use_cache": "expected none, an encoder has no cache",
}


def refuse_input(name: str, value: Any) -> None:
    """Raises TypeError, with what to do, for an input that belongs to another library."""
    if name in NOT_HERE:
        raise TypeError(f"{name}: {NOT_HERE[name]}")
    if type(value).__module__.partition(".")[0] == "torch":
        raise TypeError(
            f"{name}: expected a NumPy or JAX array, got a torch tensor; pass {name}.numpy(), or "
            "use this library's AutoTokenizer"
        )


def accepts_hf_names(call: Callable[..., T]) -> Callable[..., T]:
    """Lets `model(**tokenizer(text))` work: HF's keyword names stand for ours with their axes."""
    names = {
        "input_ids": "input_ids_BL",
        "attention_mask": "attention_mask_BL",
        "segment_ids": "segment_ids_BL",
        "positions": "positions_BL",
        "position_ids": "positions_BL",
        "inputs_embeds": "inputs_embeds_BLD",
        "predict_positions": "predict_positions_BP",
    }

    @functools.wraps(call)
    def wrapper(self, *args, **kwargs):
        for name, value in (*(("input", a) for a in args), *kwargs.items()):
            refuse_input(name, value)
        return call(self, *args, **{names.get(k, k): v for k, v in kwargs.items()})

    return wrapper


class ModernBertModel(Pretrained, nnx.Module):
    """The encoder without a head.

    Args: config; rngs (streams: params). The weights start as ModernBERT's own training did.
    """

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config: ModernBertConfig = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List(
            [EncoderLayer(config, i, rngs) for i in range(config.num_hidden_layers)]
        )
        self.final_norm = LayerNorm(config)

    @accepts_hf_names
    def __call__(
        self,
        input_ids_BL: jax.Array,
        attention_mask_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        *,
        inputs_embeds_BLD: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        attention: Op = default_attention,
        scan_layers: bool = False,
        remat: bool | Callable[..., bool] = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """Encodes rows of tokens: last_hidden_state is hidden_BLD in config.residual_dtype.

        attention_mask_BL: 1 is a token, 0 is padding (left or right). segment_ids_BL: packed rows,
        0 is padding, equal neighbours are one sequence that attends to itself only. positions_BL:
        in tokens; by default they restart at 0 in each segment. inputs_embeds_BLD: stands for the
        look-up of input_ids_BL, before the norm. dropout_key: None is inference.
        attention: the op, e.g. `functools.partial(attention, implementation="reference")` or a
        sharded one. scan_layers: one compiled body for each repeated group of layers (quick to
        compile). remat: recompute each layer in the backward pass, or what a policy of
        jax.checkpoint_policies does not save. output_attentions: costs [B, H, L, M] a layer, which
        is not otherwise made; `modernbert_jax.look` picks some by name.
        Raises ValueError for shapes that do not match, a mask with holes and rows that are longer
        than max_position_embeddings without being packed.
        """
        config = self.config
        input_ids_BL = jnp.asarray(input_ids_BL)
        length, longest = input_ids_BL.shape[-1], config.max_position_embeddings
        if segment_ids_BL is None and length > longest:
            raise ValueError(
                f"input_ids: expected at most {longest:,} tokens a row, got {length:,}; cut them "
                "(truncation=True), let pipeline('token-classification') slide a window, or go "
                f"beyond at your own risk (from_pretrained(..., max_position_embeddings={length}))"
            )
        whole = attention_mask_BL is None and segment_ids_BL is None
        segment_ids_BL = as_segment_ids(input_ids_BL, attention_mask_BL, segment_ids_BL)
        bounds = {
            kind: make_bounds(segment_ids_BL, None if kind == FULL else config.window, whole=whole)
            for kind in dict.fromkeys((FULL, *config.layer_types))
        }
        if positions_BL is None:
            index_1L = jnp.arange(input_ids_BL.shape[1], dtype=jnp.int32)[None, :]
            positions_BL = index_1L - bounds[FULL].lo_BL
        rope = {
            kind: rope_tables(jnp.asarray(positions_BL), config.head_dim, config.rope_theta(kind))
            for kind in dict.fromkeys(config.layer_types)
        }

        def apply(layer: EncoderLayer, kind: str, x_BLD: jax.Array, key: jax.Array | None):
            def run(state, x_BLD, key):
                layer = nnx.merge(graph, state)
                return layer(x_BLD, rope[kind], bounds[kind], attention, key)

            graph, state = nnx.split(layer)
            if remat:
                run = jax.checkpoint(run, policy=None if remat is True else remat)
            return run(state, x_BLD, key)

        maps: list[jax.Array] = []
        if output_attentions:
            if remat or dropout_key is not None:
                raise ValueError("output_attentions: for inference, without remat and dropout_key")
            attention = _keeping_maps(attention, maps)

        x_BLD = self.embeddings(input_ids_BL, fold(dropout_key, 0), inputs_embeds_BLD)
        states = [x_BLD]
        scans = scan_layers and not output_hidden_states and not output_attentions
        groups, period = self._groups() if scans else (0, 1)
        first = 1 if groups else 0
        for i in range(first):
            x_BLD = apply(self.layers[i], config.layer_types[i], x_BLD, fold(dropout_key, i + 1))
        if groups:
            x_BLD = self._scan(apply, x_BLD, groups, period, dropout_key)
        for i in range(first + groups * period, len(self.layers)):
            x_BLD = apply(self.layers[i], config.layer_types[i], x_BLD, fold(dropout_key, i + 1))
            states.append(x_BLD)
        x_BLD = self.final_norm(x_BLD).astype(config.residual_dtype)
        return BaseModelOutput(
            x_BLD,
            (*states[:-1], x_BLD) if output_hidden_states else None,
            tuple(maps) if output_attentions else None,
        )

    def _groups(self) -> tuple[int, int]:
        """(groups, period): after layer 0 the kinds repeat `groups` times with this period."""
        kinds = self.config.layer_types[1:]
        for period in range(1, len(kinds) // 2 + 1):
            groups = len(kinds) // period
            if kinds[: groups * period] == kinds[:period] * groups:
                return groups, period
        return 0, 1

    def _scan(self, apply, x_BLD, groups: int, period: int, dropout_key):
        """Layers 1 to groups*period as one loop over their stacked weights."""
        kinds = self.config.layer_types[1 : 1 + period]
        graph = nnx.graphdef(self.layers[1])
        columns = [
            [nnx.state(self.layers[1 + g * period + j]) for g in range(groups)]
            for j in range(period)
        ]
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *column) for column in columns]

        def body(x_BLD, item):
            states, first = item
            for j in range(period):
                layer = nnx.merge(graph, states[j])
                x_BLD = apply(layer, kinds[j], x_BLD, fold(dropout_key, first + j))
            return x_BLD, None

        first = jnp.arange(groups) * period + 2
        return jax.lax.scan(body, x_BLD, (stacked, first))[0]


def _keeping_maps(attention: Op, maps: list[jax.Array]) -> Op:
    """The op, which leaves the probabilities of each call in `maps`."""

    def run(q_BLHK, k_BLHK, v_BLHK, bounds: Bounds, *, scale: float) -> jax.Array:
        maps.append(reference.probabilities(q_BLHK, k_BLHK, bounds, scale=scale))
        return attention(q_BLHK, k_BLHK, v_BLHK, bounds, scale=scale)

    return run


def as_segment_ids(
    input_ids_BL: jax.Array,
    attention_mask_BL: jax.Array | None,
    segment_ids_BL: jax.Array | None,
) -> jax.Array:
    """One array of segment ids from whatever the caller knows; all ones when nothing is said."""
    if input_ids_BL.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, L], got {input_ids_BL.shape}")
    for name, x in (("attention_mask", attention_mask_BL), ("segment_ids", segment_ids_BL)):
        if x is not None and np.shape(x) != input_ids_BL.shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids {input_ids_BL.shape}, got {np.shape(x)}"
            )
    if segment_ids_BL is not None:
        segment_ids_BL = jnp.asarray(segment_ids_BL, jnp.int32)
        if attention_mask_BL is not None:
            segment_ids_BL = jnp.where(jnp.asarray(attention_mask_BL) != 0, segment_ids_BL, 0)
        return segment_ids_BL
    if attention_mask_BL is not None:
        if not isinstance(attention_mask_BL, Tracer):
            attention_mask_BL = jnp.asarray(attention_mask_BL)
        return segment_ids_from_mask(attention_mask_BL)
    return jnp.ones(input_ids_BL.shape, jnp.int32)
