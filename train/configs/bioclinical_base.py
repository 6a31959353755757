r"""BioClinical ModernBERT-base: two phases of continued pretraining from ModernBERT-base.

Source: the training configurations of lindvalllab/BioClinical-ModernBERT and the model card of
thomas-sounack/BioClinical-ModernBERT-large. Phase 1: PubMed, PMC and 20 clinical corpora (53.5
billion tokens, 3 epochs), constant rate, mask 0.30. Phase 2: the clinical corpora alone (2.75
billion tokens, 3 epochs), mask 0.15, the rate falling as 1 - sqrt over the whole phase.

Start: the last checkpoint of ModernBERT-base's context extension, before its decay, with its Adam
moments; --no-init-optimizer starts from weights alone (then --init-from may be an HF folder).

    python -m convert from-composer ep0-ba52988-rank0.pt checkpoints/base_context --optimizer
    python -m train pretrain --config bioclinical_base --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus CLINICAL

Hardware: 8 H100 SXM in the reference. Hours there: about 24.5, derived from ModernBERT's published
rate for rows of 8192 (239,000 tokens/s a GPU), not from a published figure of this run. Ours is not
measured on 8 H100 or a v5e-16. `python -m train plan --config bioclinical_base --topology v5e:4x4`
says what fits and how fast it could be.
Expect: about 34,004 and 1,748 steps (tokens over rows x 8192; each percent of padding adds one).
After fine-tuning the card gives ChemProt 89.9, Phenotype 58.1, COS 95.1, SocialHistory 58.5 and
DEID 82.7. No held-out masked accuracy is published.

Where the reference is quirky the default here is the clean behaviour; what turns each quirk on:

    --loss-weighting sequences           its trainer weights the mean loss of each micro-batch by
                                         the number of its sequences, not of its masked tokens
    --mask-special-tokens                its packed training masks [CLS] and [SEP] as any token
    --optimizer.max-learning-rate 8e-4   weight decay is lr / max_lr x wd, and its max_lr probably
                                         stayed that of the pretraining checkpoint: a step's decay
                                         is then 3.75e-6 at 3e-4, where here it is 1e-5

One seed (17) serves masks, order and dropout here; the reference shuffles with 2998, and its order
cannot be had again. It evaluates and saves every 3,000 steps in phase 1; in phase 2 it evaluates
every 40 and saves every 160.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """Both phases as published."""
    return recipe(
        ModernBertConfig.base(),
        weight_decay=1e-5,
        phases=(
            Phase("phase1_all", tokens=160_453_000_000, mlm_probability=0.30, learning_rate=3e-4),
            Phase(
                "phase2_clinical",
                tokens=8_247_337_000,
                mlm_probability=0.15,
                learning_rate=3e-4,
                decay_tokens=8_247_337_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/bioclinical_base",
        init_from="./checkpoints/base_context",
        init_optimizer=True,
        seed=17,
        sequence_length=8192,
        global_batch_size=576,
        gradient_accumulation_steps=6,  # 12 rows on each of 8 devices
        eval_every=200,
        checkpoint_every=500,
    )
