"""The settings of `python -m train finetune --task retrieval`."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from ...common.settings import check_set
from ..config import check_rates

# For model cards: the loss, and its name in sentence-transformers.
LOSSES = {
    "mnrl": "in-batch negatives (MultipleNegativesRankingLoss)",
    "cosent": "the order of scored pairs (CoSENTLoss)",
    "mse": "a teacher's vectors (MSELoss)",
    "margin-mse": "the margins of a teacher's scores (MarginMSELoss)",
    "kl": "the distribution of a teacher's scores (DistillKLDivLoss)",
}
COMPARING = ("mnrl", "cosent")  # these losses compare the examples of a batch
TAUGHT = ("mse", "margin-mse", "kl")  # these follow a teacher
# The default temperature of the losses that have one.
TEMPERATURES = {"mnrl": 0.05, "cosent": 0.05, "kl": 1.0}


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """Trains a bi-encoder, which turns a text into a vector: for search, or to compare texts."""

    data: str  # folder with train.jsonl; for scores also queries.jsonl, corpus.jsonl, qrels.tsv
    model: str  # checkpoint: an HF or Orbax folder, a pretraining workdir, or a hub id
    out: str = "runs/retrieval"  # output folder
    # What each example of train.jsonl is trained for; the files are described above.
    loss: Literal["mnrl", "cosent", "mse", "margin-mse", "kl"] = "mnrl"
    # Model that mse, margin-mse and kl learn from, as --model, or a cross-encoder. Its vectors or
    # scores are computed before training and kept in OUT.
    teacher: str | None = None
    teacher_backend: Literal["jax", "torch"] = "jax"  # torch takes any of sentence-transformers
    # Also trains the first numbers of a vector to be a vector, for example 768 512 256; each
    # dimension is scored too.
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()  # of the loss at each dimension; by default 1
    truncate_dim: int | None = (
        None  # one of these dimensions, to which the saved model cuts vectors
    )
    seed: int = 42  # seed used for the order of the examples
    learning_rate: float = 2e-5  # peak; cosine decay to 0 after the warm-up
    weight_decay: float = 0.01  # not applied to norms and biases
    epochs: int = 1
    warmup_ratio: float = 0.1  # share of the steps with a linear warm-up
    # Examples per step over all devices; in mnrl each is a negative for all others.
    batch_size: int = 128
    chunk: int = 32  # texts per device in one forward pass; lower it to save memory
    # Divides the similarities in mnrl and cosent, and in kl also the teacher's scores; by default
    # 0.05, and 1 in kl and with --multi-vector.
    temperature: float | None = None
    max_length: int = 512  # in tokens; longer texts are truncated
    pooling: Literal["mean", "cls"] = "mean"  # of the token vectors of a text
    # Trains a ColBERT model in PyLate's layout, with mnrl or kl: a vector per token, scored by
    # MaxSim.
    multi_vector: bool = False
    embedding_size: int | None = None  # of these vectors; by default 128, or that of the start
    query_length: int = 32  # in tokens; queries are filled up with [MASK] to it
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are float32
    devices: int = 1  # number of devices that share each step

    def validate(self) -> None:
        """Raises ValueError with one line for impossible values."""
        for name in ("epochs", "batch_size", "chunk", "max_length", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size < 2 and self.loss in COMPARING:
            raise ValueError(f"batch_size: expected at least 2 with --loss {self.loss}, got 1")
        check_rates(self.learning_rate, self.weight_decay)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected 0 to 1, got {self.warmup_ratio}")
        if not 0 < self.divisor < math.inf:
            raise ValueError(f"temperature: expected above 0, got {self.temperature}")
        if self.temperature is not None and self.loss not in TEMPERATURES:
            raise ValueError(f"temperature: expected none with --loss {self.loss}, which has none")
        check_set(teacher=self.teacher)
        if (self.teacher is not None) != (self.loss in TAUGHT):
            expected, got = ("none", self.teacher) if self.teacher else ("a model", "none")
            raise ValueError(f"teacher: expected {expected} with --loss {self.loss}, got {got}")
        if self.teacher_backend != "jax" and self.teacher is None:
            raise ValueError("teacher_backend: expected none without --teacher, got torch")
        self._validate_matryoshka()
        self._validate_multi_vector()

    @property
    def divisor(self) -> float:
        """The temperature, or its default."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.multi_vector else TEMPERATURES.get(self.loss, 1.0)

    def _validate_multi_vector(self) -> None:
        defaults = RetrievalConfig("", "")
        multi = ("embedding_size", "query_length")
        single = ("pooling", "matryoshka_dims")
        if self.multi_vector and self.loss not in ("mnrl", "kl"):
            raise ValueError(f"loss: expected mnrl or kl with --multi-vector, got {self.loss}")
        for name in single if self.multi_vector else multi:
            value, default = getattr(self, name), getattr(defaults, name)
            if value != default:
                raise ValueError(
                    f"{name}: expected {default or 'none'} "
                    f"{'with' if self.multi_vector else 'without'} --multi-vector, got "
                    f"{_spaced(value) if isinstance(value, tuple) else value}"
                )
        if self.embedding_size is not None and self.embedding_size < 1:
            raise ValueError(f"embedding_size: expected at least 1, got {self.embedding_size}")

    def _validate_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if any(dim < 1 for dim in dims) or len(set(dims)) < len(dims):
            raise ValueError(
                f"matryoshka_dims: expected different numbers from 1 on, got {_spaced(dims)}"
            )
        if weights and len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights: expected one for each of the {len(dims)} matryoshka_dims, "
                f"got {len(weights)}"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"matryoshka_weights: expected above 0, got {_spaced(weights)}")
        if self.truncate_dim is not None and self.truncate_dim not in dims:
            raise ValueError(
                f"truncate_dim: expected one of the matryoshka_dims ({_spaced(dims)}), got "
                f"{self.truncate_dim}"
            )

    def check_width(self, width: int) -> None:
        """Raises ValueError for Matryoshka dimensions that a model of this width does not have."""
        if max(self.matryoshka_dims, default=0) > width:
            raise ValueError(
                f"matryoshka_dims: expected at most {width}, the width of the model's vectors, got "
                f"{_spaced(self.matryoshka_dims)}"
            )


def _spaced(numbers: Iterable[float]) -> str:
    """Numbers as they are given on the command line."""
    return " ".join(map(str, numbers)) or "none"
