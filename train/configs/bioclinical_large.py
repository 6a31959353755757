r"""BioClinical ModernBERT-large: two phases of continued pretraining from ModernBERT-large.

Source: as bioclinical_base. Phase 1: PubMed, PMC and 20 clinical corpora (53.5 billion tokens, 3
epochs), constant rate, mask 0.30. Phase 2: the clinical corpora alone, mask 0.15, two epochs at a
constant rate and the third (2,749,112,000 tokens) falling as 1 - sqrt.

    python -m convert from-composer ep0-ba49552-rank0.pt checkpoints/large_context --optimizer
    python -m train pretrain --config bioclinical_large --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus CLINICAL

Hardware: 8 H100 SXM in the reference. Hours there: about 51, derived from ModernBERT's published
rate for rows of 8192 (116,000 tokens/s a GPU). Ours is not measured on 8 H100 or a v5e-16 (there
with --mesh.fsdp 16); `python -m train plan` says what fits, and what is lost where devices do not
divide a micro-batch of 56 rows.
Expect: about 31,796 and 1,634 steps, the last 545 of them decaying. After fine-tuning the card
gives ChemProt 90.8, Phenotype 60.8, COS 95.1, SocialHistory 57.1 and DEID 83.8.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4 (a step's decay is then 1e-7 at 5e-5,
where here it is 1e-6). It evaluates and saves every 3,000 steps in phase 1, every 150 in phase 2.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """Both phases as published."""
    return recipe(
        ModernBertConfig.large(),
        weight_decay=1e-6,
        phases=(
            Phase("phase1_all", tokens=160_453_000_000, mlm_probability=0.30, learning_rate=5e-5),
            Phase(
                "phase2_clinical",
                tokens=8_247_337_000,
                mlm_probability=0.15,
                learning_rate=5e-5,
                decay_tokens=2_749_112_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/bioclinical_large",
        init_from="./checkpoints/large_context",
        init_optimizer=True,
        seed=314,
        sequence_length=8192,
        global_batch_size=616,
        gradient_accumulation_steps=11,  # 7 rows on each of 8 devices
        eval_every=200,
        checkpoint_every=500,
    )
