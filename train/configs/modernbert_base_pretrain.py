r"""ModernBERT-base, first of three runs: 1.719 trillion tokens in sequences of 1024.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. Training starts from random weights. The learning rate warms up over 3
billion tokens and is then constant; the batch size rises from 768 to 4,608 sequences over the first
50 billion tokens; both RoPE thetas are 10,000; 30 % of the tokens are masked. The mixture (web,
code, science) is not published.

    python -m train pretrain --config modernbert_base_pretrain --corpus DIR
    python -m train pretrain --config modernbert_base_context --corpus DIR \
        --init-from runs/modernbert_base_pretrain/checkpoints/STEP
    python -m train pretrain --config modernbert_base_decay --corpus DIR \
        --init-from runs/modernbert_base_context/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 194.2, including 191.1 of training (312,000 tokens/s per
GPU, derived). Ours is not measured.

Expect: about 372,000 steps, some 7,600 more than without the batch-size warm-up. No masked-LM
accuracy on a validation split is published.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens. Its batch-size warm-up counts the tokens of each GPU separately, ours those
of all GPUs; neither counts padding.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from ._recipe import recipe


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
        gradient_accumulation_steps=6,  # 96 sequences on each of 8 devices
        eval_fraction=0.0001,
        eval_sequences=1024,
        eval_every=1000,
        checkpoint_every=2000,
        keep_checkpoints=3,
    )
