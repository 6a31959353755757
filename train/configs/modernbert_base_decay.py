r"""ModernBERT-base, last of three runs: decay, 50 billion tokens of better sources, rows of 8192.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3 and A.4. The rate falls as 1 - sqrt over the whole run to 0.001 of its
peak; mask 0.30. The release is the mean of the three best checkpoints of this run and its last:

    python -m train pretrain --config modernbert_base_decay --corpus DIR \
        --init-from runs/modernbert_base_context/checkpoints/STEP
    python -m train average runs/modernbert_base_decay/checkpoints/{A,B,C,LAST} --out base/

Hardware: 8 H100. Hours there, published: 11.5, of which 7.5 training (231,000 tokens/s a GPU,
derived). Ours is not measured.
Expect: about 10,600 steps; a checkpoint every 500, all kept.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It shuffles with seed 2998.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The decay phase."""
    return recipe(
        ModernBertConfig.base(global_rope_theta=160_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-5,
        phases=(
            Phase(
                "decay",
                tokens=50_000_000_000,
                mlm_probability=0.30,
                learning_rate=3e-4,
                decay_tokens=50_000_000_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/modernbert_base_decay",
        init_from="./checkpoints/base_context",
        init_optimizer=True,
        seed=17,
        sequence_length=8192,
        global_batch_size=576,
        gradient_accumulation_steps=6,  # 12 rows on each of 8 devices
        eval_every=500,
        checkpoint_every=500,
        keep_checkpoints=30,
    )
