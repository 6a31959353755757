r"""ModernBERT-large, last of three runs: decay, 50 billion tokens of better sources, rows of 8192.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3 and A.4. The rate falls as 1 - sqrt over the whole run to 0.001 of its
peak; mask 0.30. The release is the best checkpoint of this run; averaging did not help.

    python -m train pretrain --config modernbert_large_decay --corpus DIR \
        --init-from runs/modernbert_large_context/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 21.7, of which 15.3 training (113,000 tokens/s a GPU,
derived). Ours is not measured; on a v5e-16 with --mesh.fsdp 16.
Expect: about 9,780 steps; a checkpoint every 500, all kept.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4. It shuffles with seed 2998.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The decay phase."""
    return recipe(
        ModernBertConfig.large(global_rope_theta=160_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-6,
        phases=(
            Phase(
                "decay",
                tokens=50_000_000_000,
                mlm_probability=0.30,
                learning_rate=5e-5,
                decay_tokens=50_000_000_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/modernbert_large_decay",
        init_from="./checkpoints/large_context",
        init_optimizer=True,
        seed=314,
        sequence_length=8192,
        global_batch_size=624,
        gradient_accumulation_steps=13,  # 6 rows on each of 8 devices
        eval_every=500,
        checkpoint_every=500,
        keep_checkpoints=30,
    )
