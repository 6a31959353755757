r"""ModernBERT-base, second of three runs: context extension to 8192 tokens, 250 billion tokens.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. The global RoPE theta changes from 10,000 to 160,000 at once; the
learning rate is constant, without warm-up; 30 % of the tokens are masked; the Adam moments of the
first run are kept.

    python -m train pretrain --config modernbert_base_context --corpus DIR \
        --init-from runs/modernbert_base_pretrain/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 39.9, including 36.3 of training (239,000 tokens/s per
GPU, derived). Ours is not measured.

Expect: about 52,980 steps (the published checkpoint is from step 52,988).

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It shuffles with seed 2998.
"""

import dataclasses

from ..pretrain.config import Phase, TrainConfig
from . import modernbert_base_pretrain


def get_config() -> TrainConfig:
    """The context extension."""
    config = modernbert_base_pretrain.get_config()
    phase = Phase("context", tokens=250_000_000_000, mlm_probability=0.30, learning_rate=3e-4)
    return dataclasses.replace(
        config,
        model=config.model.replace(global_rope_theta=160_000.0),
        phases=(phase,),
        workdir="runs/modernbert_base_context",
        init_from="./checkpoints/base_pretrain",
        tokenizer=None,  # that of the checkpoint
        init_optimizer=True,
        global_rope_theta=160_000.0,
        sequence_length=8192,
        global_batch_size=576,
        gradient_accumulation_steps=6,  # 12 sequences on each of 8 devices
        eval_fraction=0.0005,
        eval_sequences=128,
        checkpoint_every=1000,
    )
