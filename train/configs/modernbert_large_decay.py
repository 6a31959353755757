r"""ModernBERT-large, last of three runs: decay on 50 billion tokens of better sources.

Source: the training configurations of AnswerDotAI/ModernBERT (branch pretraining_documentation);
arXiv 2412.13663, table 3 and A.4. Sequences have 8192 tokens; the learning rate decays as 1 - sqrt
over the whole run to 0.001 of its peak; 30 % of the tokens are masked. The released weights are the
best checkpoint of this run; averaging did not help.

    python -m train pretrain --config modernbert_large_decay --corpus DIR \
        --init-from runs/modernbert_large_context/checkpoints/STEP

Hardware: 8 H100. Hours there, published: 21.7, including 15.3 of training (113,000 tokens/s per
GPU, derived). Ours is not measured; use --mesh.fsdp 16 on a v5e-16.

Expect: about 9,780 steps; a checkpoint is saved every 500 steps and none is deleted.

Quirks of the reference, off here (bioclinical_base describes them): --loss-weighting sequences,
--mask-special-tokens, --optimizer.max-learning-rate 5e-4. It shuffles with seed 2998.
"""

from ..pretrain.config import TrainConfig
from . import modernbert_base_decay
from ._recipe import large


def get_config() -> TrainConfig:
    """The decay phase."""
    return large(
        modernbert_base_decay.get_config(),
        workdir="runs/modernbert_large_decay",
        init_from="./checkpoints/large_context",
        global_batch_size=624,
        gradient_accumulation_steps=13,  # 6 sequences on each of 8 devices
    )
