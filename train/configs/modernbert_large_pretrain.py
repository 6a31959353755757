"""ModernBERT-large, first of three runs: 1.719 trillion tokens in sequences of 1024.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. The learning rate warms up over 2 billion tokens; the batch size rises
from 448 to 4,928 sequences over the first 10 billion; both RoPE thetas are 10,000; 30 % of the
tokens are masked.

The published run was rolled back: its loss stopped falling, so it returned to its state after about
900 billion tokens at 5e-4 and trained about 800 billion more at 5e-5. Here these are two phases of
900 and 819 billion tokens, which is the published total; what was rolled back is left out.
The weight decay fell from 1e-5 to 1e-6 with the learning rate. One max_learning_rate of 5e-4 does
both, because the decay of a step is lr / max_learning_rate x 1e-5.

    python -m train pretrain --config modernbert_large_pretrain --corpus DIR

Then run modernbert_large_context and modernbert_large_decay (modernbert_base_pretrain shows how).

Hardware: 8 H100. Hours there, published: 425.3, including 420.4 of training (142,000 tokens/s per
GPU, derived). Ours is not measured.

Expect: about 342,000 steps. No masked-LM accuracy on a validation split is published.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens.
"""

import dataclasses

from ..pretrain.config import Phase, TrainConfig
from . import modernbert_base_pretrain
from ._recipe import large


def get_config() -> TrainConfig:
    """The pretraining phase, before and after the roll-back."""
    config = modernbert_base_pretrain.get_config()
    before = dataclasses.replace(
        config.phases[0],
        tokens=900_000_000_000,
        learning_rate=5e-4,
        warmup_tokens=2_000_000_000,
        batch_size_warmup_start=448,
        batch_size_warmup_tokens=10_000_000_000,
    )
    after = Phase("rolled_back", tokens=819_000_000_000, mlm_probability=0.30, learning_rate=5e-5)
    return large(
        config,
        optimizer=dataclasses.replace(config.optimizer, max_learning_rate=5e-4),
        phases=(before, after),
        workdir="runs/modernbert_large_pretrain",
        global_batch_size=4928,
        gradient_accumulation_steps=11,  # 56 sequences on each of 8 devices
    )
