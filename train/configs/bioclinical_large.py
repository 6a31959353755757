r"""BioClinical ModernBERT-large: two phases of continued pretraining from ModernBERT-large.

Source: as for bioclinical_base. Phase 1: PubMed, PMC and 20 clinical corpora (53.5 billion tokens,
3 epochs) at a constant learning rate, masking 30 % of the tokens. Phase 2: the clinical corpora
alone, masking 15 %: two epochs at a constant learning rate; in the third (2,749,112,000 tokens) it
decays as 1 - sqrt.

    python -m convert from-composer ep0-ba49552-rank0.pt checkpoints/large_context --optimizer
    python -m train pretrain --config bioclinical_large --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus CLINICAL

Hardware: the reference used 8 H100 SXM. Hours there: about 51, derived from ModernBERT's published
throughput for sequences of 8192 (116,000 tokens/s per GPU). Ours is not measured on 8 H100 or a
v5e-16 (there with --mesh.fsdp 16); `python -m train plan` reports what fits, and what is lost when
the devices do not divide a micro-batch of 56 sequences.

Expect: about 31,796 and 1,634 steps; the learning rate decays in the last 545. After fine-tuning,
the model card reports ChemProt 90.8, Phenotype 60.8, COS 95.1, SocialHistory 57.1 and DEID 83.8.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4 (the decay of a step is then 1e-7 at 5e-5,
and 1e-6 here), and `prepare --space-before-chunks`. It evaluates and saves every 3,000 steps in
phase 1, every 150 in phase 2.
"""

import dataclasses

from ..pretrain.config import TrainConfig
from . import bioclinical_base
from ._recipe import large


def get_config() -> TrainConfig:
    """Both phases as published."""
    config = large(
        bioclinical_base.get_config(),
        workdir="runs/bioclinical_large",
        init_from="./checkpoints/large_context",
    )
    phase1, phase2 = config.phases
    phase2 = dataclasses.replace(phase2, decay_tokens=2_749_112_000)
    return dataclasses.replace(config, phases=(phase1, phase2))
