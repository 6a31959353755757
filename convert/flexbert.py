"""Maps the configuration of FlexBERT, ModernBERT's training code, to Hugging Face's and back.

Source: AnswerDotAI/ModernBERT (bert_layers/configuration_bert.py, convert_to_hf.py).
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from modernbert_jax.config import FULL, SLIDING, ModernBertConfig, check_size
from modernbert_jax.untrusted import shown

# Options of FlexBERT for which Hugging Face's architecture has one value: the name, the values that
# mean it, and the default of FlexBertConfig.
_FIXED: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("attention_layer", ("rope",), "base"),
    ("bert_layer", ("prenorm",), "prenorm"),
    ("embedding_layer", ("sans_pos",), "absolute_pos"),
    ("encoder_layer", ("base",), "base"),
    ("mlp_layer", ("glu",), "mlp"),
    ("normalization", ("layernorm", "triton_layernorm"), "rmsnorm"),
    ("embed_norm", (True,), True),
    ("final_norm", (True,), False),
    ("skip_first_prenorm", (True,), False),
    ("head_pred_norm", (True,), True),
    ("rotary_emb_interleaved", (False,), False),
    ("rotary_emb_scale_base", (None,), None),
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Options that both have: FlexBERT's name, Hugging Face's, and the default of FlexBertConfig.
_SHARED: tuple[tuple[str, str, Any], ...] = (
    ("decoder_bias", "decoder_bias", True),
    ("head_pred_bias", "classifier_bias", False),
    ("tie_word_embeddings", "tie_word_embeddings", True),
    ("embed_dropout_prob", "embedding_dropout", 0.0),
    ("mlp_dropout_prob", "mlp_dropout", 0.0),
    ("head_class_dropout", "classifier_dropout", 0.0),
    ("init_cutoff_factor", "initializer_cutoff_factor", 2.0),
)
# Pairs of options for which Hugging Face has one.
_PAIRS = (
    ("attn_qkv_bias", "attn_out_bias", "attention_bias"),
    ("mlp_in_bias", "mlp_out_bias", "mlp_bias"),
)
_ACTIVATIONS = (
    ("hidden_act", "hidden_activation", "gelu"),
    ("head_pred_act", "classifier_activation", "silu"),
)
_HF_NAMES = {  # of FlexBERT's activations
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_FLEX_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
# ModernBERT's special tokens and their ids in its own vocabulary of 50368.
_SPECIAL = {
    "pad_token_id": ("[PAD]", 50283),
    "bos_token_id": ("[CLS]", 50281),
    "eos_token_id": ("[SEP]", 50282),
    "cls_token_id": ("[CLS]", 50281),
    "sep_token_id": ("[SEP]", 50282),
}
# Options that FlexBERT lacks; we keep them in a section of our own inside its configuration.
_SECTION = "modernbert_jax"
_OURS = (*_SPECIAL, "max_position_embeddings", "classifier_pooling")


def hf_config(
    flex: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the config.json for a FlexBertConfig dictionary.

    tokenizer: the tokenizer's files {name: JSON}, which know the ids of the special tokens.
    Two faults of the official converter are avoided: a local theta of 0 or less means the global
    theta, and the activation and bias of the MLM head are those of head_pred, not head_class. The
    dropout after the attention's output becomes our own `attention_out_dropout`.
    Raises ValueError that names an option for which Hugging Face's architecture has no equivalent.
    """
    _refuse_other_architectures(flex)
    for name in _SIZES:
        check_size(name, flex[name])
    head_dim = flex["hidden_size"] // flex["num_attention_heads"]
    for name in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        if flex.get(name) not in (None, head_dim):
            _refuse(name, f"the complete head ({head_dim})", flex[name])
    norm = flex.get("norm_kwargs") or {}
    if not norm.get("elementwise_affine", True):
        _refuse("norm_kwargs.elementwise_affine", "True", False)
    global_theta = float(flex.get("rotary_emb_base", 10000.0))
    local_theta = float(flex.get("local_attn_rotary_emb_base") or -1)
    values = {
        "model_type": "modernbert",
        **{name: flex[name] for name in _SIZES},
        **{name: flex.get(flex_name, default) for flex_name, name, default in _SHARED},
        **_hf_layers(flex),
        **_hf_dropouts(flex),
        "global_rope_theta": global_theta,
        "local_rope_theta": local_theta if local_theta > 0 else global_theta,
        "norm_eps": float(norm.get("eps", 1e-5)),
        "norm_bias": bool(norm.get("bias", True)),
        "initializer_range": flex.get("init_std", flex.get("initializer_range", 0.02)),
        # FlexBERT has no limit of its own (its 512 is that of bert-base-uncased), and the released
        # checkpoints pool by the mean, whatever their training configuration says.
        "max_position_embeddings": 8192,
        "classifier_pooling": "mean",
    }
    for flex_name, name, default in _ACTIVATIONS:
        value = flex.get(flex_name, default)
        if value not in _HF_NAMES:
            _refuse(flex_name, ", ".join(_HF_NAMES), value)
        values[name] = _HF_NAMES[value]
    for one, other, name in _PAIRS:
        values[name] = flex.get(one, False)
        if values[name] != flex.get(other, False):
            _refuse(one, f"the value of {other} ({flex.get(other, False)})", values[name])
    section = flex.get(_SECTION)
    if not isinstance(section, dict) or not section:
        section = _special_ids(flex["vocab_size"], tokenizer)
    return values | {name: section[name] for name in _OURS if name in section}


def flex_config(config: ModernBertConfig) -> dict[str, Any]:
    """Returns the FlexBertConfig dictionary for a configuration.

    Raises ValueError for what FlexBERT cannot express: an odd window or none, layers that are not
    "full every n", other activations.
    """
    period, window = _flex_layers(config)
    both, output = config.attention_dropout, config.attention_out_dropout
    if both and output:
        raise ValueError(
            f"attention_out_dropout: FlexBERT drops the output once, got {output} beside "
            f"attention_dropout {both}"
        )
    activations = {}
    for flex_name, name, _ in _ACTIVATIONS:
        value = getattr(config, name)
        activations[flex_name] = _FLEX_NAMES.get(value, value)
        if activations[flex_name] not in _HF_NAMES:
            raise ValueError(f"{name}: FlexBERT has {', '.join(_HF_NAMES)}, got {value}")
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        **{name: getattr(config, name) for name in _SIZES},
        **{name: expected[0] for name, expected, _ in _FIXED},
        **{flex_name: getattr(config, name) for flex_name, name, _ in _SHARED},
        **{part: getattr(config, name) for *parts, name in _PAIRS for part in parts},
        **activations,
        "head_class_act": activations["head_pred_act"],
        "head_class_bias": config.classifier_bias,
        "padding": "unpadded",
        "unpad_embeddings": True,
        "sliding_window": window,
        "global_attn_every_n_layers": period,
        "rotary_emb_dim": None,
        "rotary_emb_base": config.global_rope_theta,
        "local_attn_rotary_emb_dim": None,
        "local_attn_rotary_emb_base": config.local_rope_theta if window > 0 else -1,
        "norm_kwargs": {"eps": config.norm_eps, "bias": config.norm_bias},
        "attention_probs_dropout_prob": both,
        "attn_out_dropout_prob": both or output,
        "init_method": "full_megatron",
        "init_std": config.initializer_range,
        "initializer_range": config.initializer_range,
        "pooling_type": config.classifier_pooling,
        "pad_token_id": config.pad_token_id,
        "gradient_checkpointing": False,
        "deterministic_fa2": False,
        "position_embedding_type": "absolute",
        _SECTION: {name: getattr(config, name) for name in _OURS},
    }


def _refuse(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"FlexBERT's {name}: HF's ModernBERT has only {expected}, got {shown(got)}")


def _refuse_other_architectures(flex: Mapping[str, Any]) -> None:
    if "alibi_starting_size" in flex:
        _refuse("alibi_starting_size", "RoPE: this is a MosaicBERT", flex["alibi_starting_size"])
    for name, expected, default in _FIXED:
        value = flex.get(name, default)
        if isinstance(value, str) and name.endswith("_layer"):
            value = value.removeprefix("unpadded_").removeprefix("padded_")
        if value not in expected:
            _refuse(name, " or ".join(map(repr, expected)), value)
    for name in ("attention_layer", "bert_layer", "mlp_layer"):
        initial = flex.get(f"initial_{name}")
        if initial is not None and initial != flex.get(name):
            _refuse(f"initial_{name}", "one kind of layer", initial)
    missing = [name for name in _SIZES if name not in flex]
    if missing:
        raise ValueError(f"FlexBERT's configuration lacks {', '.join(missing)}")


def _hf_layers(flex: Mapping[str, Any]) -> dict[str, Any]:
    """layer_types and local_attention; in FlexBERT -1 disables the window or the global layers."""
    window, period = flex.get("sliding_window", -1), flex.get("global_attn_every_n_layers", -1)
    if window <= 0 < period:
        _refuse("global_attn_every_n_layers", "-1 without a sliding_window", period)
    kinds = [
        FULL if window <= 0 or (period > 0 and i % period == 0) else SLIDING
        for i in range(flex["num_hidden_layers"])
    ]
    return {"layer_types": kinds, "local_attention": window if window > 0 else 128}


def _flex_layers(config: ModernBertConfig) -> tuple[int, int]:
    """FlexBERT's (global_attn_every_n_layers, sliding_window)."""
    depth, kinds, window = config.num_hidden_layers, config.layer_types, config.local_attention
    if set(kinds) == {FULL}:
        return -1, -1
    if window % 2 or not window:  # FlexBERT reads 0 as no window
        raise ValueError(f"local_attention: FlexBERT has even windows from 2 on, got {window}")
    if set(kinds) == {SLIDING}:
        return -1, window
    for n in range(2, depth):
        if kinds == tuple(SLIDING if i % n else FULL for i in range(depth)) and kinds[-1] == FULL:
            return n, window
    raise ValueError(
        "layer_types: FlexBERT has full attention in every n-th layer from the first to the last, "
        f"got full attention in layers {[i for i, kind in enumerate(kinds) if kind == FULL]} "
        f"of {depth}"
    )


def _hf_dropouts(flex: Mapping[str, Any]) -> dict[str, float]:
    """HF's attention_dropout applies to both at one rate; attention_out_dropout is ours."""
    both, output = (
        flex.get(name, 0.0) for name in ("attention_probs_dropout_prob", "attn_out_dropout_prob")
    )
    if both and both != output:
        _refuse("attention_probs_dropout_prob", f"0.0 or attn_out_dropout_prob ({output})", both)
    return {"attention_dropout": both, "attention_out_dropout": 0.0 if both else output}


def _special_ids(vocab_size: int, tokenizer: Mapping[str, Any] | None) -> dict[str, int | None]:
    if tokenizer and "tokenizer.json" in tokenizer:
        added = tokenizer["tokenizer.json"].get("added_tokens", [])
        ids = {token["content"]: token["id"] for token in added}
        return {name: ids.get(token) for name, (token, _) in _SPECIAL.items()}
    if vocab_size == ModernBertConfig.vocab_size:
        return {name: id_ for name, (_, id_) in _SPECIAL.items()}
    raise ValueError(
        "the checkpoint holds no tokenizer and its vocabulary is not ModernBERT's "
        f"({ModernBertConfig.vocab_size}, got {vocab_size}), so the ids of its special tokens are "
        "unknown: give an HF config.json with --config FILE"
    )
