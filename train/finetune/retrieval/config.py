"""The settings of `python -m train finetune --task retrieval`."""

import dataclasses
import math
from typing import Literal

from ..config import check_rates


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """Trains a bi-encoder on pairs of texts with in-batch negatives."""

    data: str  # folder with train.jsonl; for scores also queries.jsonl, corpus.jsonl, qrels.tsv
    model: str  # checkpoint: an HF or Orbax folder, a pretraining workdir, or a hub id
    out: str = "runs/retrieval"  # output folder
    seed: int = 42  # seed used for the order of the pairs
    learning_rate: float = 2e-5  # peak; cosine decay to 0 after the warm-up
    weight_decay: float = 0.01  # not applied to norms and biases
    epochs: int = 1
    warmup_ratio: float = 0.1  # share of the steps with a linear warm-up
    batch_size: int = 128  # pairs per step over all devices; each is a negative for all others
    chunk: int = 32  # texts per device in one forward pass; lower it to save memory
    temperature: float = 0.05  # divides the cosine similarities
    max_length: int = 512  # in tokens; longer texts are truncated
    pooling: Literal["mean", "cls"] = "mean"  # of the token vectors of a text
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are float32
    devices: int = 1  # number of devices that share each step

    def validate(self) -> None:
        """Raises ValueError with one line for impossible values."""
        for name in ("epochs", "batch_size", "chunk", "max_length", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("batch_size: expected at least 2 pairs, got 1, which has no negatives")
        check_rates(self.learning_rate, self.weight_decay)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected 0 to 1, got {self.warmup_ratio}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected above 0, got {self.temperature}")
