r"""ModernBERT-base, first of three runs: 1.719 trillion tokens in rows of 1024, from fresh weights.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. Warm-up of the rate over 3 billion tokens, then constant; the rows of a
step rise from 768 to 4,608 over the first 50 billion tokens; both RoPE thetas 10,000; mask 0.30.
The mixture (web, code, science) is not published.

    python -m train pretrain --config modernbert_base_pretrain --corpus DIR
    python -m train pretrain --config modernbert_base_context --corpus DIR \
        --init-from runs/modernbert_base_pretrain/checkpoints/STEP
    python -m train pretrain --config modernbert_base_decay --corpus DIR \
        --init-from runs/modernbert_base_context/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 194.2, of which 191.1 training (312,000 tokens/s a GPU,
derived). Ours is not measured.
Expect: about 372,000 steps, some 7,600 more than without the warm-up of the rows. No held-out
masked accuracy is published.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens. Its warm-up of the rows counts each GPU's tokens by itself, ours those of
all; neither counts padding.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The pretraining phase."""
    return recipe(
        ModernBertConfig.base(global_rope_theta=10_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-5,
        phases=(
            Phase(
                "pretrain",
                tokens=1_719_000_000_000,
                mlm_probability=0.30,
                learning_rate=8e-4,
                warmup_tokens=3_000_000_000,
                batch_size_warmup_start=768,
                batch_size_warmup_tokens=50_000_000_000,
            ),
        ),
        workdir="runs/modernbert_base_pretrain",
        seed=17,
        sequence_length=1024,
        global_batch_size=4608,
        gradient_accumulation_steps=6,  # 96 rows on each of 8 devices
        eval_fraction=0.0001,
        eval_sequences=1024,
        eval_every=1000,
        checkpoint_every=2000,
        keep_checkpoints=3,
    )
