"""Both phases in half a minute: three layers of width 64, trained on 1,500 synthetic notes.

    python -m train pretrain --config notebook

The notebooks train this model when no released checkpoint is requested. It learns the phrases of
the synthetic notes and nothing else.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Optimizer, Phase, TrainConfig


def get_config() -> TrainConfig:
    """175,616 parameters, 450,000 tokens."""
    model = ModernBertConfig.tiny(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        local_attention=32,  # a radius of 16 tokens, visible in a note of 200
        max_position_embeddings=512,
        attention_out_dropout=0.1,
    )
    phases = (
        Phase("phase1", 300_000, mlm_probability=0.30, learning_rate=1e-2, warmup_tokens=30_000),
        Phase("phase2", 150_000, mlm_probability=0.15, learning_rate=1e-2, decay_tokens=150_000),
    )
    return TrainConfig(
        model=model,
        phases=phases,
        optimizer=Optimizer(eps=1e-8),  # as in demo
        workdir="runs/notebook",
        synthetic_notes=1_500,
        sequence_length=256,
        global_batch_size=8,
        eval_every=40,
        eval_sequences=16,
        checkpoint_every=1_000,
    )
