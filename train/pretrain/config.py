"""What a pretraining run is: phases as data. The command line is made from these dataclasses."""

import dataclasses
import math
from typing import Literal

from modernbert_jax import ModernBertConfig

from ..common.hosts import Hosts
from ..common.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase. Weights and moments carry over from the last one; its token clock starts at 0."""

    name: str = "phase"
    tokens: int = 10_000_000  # budget, in tokens without padding
    mlm_probability: float = 0.30  # share of tokens to predict
    learning_rate: float = 3e-4  # peak
    corpus: tuple[str, ...] = ()  # folders or files, see TrainConfig; empty: the run's --corpus
    warmup_tokens: int = 0  # linear, from 0
    decay_tokens: int = 0  # at the end of the budget; 0 is a constant rate
    decay: Literal["one_minus_sqrt", "linear"] = "one_minus_sqrt"
    final_lr_ratio: float = 0.001  # of the peak, where the decay ends
    batch_size_warmup_start: int = 0  # rows of the first steps; 0: all of them from the start
    batch_size_warmup_tokens: int = 0  # by when all rows are in use

    def __post_init__(self) -> None:
        if isinstance(self.corpus, str):
            object.__setattr__(self, "corpus", (self.corpus,) if self.corpus else ())

    def learning_rate_at(self, tokens: int) -> float:
        """Returns the learning rate of the step that starts at `tokens` on the phase's clock.

        Linear warm-up from 0, constant, then over the last decay_tokens, where x runs from 0 to 1:

            one_minus_sqrt: r + (1 - r) (1 - sqrt(x))      linear: r + (1 - r) (1 - x)

        times the peak, with r = final_lr_ratio. tokens is a Python integer: 160e9 overflows int32.
        Source: ModernBERT's scheduler (arXiv 2412.13663, section 2.2).
        """
        factor = 1.0
        start = self.tokens - self.decay_tokens
        if tokens < self.warmup_tokens:
            factor = tokens / self.warmup_tokens
        elif self.decay_tokens and tokens > start:
            x = min(1.0, (tokens - start) / self.decay_tokens)
            x = math.sqrt(x) if self.decay == "one_minus_sqrt" else x
            factor = self.final_lr_ratio + (1.0 - self.final_lr_ratio) * (1.0 - x)
        return self.learning_rate * factor

    def batch_size_at(self, tokens: int, rows: int, micro_batch_size: int) -> int:
        """The rows of the step that starts at `tokens` of the phase's clock.

        They rise from batch_size_warmup_start to `rows` by one micro-batch at a time, each size serving as many
        steps as the next. Source: ModernBERT's batch-size warm-up (its sequence packer).
        """
        if not self.batch_size_warmup_start or tokens >= self.batch_size_warmup_tokens:
            return rows
        sizes = range(self.batch_size_warmup_start, rows + 1, micro_batch_size)
        done = 0
        for size in sizes:
            done += size
            if tokens < math.ceil(self.batch_size_warmup_tokens * done / sum(sizes)):
                return size
        return rows


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
    # For the phases that name none: folders or files of .txt, .jsonl, .csv, .tsv, folders of tokens
    # made by `prepare`, MDS folders. Empty: notes made by train/corpora/synthetic.
    corpus: tuple[str, ...] = ()
    synthetic_notes: int = 12_000  # how many, where corpus is empty; 0: refuse instead
    text_column: str = ""  # of .jsonl, .csv, .tsv; empty: text, notes, note, ...
    tokenizer: str = ""  # folder or hub id; empty: a byte-level BPE trained on the corpus
    init_from: str = ""  # checkpoint (HF, Orbax, or another run's workdir); empty: fresh weights
    init_optimizer: bool = False  # take the Adam moments of init_from as well (Orbax only)
    global_rope_theta: float = 0.0  # replaces init_from's (context extension); 0: leave it
    seed: int = 17
    sequence_length: int = 1024  # tokens a packed row
    global_batch_size: int = 32  # a step, over all micro-batches
    gradient_accumulation_steps: int = (
        1  # gradient accumulation; the loss is the same for any number
    )
    mask_special_tokens: bool = False  # the reference's packed training may mask [CLS] and [SEP]
    # tokens: the mean over all masked tokens of a step. sequences: as the reference's trainer has
    # it, the mean of each micro-batch weighted by its number of sequences.
    loss_weighting: Literal["tokens", "sequences"] = "tokens"
    mesh: MeshShape = MeshShape()
    hosts: Hosts = Hosts()
    prng: Literal["threefry2x32", "rbg"] = "threefry2x32"  # of dropout; rbg is quicker on TPUs
    attention: str = ""  # implementation by name (modernbert_jax.attention); empty: chosen
    scan_layers: bool = False  # one body for repeated layers: compiles faster, slower on CPUs
    # What the backward pass computes again: nothing, whole layers, or all but matrix products.
    remat: Literal["none", "layers", "all_but_dots"] = "none"
    loss_chunk: int = 1024  # predicted positions a device whose logits exist at once
    eval_fraction: float = 0.05  # of the documents, by a hash of the text
    eval_mlm_probability: float = 0.15
    eval_every: int = 200  # steps; also at the end of each phase
    eval_sequences: int = 128  # at most, of held-out text
    checkpoint_every: int = 200  # steps; also at the end of each phase
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    stall_minutes: float = 15.0  # without a step, until every host says where it is
    profile_step: int = 0  # step that jax.profiler starts at; 0: never
    profile_steps: int = 3
    wandb: str = ""  # project of Weights & Biases (needs wandb); empty: none
    fill_mask: tuple[str, ...] = ()  # sentences with [MASK], filled at the end

    def __post_init__(self) -> None:
        if isinstance(self.corpus, str):
            object.__setattr__(self, "corpus", (self.corpus,) if self.corpus else ())

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot go together."""
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        for name in (
            "sequence_length",
            "global_batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "eval_every",
            "keep_checkpoints",
            "loss_chunk",
            "eval_sequences",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.gradient_accumulation_steps > self.global_batch_size:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}: expected at most rows {self.global_batch_size}"
            )
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected 0 to 1, got {self.eval_fraction}")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} exceeds the model's max_position_embeddings "
                f"{self.model.max_position_embeddings}; lower --sequence-length"
            )
        step_tokens = self.global_batch_size * self.sequence_length
        for phase in self.phases:
            if not 0 < phase.mlm_probability < 1:
                raise ValueError(
                    f"phase {phase.name}: mlm_probability: expected 0 to 1, got {phase.mlm_probability}"
                )
            if phase.tokens < step_tokens:
                raise ValueError(
                    f"phase {phase.name}: a budget of {phase.tokens:,} tokens is below one step of "
                    f"{step_tokens:,} (rows x sequence_length); raise tokens or lower --global-batch-size"
                )
            if phase.batch_size_warmup_start and (
                phase.batch_size_warmup_start % self.micro_batch_size
                or self.global_batch_size % self.micro_batch_size
                or not phase.batch_size_warmup_tokens
                or phase.batch_size_warmup_start > self.global_batch_size
            ):
                raise ValueError(
                    f"phase {phase.name}: batch_size_warmup_start {phase.batch_size_warmup_start}: expected "
                    f"batch_size_warmup_tokens with it, and batch_size_warmup_start and rows {self.global_batch_size} to be "
                    f"multiples of the {self.micro_batch_size} rows of a micro-batch"
                )
            if not 0 <= phase.warmup_tokens + phase.decay_tokens <= phase.tokens:
                raise ValueError(
                    f"phase {phase.name}: warmup_tokens + decay_tokens "
                    f"{phase.warmup_tokens + phase.decay_tokens:,} exceed its "
                    f"{phase.tokens:,} tokens"
                )

    @property
    def micro_batch_size(self) -> int:
        """Rows a micro-batch; the last one of a step may have fewer."""
        return -(-self.global_batch_size // self.gradient_accumulation_steps)
