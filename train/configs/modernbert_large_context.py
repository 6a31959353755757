r"""ModernBERT-large, second of three runs: context extension, 250 billion tokens in rows of 8192.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. The global RoPE theta goes from 10,000 to 160,000 at once; constant rate,
no warm-up; mask 0.30; the Adam moments of the first run go on.

    python -m train pretrain --config modernbert_large_context --corpus DIR \
        --init-from runs/modernbert_large_pretrain/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 80.7, of which 75.1 training (116,000 tokens/s a GPU,
derived). Ours is not measured; on a v5e-16 with --mesh.fsdp 16.
Expect: about 49,540 steps (the published checkpoint is of step 49,552).

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4. It shuffles with seed 2998.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The context extension."""
    return recipe(
        ModernBertConfig.large(global_rope_theta=160_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-6,
        phases=(
            Phase("context", tokens=250_000_000_000, mlm_probability=0.30, learning_rate=5e-5),
        ),
        workdir="runs/modernbert_large_context",
        init_from="./checkpoints/large_pretrain",
        init_optimizer=True,
        global_rope_theta=160_000.0,
        seed=314,
        sequence_length=8192,
        global_batch_size=616,
        gradient_accumulation_steps=11,  # 7 rows on each of 8 devices
        eval_fraction=0.0005,
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=3,
    )
