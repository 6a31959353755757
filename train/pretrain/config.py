"""The configuration of a pretraining run: phases as data; the command line is made from it."""

import dataclasses
import math
from typing import Literal

from modernbert_jax import ModernBertConfig
from modernbert_jax.attention import IMPLEMENTATIONS

from ..common.hosts import Hosts
from ..common.settings import LORA_ALPHA, LORA_TARGETS, check_adapters, check_set
from ..common.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase. Weights and moments carry over from the previous one; its token clock restarts."""

    name: str = "phase"  # Name in logs, metrics and the model card.
    tokens: int = 10_000_000  # Token budget, without padding.
    mlm_probability: float = 0.30  # Probability that a token is selected for prediction.
    learning_rate: float | None = 3e-4
    """Peak learning rate; None: 1e-4, or 5e-5 for a model at least 1,024 wide."""
    corpus: tuple[str, ...] = ()  # Corpora of this phase; empty uses the run's --corpus. See there.
    warmup_tokens: int = 0  # Tokens over which the learning rate rises linearly from 0.
    decay_tokens: int = 0
    """Tokens at the end of the budget over which the rate decays; 0 keeps it constant."""
    decay: Literal["one_minus_sqrt", "linear"] = "one_minus_sqrt"  # Shape of the decay.
    final_lr_ratio: float = 0.001
    """Learning rate at the end of the decay, as a fraction of the peak."""
    batch_size_warmup_start: int | None = None
    """Sequences per step at the start of batch-size warm-up; None: no such warm-up."""
    batch_size_warmup_tokens: int = 0
    """Tokens after which every step has global_batch_size sequences."""

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
        assert self.learning_rate is not None  # derive.derived has set it
        return self.learning_rate * factor

    def batch_size_at(self, tokens: int, batch_size: int, micro_batch_size: int) -> int:
        """Returns the number of sequences of the step that starts at `tokens` on the phase's clock.

        It rises from batch_size_warmup_start to `batch_size` by one micro-batch at a time, and each
        size is used for the same number of steps. Source: ModernBERT's batch-size warm-up (its
        sequence packer).
        """
        if self.batch_size_warmup_start is None or tokens >= self.batch_size_warmup_tokens:
            return batch_size
        sizes = range(self.batch_size_warmup_start, batch_size + 1, micro_batch_size)
        done = 0
        for size in sizes:
            done += size
            if tokens < math.ceil(self.batch_size_warmup_tokens * done / sum(sizes)):
                return size
        return batch_size


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """StableAdamW, with the values of ModernBERT and BioClinical ModernBERT."""

    b1: float = 0.9  # Decay rate of the first moment.
    b2: float = 0.98  # Decay rate of the second moment.
    eps: float = 1e-6  # Added to the denominator of the update.
    weight_decay: float = 1e-5
    """Fully decoupled: the fraction of a weight removed per step at the peak learning rate."""
    max_learning_rate: float | None = None
    """Learning rate at which weight_decay applies in full; None: the phase's peak."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A pretraining run."""

    model: ModernBertConfig = dataclasses.field(default_factory=ModernBertConfig.tiny)
    """Architecture of a new model. With --init-from only dtypes and dropout are read from here."""
    phases: tuple[Phase, ...] = (Phase(),)  # Training phases, in order.
    optimizer: Optimizer = Optimizer()  # Optimizer settings.
    workdir: str = "runs/pretrain"
    """Folder or bucket (gs://...) for checkpoints, metrics, curves and the exported model."""
    corpus: tuple[str, ...] = ()
    """Corpora of phases that name none: folders or files of .txt, .jsonl, .csv, .tsv or .parquet,
    folders written by `prepare`, or MDS folders. A corpus listed n times is repeated n times per
    epoch. Empty trains on synthetic notes."""
    synthetic_notes: int = 12_000
    """Number of synthetic notes written when no corpus is given; 0 raises an error instead."""
    text_column: str | None = None
    """Column or key of the text in tables and .jsonl; None: the first of text, notes, note, ..."""
    tokenizer: str | None = None
    """Folder or hub id; None: the one of --init-from, or else a byte-level BPE is trained. With
    --init-from, its tokenizer with added tokens extends the embedding and the moments."""
    extend: bool = False
    """Continue the run in --workdir with further phases at its end, or with a larger budget: then
    from the last checkpoint before the decay. Without it, such a change is refused."""
    init_from: str | None = None
    """Checkpoint to start from: HF or Orbax folder, a run's workdir, or hub id; None: random
    weights."""
    init_optimizer: bool = False
    """Also load the optimizer's moments from --init-from (Orbax checkpoints only)."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank alone, in --init-from's layers; None trains all weights. The
    export is the complete model, with the adapters merged; WORKDIR/adapter is a PEFT folder."""
    lora_alpha: float = LORA_ALPHA  # The adapters' products are multiplied by alpha / rank.
    lora_targets: tuple[str, ...] = LORA_TARGETS  # The layers that get adapters.
    global_rope_theta: float | None = None
    """Replaces the value of --init-from, for context extension; None keeps it."""
    seed: int = 17  # Seed used for initialization, order of the data, masks and dropout.
    sequence_length: int = 1024  # Tokens per packed sequence.
    global_batch_size: int = 32  # Packed sequences per step, over all devices and micro-batches.
    epochs: float | None = None
    """Budget as passes over the training text: rescales each phase, its warm-up and its decay, to
    its share of the phases' tokens times this many epochs of its corpora. None: the phases'
    tokens."""
    fit_to_corpus: bool = False
    """Shorten sequence_length to the power of two that holds the longest chunk, with as many tokens
    per step, and then halve the step until the budget has 300."""
    gradient_accumulation_steps: int | None = 1
    """Micro-batches per step; None: as few as the memory of the devices allows. The loss does not
    depend on it with loss_weighting=tokens."""
    round_batch: bool = False
    """Change global_batch_size to the nearest number that the devices divide, and the learning rate
    by the square root of the ratio; both are logged."""
    mask_special_tokens: bool = False
    """Allow [CLS] and [SEP] to be masked, as ModernBERT's packed training may do."""
    loss_weighting: Literal["tokens", "sequences"] = "tokens"
    """tokens: mean over the masked tokens of a step, sum_t l_t / N. sequences: the mean of each
    micro-batch m weighted by its number of sequences, sum_m s_m / S (sum_t l_mt / N_m), as in
    Composer."""
    mesh: MeshShape = MeshShape()  # Number of devices along each axis of the mesh.
    hosts: Hosts = Hosts()  # How the processes of a multi-host run find each other.
    attention: str | None = None
    """Attention implementation by name (modernbert_jax.attention); None chooses by device."""
    fused_local_layers: bool = False
    """Run each local layer as one kernel, forward and backward (TPU v5e or v6e, mesh.tensor 1)."""
    scan_layers: bool = False  # Scan over groups of layers: compiles faster, runs slower on CPUs.
    remat: Literal["none", "save_dots_and_attention", "save_attention", "layers"] = "none"
    """What the backward pass computes again, to save memory. none: nothing.
    save_dots_and_attention: norms, activations and dropout. save_attention: also the matrix
    products. layers: also attention, so that only the inputs of the layers are saved."""
    loss_chunk: int = 2048
    """Predictions per device in one chunk of logits; smaller uses less memory."""
    eval_fraction: float = 0.05
    """Fraction of documents in the evaluation set, chosen by a hash of the text."""
    eval_mlm_probability: float = 0.15  # mlm_probability of the evaluation set.
    general_text: str | None = None
    """Text of another kind (a file or folder as for --corpus), scored before and after to show what
    the model forgets; never trained on."""
    eval_every: int = 200  # Steps between evaluations; each phase also ends with one.
    eval_sequences: int = 128  # Maximum number of packed sequences per evaluation set.
    checkpoint_every: int = 200  # Steps between checkpoints; each phase also ends with one.
    checkpoint_minutes: float | None = 20.0
    """Minutes after which a checkpoint is written also between those; None: never."""
    keep_checkpoints: int = 2  # Number of newest checkpoints to keep.
    log_every: int = 10  # Steps between updates of the progress line.
    stall_minutes: float | None = 15.0
    """Every host dumps the stacks of its threads when no step completes for this long; None:
    never."""
    profile_step: int | None = None  # First step recorded with jax.profiler; None: no recording.
    profile_steps: int = 3  # Number of steps to record.
    wandb: str | None = None
    """Weights & Biases project to log to (needs the package wandb); None: no logging there."""
    fill_mask: tuple[str, ...] = ()  # Sentences with [MASK] whose predictions are shown at the end.

    def __post_init__(self) -> None:
        if isinstance(self.corpus, str):
            object.__setattr__(self, "corpus", (self.corpus,) if self.corpus else ())

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch; the last micro-batch of a step may have fewer."""
        return -(-self.global_batch_size // (self.gradient_accumulation_steps or 1))

    def rounded(self, unit: int) -> tuple["TrainConfig", str]:
        """Returns this with the multiple of `unit` nearest to global_batch_size, and a log line.

        Learning rates change by the square root of the ratio, the rule for adaptive optimizers
        (arXiv 2205.10287). Its changes of the moments' decay rates are left out: up to a quarter
        more or fewer sequences moves b1 from 0.9 by 0.03. Tokens of phases stay.
        """
        old = self.global_batch_size
        size = max(1, (2 * old + unit) // (2 * unit)) * unit
        factor = math.sqrt(size / old)
        config = dataclasses.replace(self, global_batch_size=size)
        micro = config.micro_batch_size
        phases = [
            dataclasses.replace(
                phase,
                learning_rate=(phase.learning_rate or 0.0) * factor,
                # Batch-size warm-up goes from one multiple of the micro-batch to another.
                batch_size_warmup_start=phase.batch_size_warmup_start
                and -(-phase.batch_size_warmup_start // micro) * micro,
            )
            for phase in self.phases
        ]
        rate = self.optimizer.max_learning_rate
        optimizer = dataclasses.replace(self.optimizer, max_learning_rate=rate and rate * factor)
        tokens = [n * self.sequence_length for n in (old, size)]
        return dataclasses.replace(config, phases=tuple(phases), optimizer=optimizer), (
            f"round_batch: {size} sequences per step instead of {old} ({size / old - 1:+.1%}), "
            f"{tokens[1]:,} tokens instead of {tokens[0]:,}; learning rates x {factor:.4f}, the "
            "square root of the ratio"
        )

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot be combined."""
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        for name in (
            "sequence_length", "global_batch_size", "log_every",
            "checkpoint_every", "eval_every", "keep_checkpoints", "loss_chunk", "eval_sequences",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        rates = [phase.learning_rate for phase in self.phases]
        if self.round_batch and (self.fit_to_corpus or not all(rates)):
            raise ValueError(
                "round_batch: expected a batch size and learning rates that are set; pass "
                "--no-fit-to-corpus and --phases.0.learning-rate and so on"
            )
        if self.attention not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attention: expected one of {', '.join(IMPLEMENTATIONS)}, got {self.attention!r}"
            )
        steps = self.gradient_accumulation_steps
        if steps is not None and not 1 <= steps <= self.global_batch_size:
            raise ValueError(
                "gradient_accumulation_steps: expected at least 1 and at most global_batch_size "
                f"{self.global_batch_size}, or None to choose, got {steps}"
            )
        for name in ("text_column", "tokenizer", "init_from", "general_text", "wandb"):
            check_set(**{name: getattr(self, name)})
        for name, value in (
            ("optimizer.max_learning_rate", self.optimizer.max_learning_rate),
            ("global_rope_theta", self.global_rope_theta),
            ("stall_minutes", self.stall_minutes),
            ("checkpoint_minutes", self.checkpoint_minutes),
            ("epochs", self.epochs),
            ("profile_step", self.profile_step),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected above 0, or None, got {value}")
        optimizer = self.optimizer
        for name, value, low, high in (
            ("eval_fraction", self.eval_fraction, 0, 1),
            ("eval_mlm_probability", self.eval_mlm_probability, 0, 1),
            ("optimizer.eps", optimizer.eps, 0, 1),
        ):
            if not low < value < high:
                raise ValueError(f"{name}: expected above {low} and below {high}, got {value}")
        for name, value, high in (
            ("optimizer.b1", optimizer.b1, 1),
            ("optimizer.b2", optimizer.b2, 1),
            ("optimizer.weight_decay", optimizer.weight_decay, 1),
            ("synthetic_notes", self.synthetic_notes, math.inf),
            ("profile_steps", self.profile_steps, math.inf),
            ("seed", self.seed, 2**32),
        ):
            if not 0 <= value < high:
                limit = "" if high == math.inf else f" and below {high}"
                raise ValueError(f"{name}: expected at least 0{limit}, got {value}")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} exceeds the model's "
                f"max_position_embeddings {self.model.max_position_embeddings}; lower "
                "--sequence-length"
            )
        if self.sequence_length % self.mesh.sequence:
            raise ValueError(
                f"mesh.sequence: expected a divisor of sequence_length {self.sequence_length}, got "
                f"{self.mesh.sequence}"
            )
        if self.fused_local_layers and max(self.mesh.sequence, self.mesh.tensor) > 1:
            raise ValueError(
                "fused_local_layers: expected mesh.sequence 1 and mesh.tensor 1, got "
                f"{self.mesh.sequence} and {self.mesh.tensor}"
            )
        check_adapters(self)
        if self.lora_rank is not None and (self.init_from is None or self.init_optimizer):
            raise ValueError(
                "lora_rank: expected init_from, whose weights stay as they are, without "
                f"init_optimizer; got {self.init_from} and {self.init_optimizer}"
            )
        for phase in self.phases:
            if problem := self._problem_of(phase):
                raise ValueError(f"phase {phase.name}: {problem}")

    def _problem_of(self, phase: Phase) -> str:
        """Returns what is wrong with a phase, or an empty string."""
        batch_size, micro_batch_size = self.global_batch_size, self.micro_batch_size
        step_tokens = batch_size * self.sequence_length
        if not 0 < phase.mlm_probability < 1:
            return f"mlm_probability: expected above 0 and below 1, got {phase.mlm_probability}"
        if phase.learning_rate is not None and not 0 < phase.learning_rate < math.inf:
            return f"learning_rate: expected above 0, got {phase.learning_rate}"
        if not 0 <= phase.final_lr_ratio <= 1:
            return f"final_lr_ratio: expected 0 to 1, got {phase.final_lr_ratio}"
        for name in ("warmup_tokens", "decay_tokens", "batch_size_warmup_tokens"):
            if getattr(phase, name) < 0:
                return f"{name}: expected at least 0, got {getattr(phase, name)}"
        if phase.tokens < step_tokens and not (self.epochs or self.fit_to_corpus):
            return (
                f"a budget of {phase.tokens:,} tokens is below one step of {step_tokens:,} "
                "(global_batch_size x sequence_length); raise tokens or lower --global-batch-size"
            )
        if phase.warmup_tokens + phase.decay_tokens > phase.tokens:
            return (
                f"warmup_tokens + decay_tokens {phase.warmup_tokens + phase.decay_tokens:,} exceed "
                f"its {phase.tokens:,} tokens"
            )
        start = phase.batch_size_warmup_start
        if start is None and phase.batch_size_warmup_tokens:
            return "batch_size_warmup_tokens: expected batch_size_warmup_start as well, got None"
        if start is not None and (
            start < 1
            or start % micro_batch_size
            or batch_size % micro_batch_size
            or not phase.batch_size_warmup_tokens
            or start > batch_size
        ):
            return (
                f"batch_size_warmup_start {start}: expected batch_size_warmup_tokens to be set, "
                f"and batch_size_warmup_start and global_batch_size {batch_size} to be multiples "
                f"of the micro-batch size {micro_batch_size}"
            )
        return ""


# What `pretrain --help` shows of each part, the most used first; --help-all shows the rest.
FREQUENT: dict[type, tuple[str, ...]] = {
    TrainConfig: (
        "corpus", "workdir", "init_from", "epochs", "extend", "lora_rank", "tokenizer",
        "text_column", "general_text", "phases", "sequence_length", "fit_to_corpus",
        "global_batch_size", "gradient_accumulation_steps", "mesh", "model", "remat", "attention",
        "eval_every", "checkpoint_every", "checkpoint_minutes", "wandb", "seed",
    ),
    Phase: (
        "corpus", "tokens", "mlm_probability", "learning_rate", "warmup_tokens", "decay_tokens",
        "decay",
    ),
    ModernBertConfig: ("dtype", "attention_out_dropout"),
}  # fmt: skip
