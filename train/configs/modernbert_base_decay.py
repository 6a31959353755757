r"""ModernBERT-base, last of three runs: decay on 50 billion tokens of better sources.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3 and A.4. Sequences have 8192 tokens; the learning rate decays as 1 - sqrt
over the whole run to 0.001 of its peak; 30 % of the tokens are masked. The released weights are the
mean of the three best checkpoints of this run and its last one:

    python -m train pretrain --config modernbert_base_decay --corpus DIR \
        --init-from runs/modernbert_base_context/checkpoints/STEP
    python -m train average runs/modernbert_base_decay/checkpoints/{A,B,C,LAST} --out base/

Hardware: 8 H100. Hours there, published: 11.5, including 7.5 of training (231,000 tokens/s per GPU,
derived). Ours is not measured.

Expect: about 10,600 steps; a checkpoint is saved every 500 steps and none is deleted.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It shuffles with seed 2998.
"""

import dataclasses

from ..pretrain.config import Phase, TrainConfig
from . import modernbert_base_context


def get_config() -> TrainConfig:
    """The decay phase."""
    phase = Phase(
        "decay",
        tokens=50_000_000_000,
        mlm_probability=0.30,
        learning_rate=3e-4,
        decay_tokens=50_000_000_000,
        decay="one_minus_sqrt",
        final_lr_ratio=0.001,
    )
    return dataclasses.replace(
        modernbert_base_context.get_config(),
        phases=(phase,),
        workdir="runs/modernbert_base_decay",
        init_from="./checkpoints/base_context",
        tokenizer=None,  # that of the checkpoint
        global_rope_theta=None,  # as in the checkpoint
        eval_fraction=0.005,
        eval_every=500,
        checkpoint_every=500,
        keep_checkpoints=30,
    )
