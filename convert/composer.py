"""Composer's checkpoints of FlexBERT, the form in which ModernBERT trained, as plain dictionaries.

A checkpoint is {"state": {"model", "optimizers", "integrations", ...}, "rng": ...}. Three things
are mapped, each in both directions: the names of the weights, the configuration, and the moments of
StableAdamW. Source: AnswerDotAI/ModernBERT (bert_layers, main.py, convert_to_hf.py) and
mosaicml/composer (core/state.py, models/huggingface.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modernbert_jax.config import FULL, SLIDING, ModernBertConfig

# The key table: HF's name and Composer's, before ".weight" or ".bias"; N is a layer's number. The
# order is that in which FlexBERT registers its modules, and so the order of its parameters.
KEY_TABLE: tuple[tuple[str, str], ...] = (
    ("model.embeddings.tok_embeddings", "model.bert.embeddings.tok_embeddings"),
    ("model.embeddings.norm", "model.bert.embeddings.norm"),
    ("model.layers.N.attn_norm", "model.bert.encoder.layers.N.attn_norm"),
    ("model.layers.N.attn.Wqkv", "model.bert.encoder.layers.N.attn.Wqkv"),
    ("model.layers.N.attn.Wo", "model.bert.encoder.layers.N.attn.Wo"),
    ("model.layers.N.mlp_norm", "model.bert.encoder.layers.N.mlp_norm"),
    ("model.layers.N.mlp.Wi", "model.bert.encoder.layers.N.mlp.Wi"),
    ("model.layers.N.mlp.Wo", "model.bert.encoder.layers.N.mlp.Wo"),
    ("model.final_norm", "model.bert.final_norm"),
    ("head.dense", "model.head.dense"),
    ("head.norm", "model.head.norm"),
    ("decoder", "model.decoder"),
)
_HF = [hf for hf, _ in KEY_TABLE]
_COMPOSER = [composer for _, composer in KEY_TABLE]
EMBEDDING, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"


# Keys.


def _row(key: str, names: Sequence[str]) -> tuple[int, int, str] | None:
    """(row of the table, layer or -1, "weight" or "bias") of a key; None where no row has it."""
    match = re.fullmatch(r"(.+?)(?:\.layers\.(0|[1-9]\d*)(\..+))?\.(weight|bias)", key)
    if match is None:
        return None
    stem, layer, rest, leaf = match.groups()
    name = stem.replace(".N.", "..") if layer is None else f"{stem}.layers.N{rest}"
    return (names.index(name), -1 if layer is None else int(layer), leaf) if name in names else None


def _rename(keys: Mapping[str, Any], old: Sequence[str], new: Sequence[str], what: str) -> dict:
    renamed, unknown = {}, []
    for key, value in keys.items():
        row = _row(key, old)
        if row is None:
            unknown.append(key)
            continue
        index, layer, leaf = row
        renamed[f"{new[index].replace('.N.', f'.{layer}.')}.{leaf}"] = value
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"unknown keys for {what}: {', '.join(unknown[:3])}{more}")
    return renamed


def to_hf_keys(by_composer_key: Mapping[str, Any]) -> dict[str, Any]:
    """Renames Composer's keys to HF's. Raises ValueError that names the unknown ones."""
    return _rename(by_composer_key, _COMPOSER, _HF, "a FlexBERT masked LM")


def to_composer_keys(by_hf_key: Mapping[str, Any]) -> dict[str, Any]:
    """Renames HF's keys to Composer's, in FlexBERT's order. Raises ValueError as `to_hf_keys`."""
    ordered = {key: by_hf_key[key] for key in sorted(by_hf_key, key=_registration)}
    return _rename(ordered, _HF, _COMPOSER, "Composer, which holds masked LMs only")


def _registration(hf_key: str) -> tuple:
    """Sorts keys as FlexBERT registers its parameters: layer by layer, a weight before its bias."""
    index, layer, leaf = _row(hf_key, _HF) or (len(_HF), -1, "")
    after_layers = layer < 0 and index > _HF.index("model.embeddings.norm")
    return (2 if after_layers else int(layer >= 0), layer, index, leaf != "weight")


# The configuration.

# FlexBERT's options of which HF's architecture has one value: name, the values that are it, and
# what FlexBertConfig takes where the checkpoint does not say.
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
# FlexBERT's names of activations, and HF's.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_FLEX_ACTIVATIONS = {hf: flex for flex, hf in reversed(_ACTIVATIONS.items())} | {
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "swish": "silu",
}
# What FlexBERT has no name for travels in a section of its own inside its configuration.
_SECTION = "modernbert_jax"
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_OURS = (*_IDS, "max_position_embeddings", "classifier_pooling")
# ModernBERT's tokenizer: the name of each special token, and its id in a vocabulary of 50368.
_SPECIAL = {
    "pad_token_id": ("[PAD]", 50283),
    "bos_token_id": ("[CLS]", 50281),
    "eos_token_id": ("[SEP]", 50282),
    "cls_token_id": ("[CLS]", 50281),
    "sep_token_id": ("[SEP]", 50282),
}


def _refuse(name: str, expected: str, got: Any) -> None:
    raise ValueError(f"FlexBERT's {name}: HF's ModernBERT has only {expected}, got {got!r}")


def hf_config(
    flex: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A FlexBertConfig dictionary as HF's config.json.

    tokenizer: the tokenizer's files {name: JSON}, which know the special tokens' ids.
    Right where the official converter is wrong: a local theta of 0 or less means the global one,
    and the activation and bias of the MLM head are head_pred_act and head_pred_bias, not those of
    head_class. The dropout after the attention's output becomes our own `attention_out_dropout`.
    Raises ValueError for an option that HF's architecture lacks, by name.
    """
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
    head_dim = flex["hidden_size"] // flex["num_attention_heads"]
    for name in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        if flex.get(name) not in (None, head_dim):
            _refuse(name, f"the whole head ({head_dim})", flex[name])
    norm = flex.get("norm_kwargs") or {}
    if not norm.get("elementwise_affine", True):
        _refuse("norm_kwargs.elementwise_affine", "True", False)

    global_theta = float(flex.get("rotary_emb_base", 10000.0))
    local_theta = float(flex.get("local_attn_rotary_emb_base") or -1)
    probability_dropout, output_dropout = _hf_dropouts(
        flex.get("attention_probs_dropout_prob", 0.0), flex.get("attn_out_dropout_prob", 0.0)
    )
    layer_types, local_attention = _layer_types(flex)
    return {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        **{name: flex[name] for name in _SIZES},
        "layer_types": layer_types,
        "local_attention": local_attention,
        "global_rope_theta": global_theta,
        "local_rope_theta": local_theta if local_theta > 0 else global_theta,
        "hidden_activation": _hf_activation(flex, "hidden_act", "gelu"),
        "classifier_activation": _hf_activation(flex, "head_pred_act", "silu"),
        "norm_eps": float(norm.get("eps", 1e-5)),
        "norm_bias": bool(norm.get("bias", True)),
        "attention_bias": _same(flex, "attn_qkv_bias", "attn_out_bias"),
        "mlp_bias": _same(flex, "mlp_in_bias", "mlp_out_bias"),
        "decoder_bias": flex.get("decoder_bias", True),
        "classifier_bias": flex.get("head_pred_bias", False),
        "tie_word_embeddings": flex.get("tie_word_embeddings", True),
        "embedding_dropout": flex.get("embed_dropout_prob", 0.0),
        "attention_dropout": probability_dropout,
        "attention_out_dropout": output_dropout,
        "mlp_dropout": flex.get("mlp_dropout_prob", 0.0),
        "classifier_dropout": flex.get("head_class_dropout", 0.0),
        "initializer_range": flex.get("init_std", flex.get("initializer_range", 0.02)),
        "initializer_cutoff_factor": flex.get("init_cutoff_factor", 2.0),
        # FlexBERT has no limit of its own (its 512 is bert-base-uncased's), and the released
        # checkpoints pool by the mean whatever their training configuration says.
        "max_position_embeddings": 8192,
        "classifier_pooling": "mean",
        **(_own_section(flex) or _special_ids(flex["vocab_size"], tokenizer)),
    }


def flex_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """HF's config.json as a FlexBertConfig dictionary.

    Raises ValueError for what FlexBERT cannot say: an odd window, layers not "full every n".
    """
    config = ModernBertConfig.from_dict(hf)
    period, window = _flex_layers(config)
    probability_dropout, output_dropout = _flex_dropouts(config)
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        **{name: getattr(config, name) for name in _SIZES},
        **{name: expected[0] for name, expected, _ in _FIXED},
        "padding": "unpadded",
        "unpad_embeddings": True,
        "sliding_window": window,
        "global_attn_every_n_layers": period,
        "rotary_emb_dim": None,
        "rotary_emb_base": config.global_rope_theta,
        "local_attn_rotary_emb_dim": None,
        "local_attn_rotary_emb_base": config.local_rope_theta if window > 0 else -1,
        "hidden_act": _flex_activation(config, "hidden_activation"),
        "head_pred_act": _flex_activation(config, "classifier_activation"),
        "head_class_act": _flex_activation(config, "classifier_activation"),
        "norm_kwargs": {"eps": config.norm_eps, "bias": config.norm_bias},
        "attn_qkv_bias": config.attention_bias,
        "attn_out_bias": config.attention_bias,
        "mlp_in_bias": config.mlp_bias,
        "mlp_out_bias": config.mlp_bias,
        "decoder_bias": config.decoder_bias,
        "head_pred_bias": config.classifier_bias,
        "head_class_bias": config.classifier_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "embed_dropout_prob": config.embedding_dropout,
        "attention_probs_dropout_prob": probability_dropout,
        "attn_out_dropout_prob": output_dropout,
        "mlp_dropout_prob": config.mlp_dropout,
        "head_class_dropout": config.classifier_dropout,
        "init_method": "full_megatron",
        "init_std": config.initializer_range,
        "initializer_range": config.initializer_range,
        "init_cutoff_factor": config.initializer_cutoff_factor,
        "pooling_type": config.classifier_pooling,
        "pad_token_id": config.pad_token_id,
        "gradient_checkpointing": False,
        "deterministic_fa2": False,
        "position_embedding_type": "absolute",
        _SECTION: {name: getattr(config, name) for name in _OURS},
    }


def _layer_types(flex: Mapping[str, Any]) -> tuple[list[str], int]:
    """The kind of each layer and HF's local_attention; -1 turns either of FlexBERT's two off."""
    window, period = flex.get("sliding_window", -1), flex.get("global_attn_every_n_layers", -1)
    depth = range(flex["num_hidden_layers"])
    if window <= 0:
        if period > 0:
            _refuse("global_attn_every_n_layers", "-1 without a sliding_window", period)
        return [FULL for _ in depth], 128
    if period <= 0:
        return [SLIDING for _ in depth], window
    return [SLIDING if i % period else FULL for i in depth], window


def _flex_layers(config: ModernBertConfig) -> tuple[int, int]:
    """FlexBERT's (global_attn_every_n_layers, sliding_window)."""
    depth, kinds, window = config.num_hidden_layers, config.layer_types, config.local_attention
    if set(kinds) == {FULL}:
        return -1, -1
    if window % 2:
        raise ValueError(f"local_attention: FlexBERT has even windows only, got {window}")
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


def _hf_dropouts(probability: float, output: float) -> tuple[float, float]:
    """HF's attention_dropout drops both at one rate; attention_out_dropout is ours."""
    if probability and probability != output:
        _refuse(
            "attention_probs_dropout_prob", f"0.0 or attn_out_dropout_prob ({output})", probability
        )
    return (probability, 0.0) if probability else (0.0, output)


def _flex_dropouts(config: ModernBertConfig) -> tuple[float, float]:
    both, output = config.attention_dropout, config.attention_out_dropout
    if both and output:
        raise ValueError(
            f"attention_out_dropout: FlexBERT drops the output once, got {output} beside "
            f"attention_dropout {both}"
        )
    return both, both or output


def _same(flex: Mapping[str, Any], name: str, other: str) -> bool:
    if flex.get(name, False) != flex.get(other, False):
        _refuse(name, f"the value of {other} ({flex.get(other, False)})", flex.get(name, False))
    return flex.get(name, False)


def _hf_activation(flex: Mapping[str, Any], name: str, default: str) -> str:
    value = flex.get(name, default)
    if value not in _ACTIVATIONS:
        _refuse(name, ", ".join(_ACTIVATIONS), value)
    return _ACTIVATIONS[value]


def _flex_activation(config: ModernBertConfig, name: str) -> str:
    return _FLEX_ACTIVATIONS[getattr(config, name)]


def _own_section(flex: Mapping[str, Any]) -> dict[str, Any]:
    section = flex.get(_SECTION)
    return {k: section[k] for k in _OURS if k in section} if isinstance(section, dict) else {}


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


# The whole checkpoint.


def model_of(checkpoint: Any) -> dict[str, np.ndarray]:
    """state -> model of a Composer checkpoint, under its own keys. Raises ValueError without it."""
    state = _child(checkpoint, "state")
    model = _child(state, "model")
    if not isinstance(model, dict) or not all(isinstance(v, np.ndarray) for v in model.values()):
        raise ValueError(
            "expected a Composer checkpoint, with the weights in state -> model; for a "
            "pytorch_model.bin use from-hf on its folder"
        )
    return model


def flex_config_of(checkpoint: Any) -> dict[str, Any] | None:
    """The FlexBertConfig inside a Composer checkpoint, or None."""
    config = checkpoint
    for name in ("state", "integrations", "huggingface", "model", "config", "content"):
        config = _child(config, name)
    return config if isinstance(config, dict) else None


def tokenizer_of(checkpoint: Any) -> dict[str, Any]:
    """The tokenizer's JSON files inside a Composer checkpoint: {name: content}.

    Set up as the official converter does: 8192 tokens, and the space before [MASK] belongs to it.
    """
    section = checkpoint
    for name in ("state", "integrations", "huggingface", "tokenizer"):
        section = _child(section, name)
    files = {}
    for name, file in section.items() if isinstance(section, dict) else ():
        if isinstance(file, dict) and file.get("file_extension") == ".json":
            files[name if name.endswith(".json") else f"{name}.json"] = file.get("content")
    for file in files.values():
        for token in _mask_tokens(file):
            token["lstrip"] = True
    settings = files.get("tokenizer_config.json")
    if isinstance(settings, dict):
        settings["model_max_length"] = 8192
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.pop("extra_special_tokens", None)
    return files


def _mask_tokens(file: Any) -> list[dict[str, Any]]:
    """Every entry for [MASK] in a tokenizer.json, tokenizer_config or special_tokens_map."""
    if not isinstance(file, dict):
        return []
    added = file.get("added_tokens_decoder")
    tokens = [
        file.get("mask_token"),
        *(file.get("added_tokens") or []),
        *(added.values() if isinstance(added, dict) else []),
    ]
    return [t for t in tokens if isinstance(t, dict) and t.get("content") == "[MASK]"]


def checkpoint_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Mapping[str, Any],
    optimizers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What Composer saves of a FlexBERT masked LM: HF's config and tensors under its names.

    A tied decoder.weight is put beside the embedding, as FlexBERT's state_dict has it.
    """
    tensors = dict(tensors)
    if config.get("tie_word_embeddings", True) and EMBEDDING in tensors:
        tensors[DECODER] = tensors[EMBEDDING]
    section = {
        "model": {
            "config": {
                "file_extension": ".json",
                "content": flex_config(config),
                "class": "src.bert_layers.model.FlexBertForMaskedLM",
            }
        },
        "tokenizer": {
            name: {"file_extension": ".json", "content": content}
            for name, content in tokenizer.items()
        },
    }
    state: dict[str, Any] = {"model": to_composer_keys(tensors)}
    if optimizers is not None:
        state["optimizers"] = optimizers
    return {"state": state | {"integrations": {"huggingface": section}}}


def _child(obj: Any, name: str) -> Any:
    return obj.get(name) if isinstance(obj, dict) else None


# The optimizer.

OPTIMIZER = "StableAdamW"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(checkpoint: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(step, exp_avg, exp_avg_sq) of StableAdamW, the moments under HF's keys.

    The state may be keyed by name or by number. Numbers follow the parameter groups: one group of
    all parameters, or two, norms and biases apart; either may come first. The step is in the state
    or in the group. Raises ValueError for another optimizer, a missing or doubtful entry.
    """
    optimizers = _child(_child(checkpoint, "state"), "optimizers")
    if not isinstance(optimizers, dict) or not optimizers:
        raise ValueError("the checkpoint holds no optimizer: leave out --optimizer")
    name, optimizer = next(iter(optimizers.items()))
    if len(optimizers) != 1 or name != OPTIMIZER:
        raise ValueError(
            f"optimizers: expected {OPTIMIZER}, got {', '.join(map(str, optimizers))}; the moments "
            "of others are scaled differently (leave out --optimizer)"
        )
    state, groups = _child(optimizer, "state"), _child(optimizer, "param_groups")
    if not isinstance(state, dict) or not state or not isinstance(groups, list):
        raise ValueError(f"optimizers[{name!r}]: expected state and param_groups, found neither")
    for key, entry in state.items():
        for moment in _MOMENTS:
            if not isinstance(_child(entry, moment), np.ndarray):
                raise ValueError(f"optimizers[{name!r}]: {key} has no {moment}")
    by_number = all(isinstance(key, int) for key in state)
    if not by_number and not all(isinstance(key, str) for key in state):
        raise ValueError(f"optimizers[{name!r}]: expected names or numbers as keys, got both")
    names = _number_names(checkpoint, state, groups) if by_number else {key: key for key in state}
    by_name = {names[key]: entry for key, entry in state.items()}
    entries = _drop_tied(to_hf_keys(by_name), checkpoint)
    mu, nu = ({key: entry[m] for key, entry in entries.items()} for m in _MOMENTS)
    return _step(state, groups), mu, nu


def _number_names(checkpoint: Any, state: dict, groups: list) -> dict[Any, str]:
    """Composer's name of each parameter number."""
    if not all(isinstance(_child(g, "params"), list) for g in groups):
        raise ValueError("optimizer groups: expected the list of their parameters")
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) != len(numbers) or set(numbers) != set(state):
        raise ValueError(
            f"optimizer: expected moments of the {len(numbers)} parameters in its groups, got "
            f"those of {len(state)}"
        )
    model = model_of(checkpoint)
    tied = model.get("model.decoder.weight")
    if tied is not None and _is_tied(checkpoint):
        model = {k: v for k, v in model.items() if k != "model.decoder.weight"}
    if all("param_names" in g for g in groups):
        named = [g["param_names"] for g in groups]
    elif len(groups) == 1:
        named = [list(model)]
    elif len(groups) == 2:
        small = [all(state[n]["exp_avg"].ndim <= 1 for n in g["params"]) for g in groups]
        large = [all(state[n]["exp_avg"].ndim > 1 for n in g["params"]) for g in groups]
        if sorted(small) != [False, True] or large != [not s for s in small]:
            raise ValueError(
                "optimizer groups: expected one of norms and biases and one of the other weights, "
                "got two that mix them: the numbers cannot be given names"
            )
        named = [[k for k, v in model.items() if (v.ndim <= 1) == s] for s in small]
    else:
        raise ValueError(f"optimizer groups: expected one or two, got {len(groups)}")
    names = {}
    for group, keys in zip(groups, named, strict=True):
        if len(group["params"]) != len(keys):
            raise ValueError(
                f"optimizer group: expected {len(keys)} parameters, got {len(group['params'])}"
            )
        names.update(zip(group["params"], keys, strict=True))
    return names


def _is_tied(checkpoint: Any) -> bool:
    return (flex_config_of(checkpoint) or {}).get("tie_word_embeddings", True)


def _drop_tied(entries: dict[str, Any], checkpoint: Any) -> dict[str, Any]:
    """One entry for the tied embedding, whichever of its two names it came under."""
    if _is_tied(checkpoint) and DECODER in entries:
        decoder = entries.pop(DECODER)
        if EMBEDDING in entries:
            raise ValueError(f"optimizer: {EMBEDDING} is set twice, also as the tied {DECODER}")
        entries[EMBEDDING] = decoder
    return entries


def _step(state: Mapping[Any, Any], groups: list) -> int:
    found = [entry["step"] for entry in (*state.values(), *groups) if "step" in entry]
    steps = {float(np.asarray(step).reshape(())) for step in found}
    if len(steps) != 1:
        raise ValueError(f"optimizer: expected one step, got {sorted(steps) or 'none'}")
    (step,) = steps
    if step != int(step) or step < 0:
        raise ValueError(f"optimizer: expected a whole number of steps, got {step}")
    return int(step)


def write_moments(
    step: int,
    mu: Mapping[str, np.ndarray],
    nu: Mapping[str, np.ndarray],
    *,
    lr: float,
    weight_decay: float,
) -> dict[str, Any]:
    """Composer's state -> optimizers for moments under HF's keys, keyed by name.

    lr and weight_decay: what the groups say; Composer's restart_override replaces them. The rest is
    the recipe's: betas (0.9, 0.98), eps 1e-6, no decay of norms and biases, whose group is first.
    """
    mu, nu = to_composer_keys(mu), to_composer_keys(nu)
    eps = 1e-6
    common = {
        "lr": lr,
        "initial_lr": lr,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": eps,
        "decouple_lr": True,
        "max_lr": lr,
        "kahan_sum": None,
        "foreach": True,
        "gradient_release": False,
        "setup": True,
        "step": np.asarray(step, np.int32),
    }
    groups = [
        {"params": [k for k, v in mu.items() if v.ndim <= 1], "weight_decay": 0.0},
        {"params": [k for k, v in mu.items() if v.ndim > 1], "weight_decay": weight_decay},
    ]
    state = {
        key: {
            "exp_avg": mu[key],
            "exp_avg_sq": nu[key],
            "eps_sq": np.asarray(eps**2, mu[key].dtype),
            "kahan_comp": None,
        }
        for key in mu
    }
    return {OPTIMIZER: {"state": state, "param_groups": [g | common for g in groups]}}
