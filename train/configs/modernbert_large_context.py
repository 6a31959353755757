r"""ModernBERT-large, second of three runs: context extension to 8192 tokens, 250 billion tokens.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3. The global RoPE theta changes from 10,000 to 160,000 at once; the
learning rate is constant, without warm-up; 30 % of the tokens are masked; the Adam moments of the
first run are kept.

    python -m train pretrain --config modernbert_large_context --corpus DIR \
        --init-from runs/modernbert_large_pretrain/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 80.7, including 75.1 of training (116,000 tokens/s per
GPU, derived). Ours is not measured; use --mesh.fsdp 16 on a v5e-16.

Expect: about 49,540 steps (the published checkpoint is from step 49,552).

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4. It shuffles with seed 2998.
"""

from ..pretrain.config import TrainConfig
from . import modernbert_base_context
from ._recipe import large


def get_config() -> TrainConfig:
    """The context extension."""
    return large(
        modernbert_base_context.get_config(),
        workdir="runs/modernbert_large_context",
        init_from="./checkpoints/large_pretrain",
    )
