"""Continue pretraining on your own notes, from a released checkpoint to a model card.

    python -m train pretrain --config continue --corpus notes/ --workdir runs/notes
    python -m train pretrain --config continue --corpus notes/ --workdir runs/notes \\
        --init-from answerdotai/ModernBERT-large --epochs 5

The corpus is a folder of .txt, .jsonl, .csv, .tsv or .parquet files, or one written by `prepare`.
--init-from is a hub id, a Hugging Face folder, an Orbax folder or a run's workdir; tokenizer,
vocabulary and architecture are the checkpoint's. The same command runs on a laptop, on several
GPUs, under SLURM and on a TPU pod: everything but the number of micro-batches follows from the
checkpoint and the corpus.

Four fifths of the budget mask 30 % of the tokens at a constant rate; the last fifth masks 15 %
while the rate decays as 1 - sqrt, as in BioClinical ModernBERT. The peak learning rate is 1e-4, and
5e-5 for a large model, with fresh moments: a released checkpoint has decayed, and its moments are
not published. A step has 524,288 tokens, or fewer so that a small corpus gives at least 300 steps.
The length of a sequence is the power of two that holds the longest document, at most 8192.

Expect: a few points of masked accuracy on your own notes, which the table at the end shows beside
the accuracy before. Notes may hold identifying information: a model can repeat rare words of its
training text, so that de-identify them first, or keep the model where the notes may be kept.
"""

from modernbert_jax import ModernBertConfig

from ..pretrain.config import Phase, TrainConfig
from ._recipe import recipe


def get_config() -> TrainConfig:
    """Both phases; --epochs, or the phases' tokens, set the budget."""
    return recipe(
        ModernBertConfig.base(),
        weight_decay=1e-5,
        phases=(
            Phase(
                "adapt",
                tokens=80_000_000,
                mlm_probability=0.30,
                learning_rate=None,
                warmup_tokens=5_000_000,
            ),
            Phase(
                "decay",
                tokens=20_000_000,
                mlm_probability=0.15,
                learning_rate=None,
                decay_tokens=20_000_000,
                decay="one_minus_sqrt",
                final_lr_ratio=0.001,
            ),
        ),
        workdir="runs/continue",
        init_from="thomas-sounack/BioClinical-ModernBERT-base",
        epochs=3.0,
        fit_to_corpus=True,
        sequence_length=8192,
        global_batch_size=64,
        gradient_accumulation_steps=None,
        eval_fraction=0.05,
        eval_every=100,
        checkpoint_every=100,
    )
