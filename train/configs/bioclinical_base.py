r"""BioClinical ModernBERT-base: two phases of continued pretraining from ModernBERT-base.

Source: the training configurations of lindvalllab/BioClinical-ModernBERT and the model card of
thomas-sounack/BioClinical-ModernBERT-large. Phase 1: PubMed, PMC and 20 clinical corpora (53.5
billion tokens, 3 epochs) at a constant learning rate, masking 30 % of the tokens. Phase 2: the
clinical corpora alone (2.75 billion tokens, 3 epochs), masking 15 %; the learning rate decays as
1 - sqrt over the whole phase.

Start: the last checkpoint of ModernBERT-base's context extension, before its decay, with its Adam
moments. With --no-init-optimizer the run starts from the weights alone, and --init-from may be a
Hugging Face folder.

    python -m convert from-composer ep0-ba52988-rank0.pt checkpoints/base_context --optimizer
    python -m train pretrain --config bioclinical_base --phases.0.corpus BIOMEDICAL CLINICAL \
        --phases.1.corpus CLINICAL

Hardware: the reference used 8 H100 SXM. Hours there: about 24.5, derived from ModernBERT's
published throughput for sequences of 8192 (239,000 tokens/s per GPU), not from a published figure
for this run. Ours is not measured on 8 H100 or a v5e-16; `python -m train plan --config
bioclinical_base --topology v5e:4x4` reports what fits and a lower bound on the time.

Expect: about 34,004 and 1,748 steps (tokens / (sequences x 8192); each percent of padding adds one
percent). After fine-tuning, the model card reports ChemProt 89.9, Phenotype 58.1, COS 95.1,
SocialHistory 58.5 and DEID 82.7. No masked-LM accuracy on a validation split is published.

Where the reference has a quirk, the default here is the clean behavior. These flags reproduce it:

    --loss-weighting sequences           its trainer weights the mean loss of each micro-batch by
                                         the number of sequences, not of masked tokens
    --mask-special-tokens                its packed training masks [CLS] and [SEP] like any token
    --optimizer.max-learning-rate 8e-4   its weight decay is lr / max_lr x wd, and max_lr probably
                                         remained that of the pretraining checkpoint: the decay of
                                         a step is then 3.75e-6 at 3e-4, and 1e-5 here

Another one is in the data: the first token of every chunk is encoded again as a space and its text,
so that most documents begin with two spaces, and a chunk may have 8,193 tokens, of which the loader
drops the last. `python -m train prepare ... --space-before-chunks` reproduces it. In the
reference's corpora a literal "[SEP]" in a note is the control token, here it is always text.

One seed (17) is used for masks, order and dropout here; the reference shuffles with 2998, and its
order cannot be reproduced. It evaluates and saves every 3,000 steps in phase 1; in phase 2 it
evaluates every 40 steps and saves every 160.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from ._recipe import recipe


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
        gradient_accumulation_steps=6,  # 12 sequences on each of 8 devices
        eval_every=200,
        checkpoint_every=500,
    )
