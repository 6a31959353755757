"""Small models of many shapes, made by transformers; shared by the parity tests."""

import numpy as np
import pytest

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "local_attention": 16,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "cls_token_id": 0,
    "eos_token_id": 1,
    "sep_token_id": 1,
}
BIASES = {
    "attention_bias": True,
    "mlp_bias": True,
    "norm_bias": True,
    "classifier_bias": True,
}

# name -> (changes to BASE, L)
CASES = {
    "plain": ({}, 40),
    "mean_pooling": ({"classifier_pooling": "mean"}, 33),
    "biases": ({**BIASES, "num_labels": 5}, 40),
    "one_head": ({"num_attention_heads": 1}, 21),
    "wide_window": ({"local_attention": 128}, 50),
    "narrow_window": ({"local_attention": 2}, 57),
    "odd_window": ({"local_attention": 7}, 57),
    "long": ({"local_attention": 16, "num_hidden_layers": 4}, 201),
    "one_token": ({}, 1),
    "every_second": ({"global_attn_every_n_layers": 2, "num_hidden_layers": 5}, 35),
    "all_global": ({"global_attn_every_n_layers": 1, "num_hidden_layers": 3}, 30),
    "custom_layers": (
        {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_hidden_layers": 3,
        },
        45,
    ),
    "thetas": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            }
        },
        45,
    ),
    "silu_tanh": ({"hidden_activation": "silu", "classifier_activation": "gelu_new"}, 30),
    "untied": ({"tie_word_embeddings": False, "decoder_bias": False}, 30),
    "no_pad_id": ({"pad_token_id": None, "norm_eps": 1e-3}, 30),
}
QUICK = ("plain", "biases", "long", "custom_layers", "untied")


def hf_config(changes=None):
    """transformers' config of a case."""
    import transformers

    return transformers.ModernBertConfig(**{**BASE, **(changes or {})})


def hf_model(head: str, changes=None, seed: int = 0):
    """transformers' model, every weight random (biases and norms too), in eval mode.

    The calling test skips where torch is absent: on the second version pair.
    """
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    return randomized(getattr(transformers, head)(hf_config(changes)))


def randomized(model):
    """A model of transformers in eval mode, its biases and norms random and its matrices larger."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                p.mul_(3.0)
    return model.eval()


def inputs(length: int, rows: int = 3, padding: str | None = None, seed: int = 0):
    """(input_ids, attention_mask) with rows of different lengths when padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, BASE["vocab_size"], (rows, length))
    mask = np.ones((rows, length), np.int64)
    for row in range(1, rows) if padding else ():
        cut = max(1, length - rng.integers(1, max(2, length // 2)))
        if padding == "right":
            mask[row, cut:] = 0
        else:
            mask[row, : length - cut] = 0
    return np.where(mask == 1, ids, BASE["pad_token_id"]), mask


def relative_error(ours, reference, where=None) -> float:
    """Largest difference over the reference's largest value, where `where` (over [B, L]) is 1."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    difference = np.abs(ours - reference)
    if where is not None:
        difference, reference = difference[where == 1], reference[where == 1]
    return float(difference.max() / np.abs(reference).max())
