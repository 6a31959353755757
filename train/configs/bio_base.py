r"""Bio ModernBERT-base: the second phase on PubMed and PMC in place of the clinical corpora.

Source: the training configurations of lindvalllab/BioClinical-ModernBERT (phase2_bio). Phase 1 is
bioclinical_base's. Phase 2: PubMed and PMC (50.7 billion tokens, 1 epoch), mask 0.15, the rate
falling as 1 - sqrt over the whole phase.

    python -m convert from-composer ep0-ba52988-rank0.pt checkpoints/base_context --optimizer
    python -m train pretrain --config bio_base --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus BIOMEDICAL

Hardware: 8 H100 SXM in the reference. Hours there: about 31, derived from ModernBERT's published
rates for rows of 8192 (239,000 tokens/s a GPU, 231,000 while decaying). Ours is not measured.
Expect: about 34,004 and 10,752 steps. No scores are published beside the weights.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It evaluates and saves every 3,000 steps
in phase 1, every 1,000 in phase 2.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """Phase 1 and the Bio variant of phase 2, as published."""
    return recipe(
        ModernBertConfig.base(),
        weight_decay=1e-5,
        phases=(
            Phase("phase1_all", tokens=160_453_000_000, mlm_probability=0.30, learning_rate=3e-4),
            Phase(
                "phase2_bio",
                tokens=50_735_000_000,
                mlm_probability=0.15,
                learning_rate=3e-4,
                decay_tokens=50_735_000_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/bio_base",
        init_from="./checkpoints/base_context",
        init_optimizer=True,
        seed=17,
        sequence_length=8192,
        global_batch_size=576,
        gradient_accumulation_steps=6,  # 12 rows on each of 8 devices
        eval_every=500,
        checkpoint_every=500,
    )
