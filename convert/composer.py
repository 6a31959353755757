"""Composer's checkpoints of FlexBERT, the form in which ModernBERT was trained, as dictionaries.

A checkpoint is {"state": {"model", "optimizers", "integrations", ...}, "rng": ...}. This file maps
the names of the weights and finds the parts; `flexbert` maps the configuration, `moments` the
optimizer. Source: AnswerDotAI/ModernBERT (main.py, convert_to_hf.py) and mosaicml/composer
(core/state.py, models/huggingface.py).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modernbert_jax.config import ModernBertConfig
from modernbert_jax.untrusted import printable
from modernbert_jax.weights import DECODER, EMBEDDING, WEIGHTS, find_weight, weight_of

from .flexbert import flex_config

# Names.


def to_hf_keys(by_composer_key: Mapping[str, Any]) -> dict[str, Any]:
    """Renames Composer's keys to Hugging Face's. Raises ValueError that lists unknown keys."""
    return _rename(by_composer_key, _hf_key, "a FlexBERT masked LM")


def to_composer_keys(by_hf_key: Mapping[str, Any]) -> dict[str, Any]:
    """Renames Hugging Face's keys to Composer's, in the order in which FlexBERT registers them.

    Raises ValueError that lists unknown keys.
    """
    _rename(by_hf_key, _composer_key, "Composer, which holds masked LMs only")  # refuses first
    return {_composer_key(key): by_hf_key[key] for key in sorted(by_hf_key, key=_registration)}


def _composer_key(hf_key: str) -> str:
    """The key of the same weight in Composer, or "" if a FlexBERT masked LM has no such weight."""
    if find_weight(hf_key) is None or not hf_key.startswith(("model.", "head.", "decoder.")):
        return ""
    if hf_key.startswith("model."):
        hf_key = "bert." + hf_key.removeprefix("model.").replace("layers.", "encoder.layers.", 1)
    return "model." + hf_key


def _hf_key(composer_key: str) -> str:
    key = composer_key.removeprefix("model.")
    if key.startswith("bert."):
        key = "model." + key.removeprefix("bert.").removeprefix("encoder.")
    return key if _composer_key(key) == composer_key else ""


def _rename(keys: Mapping[str, Any], rename: Callable[[str], str], what: str) -> dict[str, Any]:
    unknown = [key for key in keys if not rename(key)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"unknown keys for {what}: {printable(', '.join(unknown[:3]))}{more}")
    return {rename(key): value for key, value in keys.items()}


def _registration(hf_key: str) -> tuple[int, int, int]:
    """Sorts keys in the order of WEIGHTS, layer by layer."""
    index = WEIGHTS.index(weight_of(hf_key))
    layer = re.search(r"\.layers\.(\d+)\.", hf_key)
    if layer is None:
        return index, 0, index
    first = next(i for i, row in enumerate(WEIGHTS) if ".layers." in row.name)
    return first, int(layer[1]), index


# The parts of a checkpoint.


def child(obj: Any, *names: str) -> Any:
    """Returns obj[a][b]... for the names, or None if a step does not exist."""
    for name in names:
        obj = obj.get(name) if isinstance(obj, dict) else None
    return obj


def model_of(checkpoint: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a Composer checkpoint under its own keys; ValueError without them."""
    model = child(checkpoint, "state", "model")
    if not isinstance(model, dict) or not all(isinstance(v, np.ndarray) for v in model.values()):
        raise ValueError(
            "expected a Composer checkpoint, with the weights in state -> model; for a "
            "pytorch_model.bin use from-hf on its folder"
        )
    return model


def flex_config_of(checkpoint: Any) -> dict[str, Any] | None:
    """Returns the FlexBertConfig inside a Composer checkpoint, or None."""
    path = ("state", "integrations", "huggingface", "model", "config", "content")
    config = child(checkpoint, *path)
    return config if isinstance(config, dict) else None


def is_tied(checkpoint: Any) -> bool:
    """Returns whether the decoder of a Composer checkpoint is its embedding."""
    return (flex_config_of(checkpoint) or {}).get("tie_word_embeddings", True)


def tokenizer_of(checkpoint: Any) -> dict[str, Any]:
    """Returns the tokenizer's JSON files inside a Composer checkpoint: {name: content}.

    They are set up as the official converter does: 8192 tokens, and [MASK] includes the space
    before it.
    """
    section = child(checkpoint, "state", "integrations", "huggingface", "tokenizer")
    files = {}
    for name, file in section.items() if isinstance(section, dict) else ():
        if child(file, "file_extension") == ".json":
            files[f"{name.removesuffix('.json')}.json"] = file.get("content")
    for file in files.values():
        added = child(file, "added_tokens_decoder")
        tokens = [
            child(file, "mask_token"),
            *(child(file, "added_tokens") or []),
            *(added.values() if isinstance(added, dict) else []),
        ]
        for token in tokens:
            if child(token, "content") == "[MASK]":
                token["lstrip"] = True
    settings = files.get("tokenizer_config.json")
    if isinstance(settings, dict):
        settings["model_max_length"] = 8192
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.pop("extra_special_tokens", None)
    return files


def checkpoint_of(
    config: ModernBertConfig,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Mapping[str, Any],
    optimizers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what Composer saves of a FlexBERT masked LM with these Hugging Face tensors.

    A tied decoder.weight is added, because FlexBERT's state_dict has it beside the embedding.
    """
    if config.tie_word_embeddings and EMBEDDING in tensors:
        tensors = {**tensors, DECODER: tensors[EMBEDDING]}
    model = {
        "file_extension": ".json",
        "content": flex_config(config),
        "class": "src.bert_layers.model.FlexBertForMaskedLM",
    }
    files = {
        name: {"file_extension": ".json", "content": content} for name, content in tokenizer.items()
    }
    state: dict[str, Any] = {"model": to_composer_keys(tensors)}
    if optimizers is not None:
        state["optimizers"] = optimizers
    state["integrations"] = {"huggingface": {"model": {"config": model}, "tokenizer": files}}
    return {"state": state}
