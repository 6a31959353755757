"""Both phases on a laptop: four layers of width 128, trained on synthetic notes.

python -m train pretrain --config demo
python -m train pretrain --config demo --corpus DIR          (your own text)
"""

from modernbert_jax import ModernBertConfig

from ..corpora.synthetic import FILL_MASK_SENTENCES
from ..pretrain.config import Optimizer, Phase, TrainConfig


def get_config() -> TrainConfig:
    """The configuration of `make demo`."""
    return TrainConfig(
        model=ModernBertConfig.tiny(vocab_size=2048, attention_out_dropout=0.1),
        phases=(
            Phase(
                name="phase1",
                tokens=1_300_000,
                mlm_probability=0.30,
                learning_rate=3e-3,
                warmup_tokens=80_000,
            ),
            Phase(
                name="phase2",
                tokens=500_000,
                mlm_probability=0.15,
                learning_rate=3e-3,
                decay_tokens=500_000,
            ),
        ),
        # The recipe's 1e-6 is large compared with the query and key gradients of so small a model.
        optimizer=Optimizer(eps=1e-8),
        workdir="runs/demo",
        sequence_length=512,
        global_batch_size=16,
        eval_every=50,
        checkpoint_every=100,
        fill_mask=FILL_MASK_SENTENCES,
    )
