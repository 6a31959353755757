"""ModernBERT-large, first of three runs: 1.719 trillion tokens in rows of 1024.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. Warm-up of the rate over 2 billion tokens; the rows of a step rise from
448 to 4,928 over the first 10 billion; both RoPE thetas 10,000; mask 0.30.

The published run rolled back: its loss stopped falling, so it went back to where it stood after
about 900 billion tokens at 5e-4, and from there trained about 800 billion at 5e-5. Here these are
two phases, 900 and 819 billion, the published total; what was rolled back is left out.
The weight decay fell from 1e-5 to 1e-6 with the rate: one max_learning_rate of 5e-4 does both, as
the decay of a step is lr / max_learning_rate x 1e-5.

    python -m train pretrain --config modernbert_large_pretrain --corpus DIR

Then modernbert_large_context and modernbert_large_decay (modernbert_base_pretrain shows how).
Hardware: 8 H100. Hours there, published: 425.3, of which 420.4 training (142,000 tokens/s a GPU,
derived). Ours is not measured.
Expect: about 342,000 steps. No held-out masked accuracy is published.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens.
"""

import dataclasses

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from . import recipe


def get_config() -> TrainConfig:
    """The pretraining phase, before and after the roll-back."""
    config = recipe(
        ModernBertConfig.large(global_rope_theta=10_000.0, local_rope_theta=10_000.0),
        weight_decay=1e-5,
        phases=(
            Phase(
                "pretrain",
                tokens=900_000_000_000,
                mlm_probability=0.30,
                learning_rate=5e-4,
                warmup_tokens=2_000_000_000,
                batch_size_warmup_start=448,
                batch_size_warmup_tokens=10_000_000_000,
            ),
            Phase("rolled_back", tokens=819_000_000_000, mlm_probability=0.30, learning_rate=5e-5),
        ),
        workdir="runs/modernbert_large_pretrain",
        seed=314,
        sequence_length=1024,
        global_batch_size=4928,
        gradient_accumulation_steps=11,  # 56 rows on each of 8 devices
        eval_fraction=0.0001,
        eval_sequences=1024,
        eval_every=1000,
        checkpoint_every=2000,
        keep_checkpoints=3,
    )
    optimizer = dataclasses.replace(config.optimizer, max_learning_rate=5e-4)
    return dataclasses.replace(config, optimizer=optimizer)
