r"""ModernBERT-base, second of three runs: context extension, 250 billion tokens in rows of 8192.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. The global RoPE theta goes from 10,000 to 160,000 at once; constant rate,
no warm-up; mask 0.30; the Adam moments of the first run go on.

    python -m train pretrain --config modernbert_base_context --corpus DIR \
        --init-from runs/modernbert_base_pretrain/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 39.9, of which 36.3 training (239,000 tokens/s a GPU,
derived). Ours is not measured.
Expect: about 52,980 steps (the published checkpoint is of step 52,988).

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It shuffles with seed 2998.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The context extension."""
    return recipe(
        ModernBertConfig.base(global_rope_theta=160_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-5,
        phases=(
            Phase("context", tokens=250_000_000_000, mlm_probability=0.30, learning_rate=3e-4),
        ),
        workdir="runs/modernbert_base_context",
        init_from="./checkpoints/base_pretrain",
        init_optimizer=True,
        global_rope_theta=160_000.0,
        seed=17,
        sequence_length=8192,
        global_batch_size=576,
        gradient_accumulation_steps=6,  # 12 rows on each of 8 devices
        eval_fraction=0.0005,
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=3,
    )
