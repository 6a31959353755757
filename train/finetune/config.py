"""The settings of `python -m train finetune`."""

import dataclasses
import itertools
import math
from typing import Any, Literal

from ..common.settings import LORA_ALPHA, LORA_TARGETS, check_adapters, check_set


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tunes a checkpoint on a task, over several seeds and a grid of settings.

    The defaults are those of BioClinical ModernBERT's evaluation.
    """

    task: str  # one of the tasks above; `--task retrieval` has its own flags
    data: str  # folder with the files of the task
    model: str  # checkpoint: an HF or Orbax folder, a pretraining workdir, or a hub id
    out: str | None = None  # output folder; runs/finetune/TASK by default
    text_column: str | None = None  # column of the text; None tries text, sentence, notes, ...
    # Column of the second text; None tries text_pair, sentence2, ...
    text_pair_column: str | None = None
    label_column: str | None = None  # column of the label; None tries label, class, ...
    backend: Literal["jax", "torch"] = "jax"  # torch fine-tunes any model of transformers
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)  # one run each
    learning_rate: float = 2e-5  # peak; decays linearly to 0 without warm-up
    weight_decay: float = 0.01  # not applied to norms and biases
    epochs: int = 3  # the epoch with the best validation score is kept
    batch_size: int = 16  # examples per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    max_length: int = 8192  # in tokens; longer texts are truncated
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it
    layer_decay: float = 1.0  # learning rate of each layer relative to the layer above it
    freeze_encoder: bool = False  # train only the head
    # Trains LoRA adapters of this rank in the encoder, and the head; None trains all weights.
    # OUT/model is the complete model, with the adapters merged; OUT/adapter is a PEFT folder.
    lora_rank: int | None = None
    lora_alpha: float = (
        LORA_ALPHA  # the adapters' products are multiplied by lora_alpha / lora_rank
    )
    lora_targets: tuple[str, ...] = LORA_TARGETS  # the layers that get adapters
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are float32
    # Accepts labels that look like text (longer than 64 characters, or distinct in most examples),
    # and writes all labels to the results, the model and its card as they are. By default a label
    # that looks neither like a name nor like a short phrase is written as its position and length.
    allow_long_labels: bool = False
    # Runs every combination, for example learning_rate=1e-5,2e-5 weight_decay=0,0.01.
    grid: tuple[str, ...] = ()
    devices: int = 1  # number of runs at a time, one per device
    save_model: bool = True  # write the run with the best validation score to OUT/model

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot be combined."""
        for name in ("out", "text_column", "text_pair_column", "label_column"):
            check_set(**{name: getattr(self, name)})
        for name in ("max_length", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for point in self.points():
            point._validate_point()
        if not self.seeds:
            raise ValueError("seeds: expected at least one")
        check_adapters(self)
        if self.lora_rank is not None:
            if self.freeze_encoder:
                raise ValueError(
                    "freeze_encoder, lora_rank: expected one of them, got both; adapters train "
                    "in the encoder"
                )
            if self.backend == "torch":
                raise ValueError("lora_rank: expected None with --backend torch")
        if self.backend == "torch" and any(p.layer_decay != 1 for p in self.points()):
            raise ValueError("layer_decay: expected 1 with --backend torch")

    def _validate_point(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        check_rates(self.learning_rate, self.weight_decay)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected above 0, got {self.max_grad_norm}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected above 0 to 1, got {self.layer_decay}")

    def points(self) -> list["FinetuneConfig"]:
        """The combinations of the grid, each a configuration without a grid."""
        fields = {
            "learning_rate": float, "weight_decay": float, "epochs": int, "batch_size": int,
            "gradient_accumulation_steps": int, "layer_decay": float,
        }  # fmt: skip
        axes: list[list[tuple[str, Any]]] = []
        for item in self.grid:
            name, _, values = item.partition("=")
            if name not in fields or not values:
                raise ValueError(
                    f"grid: expected {', '.join(fields)} with values, such as "
                    f"learning_rate=1e-5,2e-5; got {item!r}"
                )
            try:
                axes.append([(name, fields[name](value)) for value in values.split(",")])
            except ValueError:
                raise ValueError(f"grid: {name}: expected numbers, got {values!r}") from None
        return [
            dataclasses.replace(self, grid=(), **dict(point)) for point in itertools.product(*axes)
        ]


def check_rates(learning_rate: float, weight_decay: float) -> None:
    """Raises ValueError for a rate that training cannot use: negative, infinite or NaN."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: expected above 0, got {learning_rate}")
    if not 0 <= weight_decay < 1:
        raise ValueError(f"weight_decay: expected at least 0 and below 1, got {weight_decay}")
