r"""Bio ModernBERT-base: phase 2 trains on PubMed and PMC instead of the clinical corpora.

Source: the training configurations of lindvalllab/BioClinical-ModernBERT (phase2_bio). Phase 1 is
that of bioclinical_base. Phase 2: PubMed and PMC (50.7 billion tokens, 1 epoch), masking 15 % of
the tokens; the learning rate decays as 1 - sqrt over the whole phase.

    python -m convert from-composer ep0-ba52988-rank0.pt checkpoints/base_context --optimizer
    python -m train pretrain --config bio_base --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus BIOMEDICAL

Hardware: the reference used 8 H100 SXM. Hours there: about 31, derived from ModernBERT's published
throughput for sequences of 8192 (239,000 tokens/s per GPU, 231,000 in the decay phase). Ours is not
measured.

Expect: about 34,004 and 10,752 steps. No scores are published with the weights.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 8e-4. It evaluates and saves every 3,000 steps
in phase 1, every 1,000 in phase 2.
"""

import dataclasses

from ..pretrain.config import TrainConfig
from . import bioclinical_base


def get_config() -> TrainConfig:
    """Phase 1 and the Bio variant of phase 2, as published."""
    config = bioclinical_base.get_config()
    phase1, phase2 = config.phases
    budget = 50_735_000_000
    phase2 = dataclasses.replace(phase2, name="phase2_bio", tokens=budget, decay_tokens=budget)
    return dataclasses.replace(
        config, phases=(phase1, phase2), workdir="runs/bio_base", eval_every=500
    )
