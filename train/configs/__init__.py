"""Experiments: each file has get_config() and says source, command, hardware and numbers."""

from typing import Any

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Optimizer, TrainConfig


def recipe(model: ModernBertConfig, weight_decay: float, **fields: Any) -> TrainConfig:
    """What all of ModernBERT's and BioClinical ModernBERT's runs share; `fields` are a run's own.

    bf16 computes, float32 stores; dropout 0.1 on the attention's output and nowhere else;
    StableAdamW (0.9, 0.98), eps 1e-6, no decay of norms and biases; evaluation at mask 0.15.
    eval_fraction, remat and scan_layers are ours, for want of a held-out split and of memory;
    `python -m train plan` says whether --remat none fits.
    Source: the training configurations of AnswerDotAI/ModernBERT (branch
    pretraining_documentation) and arXiv 2412.13663, table 3.
    """
    model = model.replace(dtype="bfloat16", param_dtype="float32", attention_out_dropout=0.1)
    optimizer = Optimizer(b1=0.9, b2=0.98, eps=1e-6, weight_decay=weight_decay)
    settings: dict[str, Any] = {
        "tokenizer": "answerdotai/ModernBERT-base",  # large has the same
        "eval_mlm_probability": 0.15,
        "eval_fraction": 0.005,
        "synthetic_notes": 0,
        "scan_layers": True,
        "remat": "layers",
        "log_every": 10,
    }
    return TrainConfig(model=model, optimizer=optimizer, **(settings | fields))
