"""What the recipes share."""

import dataclasses
from typing import Any

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Optimizer, TrainConfig


def recipe(model: ModernBertConfig, weight_decay: float, **fields: Any) -> TrainConfig:
    """The settings that all runs of ModernBERT and BioClinical ModernBERT share.

    `fields` are the settings of one run. Computation is in bfloat16, weights are stored in float32;
    dropout is 0.1 on the attention output and 0 elsewhere; the optimizer is StableAdamW with betas
    (0.9, 0.98) and eps 1e-6, without weight decay on norms and biases; evaluation masks 15 % of the
    tokens. eval_fraction, remat and scan_layers are our choices: the recipes publish no validation
    split, and rematerialization saves memory. save_attention does not run the attention kernel
    twice, for 13 MB per sequence of 8192 tokens and layer of the base model; with six sequences per
    device the step of base takes 12.5 of a v5e's 15.8 GiB. save_dots_and_attention needs fewer
    sequences per device; `python -m train plan --search` finds how many.
    Source: the training configurations of AnswerDotAI/ModernBERT (branch
    pretraining_documentation) and arXiv 2412.13663, table 3.
    """
    model = model.replace(dtype="bfloat16", param_dtype="float32", attention_out_dropout=0.1)
    optimizer = Optimizer(b1=0.9, b2=0.98, eps=1e-6, weight_decay=weight_decay)
    settings: dict[str, Any] = {
        # That of the checkpoint; large uses the same one as base.
        "tokenizer": None if fields.get("init_from") else "answerdotai/ModernBERT-base",
        "eval_mlm_probability": 0.15,
        "eval_fraction": 0.005,
        "synthetic_notes": 0,
        "scan_layers": True,
        "remat": "save_attention",
        "log_every": 10,
    }
    return TrainConfig(model=model, optimizer=optimizer, **(settings | fields))


def large(base: TrainConfig, **changes: Any) -> TrainConfig:
    """The large model's version of a base recipe with sequences of 8192 tokens.

    `changes` override fields as `dataclasses.replace` does. The large model trains with a learning
    rate of 5e-5, a weight decay of 1e-6 and steps of 616 sequences, 7 at a time on each of 8 GPUs.
    """
    size = ModernBertConfig.large()
    dimensions = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings: dict[str, Any] = {
        "model": base.model.replace(**{name: getattr(size, name) for name in dimensions}),
        "optimizer": dataclasses.replace(base.optimizer, weight_decay=1e-6),
        "phases": tuple(dataclasses.replace(p, learning_rate=5e-5) for p in base.phases),
        "seed": 314,
        "global_batch_size": 616,
        "gradient_accumulation_steps": 11,
    }
    return dataclasses.replace(base, **(settings | changes))
