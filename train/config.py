"""What a pretraining run is: phases as data. The command line is made from these dataclasses."""

import dataclasses
from typing import Literal

from modernbert_jax import ModernBertConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase. Weights and moments carry over from the last one; its token clock starts at 0."""

    name: str = "phase"
    tokens: int = 10_000_000  # budget, in tokens without padding
    mask_rate: float = 0.30  # share of tokens to predict
    learning_rate: float = 3e-4  # peak
    corpus: str = ""  # folder or file of .txt, .jsonl, .csv, .tsv; empty: the run's --corpus
    warmup_tokens: int = 0  # linear, from 0
    decay_tokens: int = 0  # at the end of the budget; 0 is a constant rate
    decay: Literal["one_minus_sqrt", "linear"] = "one_minus_sqrt"
    final_lr_share: float = 0.001  # of the peak, where the decay ends


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """StableAdamW, as ModernBERT and BioClinical ModernBERT use it."""

    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 1e-5  # fully decoupled: a share of the weight a step at the peak rate
    max_learning_rate: float = (
        0.0  # the rate at which weight_decay applies whole; 0: the phase's peak
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A pretraining run."""

    model: ModernBertConfig = dataclasses.field(default_factory=ModernBertConfig.tiny)
    phases: tuple[Phase, ...] = (Phase(),)
    optimizer: Optimizer = Optimizer()
    workdir: str = "runs/pretrain"  # checkpoints, tokens, metrics, curves and the export
    corpus: str = ""  # for the phases that name none; empty: notes made by train/corpora/synthetic
    synthetic_notes: int = 12_000  # how many, where corpus is empty
    text_column: str = ""  # of .jsonl, .csv, .tsv; empty: text, notes, note, ...
    tokenizer: str = ""  # folder or hub id; empty: a byte-level BPE trained on the corpus
    init_from: str = ""  # checkpoint (HF or Orbax) to start from; empty: fresh weights
    init_optimizer: bool = False  # take the Adam moments of init_from as well (Orbax only)
    seed: int = 17
    row_length: int = 1024  # tokens a packed row
    rows: int = 32  # a step, over all micro-batches
    micro_batches: int = 1  # gradient accumulation; the loss is the same for any number
    mask_special_tokens: bool = False  # the reference's packed training may mask [CLS] and [SEP]
    scan_layers: bool = False  # one body for repeated layers: compiles faster, slower on CPUs
    remat: bool = False  # recompute each layer in the backward pass
    loss_chunk: int = 1024  # predicted positions whose logits exist at once
    eval_fraction: float = 0.05  # of the documents, by a hash of the text
    eval_mask_rate: float = 0.15
    eval_every: int = 200  # steps; also at the end of each phase
    eval_rows: int = 128  # at most, of held-out text
    checkpoint_every: int = 200  # steps; also at the end of each phase
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    fill_mask: tuple[str, ...] = ()  # sentences with [MASK], filled at the end

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot go together."""
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        for name in (
            "row_length",
            "rows",
            "micro_batches",
            "log_every",
            "checkpoint_every",
            "eval_every",
            "keep_checkpoints",
            "loss_chunk",
            "eval_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.rows % self.micro_batches:
            raise ValueError(
                f"rows {self.rows} is not a multiple of micro_batches {self.micro_batches}"
            )
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected 0 to 1, got {self.eval_fraction}")
        if self.row_length > self.model.max_position_embeddings:
            raise ValueError(
                f"row_length {self.row_length} exceeds the model's max_position_embeddings "
                f"{self.model.max_position_embeddings}; lower --row-length"
            )
        step_tokens = self.rows * self.row_length
        for phase in self.phases:
            if not 0 < phase.mask_rate < 1:
                raise ValueError(
                    f"phase {phase.name}: mask_rate: expected 0 to 1, got {phase.mask_rate}"
                )
            if phase.tokens < step_tokens:
                raise ValueError(
                    f"phase {phase.name}: a budget of {phase.tokens:,} tokens is below one step of "
                    f"{step_tokens:,} (rows x row_length); raise tokens or lower --rows"
                )
            if not 0 <= phase.warmup_tokens + phase.decay_tokens <= phase.tokens:
                raise ValueError(
                    f"phase {phase.name}: warmup_tokens + decay_tokens "
                    f"{phase.warmup_tokens + phase.decay_tokens:,} exceed its "
                    f"{phase.tokens:,} tokens"
                )

    @property
    def micro_rows(self) -> int:
        """Rows a micro-batch."""
        return self.rows // self.micro_batches
