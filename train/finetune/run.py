"""python -m train finetune: a task over seeds and a grid, here or with torch, and its table.

As the reference fine-tunes: AdamW, linear decay without warm-up, clipping at 1, the best epoch by
validation. Each batch is packed into rows of a size from a short list, so that short texts cost
what they should and few shapes are compiled. `--backend torch` runs any `transformers` model
through the same harness, in the same order of examples.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from modernbert_jax import (
    ModernBertConfig,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.checkpoint.hf import write_card
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.packing import IGNORE_INDEX, fill_rows, plan_rows, row_size
from modernbert_jax.tokenizer import AutoTokenizer

from ..common.optimizer import adamw
from ..common.workdir import start_folder
from .card import finetuning_facts
from .scores import (
    answer_scores,
    classification_scores,
    entity_scores,
    multilabel_scores,
)
from .tasks import task_named
from .tasks.task import Data, Example, Task


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run. Defaults are those of BioClinical ModernBERT's evaluation."""

    task: str  # name of a task: see train/tasks
    data: str  # folder of its files
    model: str  # checkpoint: folder (HF, Orbax), a pretraining run's workdir, or hub id
    out: str = ""  # results, curves, the best model; by default runs/finetune/TASK
    backend: Literal["jax", "torch"] = "jax"
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    lr: float = 2e-5
    weight_decay: float = 0.01  # not of norms and biases
    epochs: int = 3
    batch: int = 16  # examples a micro-batch
    accumulation: int = 1  # micro-batches a step
    max_length: int = 8192  # tokens; longer texts are cut
    clip: float = 1.0  # of the gradient's norm
    layer_decay: float = 1.0  # the rate of each layer is this share of that of the one above
    freeze_encoder: bool = False  # train the head alone
    dtype: Literal["float32", "bfloat16"] = "float32"
    grid: tuple[str, ...] = ()  # such as lr=1e-5,2e-5 weight_decay=0,0.01; every combination
    devices: int = 1  # seeds and grid points at a time, one a device
    save_model: bool = True  # the best run's, by validation, in HF's layout

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot go together."""
        for name in ("epochs", "batch", "accumulation", "max_length", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected above 0 to 1, got {self.layer_decay}")
        self.points()

    def points(self) -> list["FinetuneConfig"]:
        """The points of the grid, each a configuration of its own without one."""
        axes: list[list[tuple[str, Any]]] = []
        fields = {"lr": float, "weight_decay": float, "epochs": int, "batch": int}
        fields |= {"accumulation": int, "layer_decay": float}
        for item in self.grid:
            name, _, values = item.partition("=")
            if name not in fields or not values:
                raise ValueError(
                    f"grid: expected {', '.join(fields)} with values, such as lr=1e-5,2e-5; got "
                    f"{item!r}"
                )
            try:
                axes.append([(name, fields[name](value)) for value in values.split(",")])
            except ValueError:
                raise ValueError(f"grid: {name}: expected numbers, got {values!r}") from None
        return [
            dataclasses.replace(self, grid=(), **dict(point)) for point in itertools.product(*axes)
        ]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """ids: with special tokens. target: an index, 0 or 1 per label, an index per token, or the
    first and last token of an answer. context, of a question: its text, and the place of each token
    in it (None for tokens of the question and special ones).
    """

    ids: np.ndarray
    target: Any
    context: tuple[str, list[tuple[int, int] | None]] | None = None


# Examples to tokens, batches to rows.


def encode(
    examples: Sequence[Example], tokenizer: Any, task: Task, max_length: int
) -> list[Encoded]:
    """Tokens and targets; the first token of a word carries its label. Longer texts are cut."""
    how = {"truncation": True, "max_length": max_length}
    out: list[Encoded] = []
    for first in range(0, len(examples), 256):
        some = examples[first : first + 256]
        if task.kind == "tokens":
            batch = tokenizer([list(e.words) for e in some], is_split_into_words=True, **how)
        elif task.kind == "qa":
            out += _encode_questions(some, tokenizer, how)
            continue
        elif any(e.text_pair is not None for e in some):
            batch = tokenizer([e.text for e in some], [e.text_pair or "" for e in some], **how)
        else:
            batch = tokenizer([e.text for e in some], **how)
        for i, example in enumerate(some):
            ids = np.asarray(batch["input_ids"][i], np.int32)
            target: Any = example.label
            if task.kind == "tokens":
                labels = example.label
                assert isinstance(labels, tuple)
                words = batch.word_ids(i)
                previous = [None, *words[:-1]]
                target = np.asarray(
                    [
                        IGNORE_INDEX if word is None or word == before else labels[word]
                        for word, before in zip(words, previous, strict=True)
                    ],
                    np.int32,
                )
            out.append(Encoded(ids, target))
    return out


def _encode_questions(
    examples: Sequence[Example], tokenizer: Any, how: dict[str, Any]
) -> list[Encoded]:
    batch = tokenizer(
        [e.text for e in examples], [e.text_pair for e in examples],
        return_offsets_mapping=True, **how,
    )  # fmt: skip
    out = []
    for i, example in enumerate(examples):
        parts = zip(batch["offset_mapping"][i], batch.sequence_ids(i), strict=True)
        places = [tuple(place) if part == 1 else None for place, part in parts]
        assert isinstance(example.label, tuple) and example.text_pair is not None
        start, end = example.label
        inside = [n for n, p in enumerate(places) if p and p[0] < end and p[1] > start]
        # An answer that was cut off has no target.
        target = np.asarray([inside[0], inside[-1]] if inside else [IGNORE_INDEX, IGNORE_INDEX])
        ids = np.asarray(batch["input_ids"][i], np.int32)
        out.append(Encoded(ids, target, (example.text_pair, places)))  # type: ignore[arg-type]
    return out


def answer_of(encoded: Encoded, logits_T2: np.ndarray, longest: int = 30) -> str:
    """The likeliest span of at most `longest` tokens of the context; logits of start and end."""
    assert encoded.context is not None
    text, places = encoded.context
    own = np.asarray([place is not None for place in places])
    start, end = (np.where(own, logits_T2[:, k], -np.inf) for k in (0, 1))
    scores = start[:, None] + end[None, :]
    spans = np.tri(len(own), len(own), longest - 1, bool) & ~np.tri(len(own), k=-1, dtype=bool)
    scores = np.where(spans, scores, -np.inf)
    if not np.isfinite(scores).any():
        return ""
    first, last = np.unravel_index(np.argmax(scores), scores.shape)
    from_, to = places[first], places[last]
    assert from_ is not None and to is not None
    return text[from_[0] : to[1]]


def pack(
    batch: Sequence[Encoded], slots: int, kind: str, labels: int
) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]:
    """A batch's texts as packed rows [R, T] with their targets, and where each text went.

    T is a power of two from 128 on that the longest text fits, R one of 1, 2, 3, 4, 6, 8, 12, ...:
    few shapes, so few compilations. Targets: [R, slots] indices, [R, slots, labels] of 0 and 1,
    [R, T], or for qa [R, slots, 2] places in the row; IGNORE_INDEX elsewhere. Where: (row,
    segment counted from 0, first token).
    """
    lengths = np.asarray([len(e.ids) for e in batch])
    width = row_size(int(lengths.max()), smallest=128, per_octave=1)
    plan = plan_rows(lengths, width)
    rows = [plan.row(r).tolist() for r in range(len(plan))]
    rows += [[]] * (row_size(len(rows), smallest=1, per_octave=2) - len(rows))
    input_ids, segment_ids = fill_rows([e.ids for e in batch], rows, width)
    shapes = {"classification": (), "multilabel": (labels,), "qa": (2,)}
    shape = (len(rows), width) if kind == "tokens" else (len(rows), slots, *shapes[kind])
    targets = np.full(shape, IGNORE_INDEX, np.int32)
    where = [(0, 0, 0)] * len(batch)
    for r, row in enumerate(rows):
        end = 0
        for number, d in enumerate(row):
            e, start = batch[d], end
            end += len(e.ids)
            if kind == "tokens":
                targets[r, start:end] = e.target
            elif kind == "qa":
                targets[r, number] = np.where(
                    e.target == IGNORE_INDEX, IGNORE_INDEX, e.target + start
                )
            else:
                targets[r, number] = e.target
            where[d] = (r, number, start)
    return {"input_ids": input_ids, "segment_ids": segment_ids, "targets": targets}, where


def sum_of_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) over targets other than IGNORE_INDEX; BCE if each label has its own target."""
    used = targets != IGNORE_INDEX
    safe = jnp.where(used, targets, 0)
    if logits.shape == targets.shape:
        losses = optax.sigmoid_binary_cross_entropy(logits, safe)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    return jnp.sum(jnp.where(used, losses, 0.0)), jnp.sum(used)


def by_segment(logits_RT2: jax.Array, segments_RT: jax.Array, slots: int) -> jax.Array:
    """Each segment's own start and end logits, [R, slots, 2, T]; -inf outside of it."""
    own_RST = segments_RT[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]
    own_RST = own_RST | ~jnp.any(own_RST, axis=2, keepdims=True)  # an empty slot: no NaN
    logits_R2T = jnp.swapaxes(logits_RT2, 1, 2)
    return jnp.where(own_RST[:, :, None, :], logits_R2T[:, None], -jnp.inf)


# The two backends: step, predict, weights.


class JaxSteps:
    """The compiled functions of a model and task; seeds and grid points share them."""

    def __init__(self, config: FinetuneConfig, model_config: ModernBertConfig, kind: str):
        self.model_config, self.kind, self.slots = model_config, kind, config.batch
        self.cls = {
            "tokens": ModernBertForTokenClassification,
            "qa": ModernBertForQuestionAnswering,
        }.get(kind, ModernBertForSequenceClassification)
        self.optimizer = adamw(max_grad_norm=config.clip)
        self.add = jax.jit(self._add, donate_argnums=2)
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2))
        self.logits = jax.jit(self._logits)

    def _logits(self, params, batch, key=None):
        model = module_of(self.cls, self.model_config, params)
        ids, segments = batch["input_ids"], batch["segment_ids"]
        if self.kind == "tokens":
            return model(ids, segment_ids=segments, dropout_key=key).logits
        if self.kind == "qa":
            out = model(ids, segment_ids=segments, dropout_key=key)
            return jnp.stack([out.start_logits, out.end_logits], axis=-1)
        return model(
            ids, segment_ids=segments, num_segments=self.slots, dropout_key=key
        ).logits  # fmt: skip

    def _add(self, trained, frozen, sums, batch, key):
        """Adds a micro-batch to (loss, count, gradients), all of them sums."""

        def loss_of(trained):
            logits = self._logits({**trained, **frozen}, batch, key)
            if self.kind == "qa":
                logits = by_segment(logits, batch["segment_ids"], self.slots)
            return sum_of_losses(logits, batch["targets"])

        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        return jax.tree.map(jnp.add, sums, (loss, count, grads))

    def _update(self, params, adam, sums, factors, lr, weight_decay):
        """One AdamW step on the mean gradient."""
        loss, count, grads = sums
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        rates = {path: lr * factor for path, factor in factors.items()}
        updates, adam = self.optimizer.update(
            grads, adam, params, learning_rate=rates, weight_decay=weight_decay
        )
        new = optax.apply_updates(params, updates)
        zeros = jax.tree.map(jnp.zeros_like, grads)
        return new, adam, (jnp.zeros_like(loss), jnp.zeros_like(sums[1]), zeros), loss / count


class JaxModel:
    """One run's weights and optimizer, in this library."""

    def __init__(self, config: FinetuneConfig, steps: JaxSteps, folder: Any, seed: int):
        self.config, self.steps = config, steps
        model = steps.cls.from_pretrained(
            folder, dtype=config.dtype, param_dtype="float32", seed=seed,
            num_labels=steps.model_config.num_labels, id2label=steps.model_config.id2label,
            problem_type=steps.model_config.problem_type,
        )  # fmt: skip
        params = flatten(model)
        frozen = config.freeze_encoder
        self.trained = {k: v for k, v in params.items() if not (frozen and k.startswith("model."))}
        self.frozen = {k: v for k, v in params.items() if k not in self.trained}
        self.adam = steps.optimizer.init(self.trained)
        zeros = jax.tree.map(jnp.zeros_like, self.trained)
        self.sums = (jnp.zeros(()), jnp.zeros((), jnp.int32), zeros)
        layers = steps.model_config.num_hidden_layers
        self.factors = {
            k: np.float32(config.layer_decay ** _below_the_top(k, layers)) for k in self.trained
        }
        self.key = jax.random.key(seed)

    def step(self, micro_batches: Sequence[Sequence[Encoded]], lr: float) -> float:
        """One update; the mean loss over all micro-batches."""
        for batch in micro_batches:
            self.key, key = jax.random.split(self.key)
            self.sums = self.steps.add(
                self.trained, self.frozen, self.sums, self._rows(batch)[0], key
            )
        self.trained, self.adam, self.sums, loss = self.steps.update(
            self.trained, self.adam, self.sums, self.factors, np.float32(lr),
            np.float32(self.config.weight_decay),
        )  # fmt: skip
        return float(loss)

    def predict(self, batch: Sequence[Encoded]) -> list[np.ndarray]:
        """Logits of each example: [labels], or [tokens, labels]."""
        rows, where = self._rows(batch)
        logits = np.asarray(self.steps.logits({**self.trained, **self.frozen}, rows))
        if self.steps.kind not in ("tokens", "qa"):
            return [logits[r, number] for r, number, _ in where]
        return [
            logits[r, start : start + len(e.ids)]
            for e, (r, _, start) in zip(batch, where, strict=True)
        ]

    def _rows(self, batch: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], list]:
        labels = self.steps.model_config.num_labels
        return pack(batch, self.config.batch, self.steps.kind, labels)

    def weights(self) -> dict[str, np.ndarray]:
        """A copy on the host."""
        return {k: np.array(v) for k, v in (self.trained | self.frozen).items()}

    def save(self, weights: dict[str, np.ndarray], folder: pathlib.Path, tokenizer: Any) -> None:
        """Writes HF's layout."""
        config = self.steps.model_config.replace(dtype="float32")
        module_of(self.steps.cls, config, weights).save_pretrained(folder, tokenizer=tokenizer)


def _below_the_top(path: str, layers: int) -> int:
    """How many layers lie between a parameter and the head; the embedding is below them all."""
    if ".embeddings." in path:
        return layers + 1
    if ".layers." in path:
        return layers - int(path.split(".layers.")[1].split(".")[0])
    return 0


class TorchModel:
    """Any transformers model in torch, padded batches, through the same harness."""

    def __init__(self, config: FinetuneConfig, task: Task, labels: int, pad: int, seed: int):
        import torch
        import transformers

        self.torch, self.config, self.kind, self.pad = torch, config, task.kind, pad
        torch.manual_seed(seed)
        cls = {
            "tokens": transformers.AutoModelForTokenClassification,
            "qa": transformers.AutoModelForQuestionAnswering,
        }.get(task.kind, transformers.AutoModelForSequenceClassification)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = cls.from_pretrained(config.model, num_labels=labels).to(self.device)
        base = getattr(self.model, self.model.base_model_prefix)
        if config.freeze_encoder:
            base.requires_grad_(False)
        if config.layer_decay != 1.0:
            raise ValueError("layer_decay: expected 1 with --backend torch")
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                plain = name.endswith(".bias") or "norm" in name.lower()
                groups[plain]["params"].append(p)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    def _inputs(self, batch: Sequence[Encoded]) -> tuple[Any, Any]:
        torch = self.torch
        width = max(len(e.ids) for e in batch)
        ids = np.full((len(batch), width), self.pad)
        mask = np.zeros((len(batch), width), np.int64)
        labels = np.full((len(batch), width), IGNORE_INDEX)
        for row, e in enumerate(batch):
            ids[row, : len(e.ids)], mask[row, : len(e.ids)] = e.ids, 1
            if self.kind == "tokens":
                labels[row, : len(e.ids)] = e.target
        if self.kind != "tokens":
            labels = np.asarray([e.target for e in batch])
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {k: v.to(self.device) for k, v in inputs.items()}, torch.tensor(labels).to(
            self.device
        )

    def step(self, micro_batches: Sequence[Sequence[Encoded]], lr: float) -> float:
        """One update; the mean loss over all micro-batches."""
        torch, F = self.torch, self.torch.nn.functional
        self.model.train()
        total, count = 0.0, 0
        for batch in micro_batches:
            inputs, labels = self._inputs(batch)
            with torch.autocast(self.device, torch.bfloat16, self.config.dtype == "bfloat16"):
                logits = self._logits(inputs)
            if self.kind == "multilabel":
                loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
                count += labels.numel()
            else:
                loss = F.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), labels.reshape(-1),
                    ignore_index=IGNORE_INDEX, reduction="sum",
                )  # fmt: skip
                count += int((labels != IGNORE_INDEX).sum())
            loss.backward()
            total += loss.item()
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad /= max(count, 1)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / max(count, 1)

    def _logits(self, inputs: dict[str, Any]) -> Any:
        """Float32; of questions [B, 2, T], with padding at -inf."""
        out = self.model(**inputs)
        if self.kind != "qa":
            return out.logits.float()
        both = self.torch.stack([out.start_logits, out.end_logits], 1).float()
        return both.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)

    def predict(self, batch: Sequence[Encoded]) -> list[np.ndarray]:
        """Logits of each example: [labels], or [tokens, labels]."""
        self.model.eval()
        with self.torch.no_grad():
            logits = self._logits(self._inputs(batch)[0]).cpu().numpy()
        if self.kind not in ("tokens", "qa"):
            return list(logits)
        if self.kind == "qa":
            logits = logits.swapaxes(1, 2)
        return [row[: len(e.ids)] for row, e in zip(logits, batch, strict=True)]

    def weights(self) -> dict[str, Any]:
        """A copy on the host."""
        return {k: v.cpu().clone() for k, v in self.model.state_dict().items()}

    def load(self, weights: dict[str, Any]) -> None:
        """Takes weights back."""
        self.model.load_state_dict(weights)

    def save(self, weights: dict[str, Any], folder: pathlib.Path, tokenizer: Any) -> None:
        """Writes HF's layout."""
        self.load(weights)
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# A run, and all of them.


class _Finetuning:
    """What the runs of one command share: data, tokens, compiled steps, the best model so far."""

    def __init__(self, config: FinetuneConfig):
        config.validate()
        self.config = config
        self.out = pathlib.Path(config.out or f"runs/finetune/{config.task}")
        self.task = task_named(config.task)
        self.data: Data = self.task.load(pathlib.Path(config.data))
        self.tokenizer, longest = _tokenizer(config)
        if config.backend == "jax":
            self.folder = start_folder(config.model)
            start = ModernBertConfig.from_json(self.folder / "config.json")
            self.model_config = start.replace(
                dtype=config.dtype,
                param_dtype="float32",
                num_labels=len(self.data.labels) or 2,  # qa: start and end
                id2label=self.data.labels,
                problem_type={
                    "classification": "single_label_classification",
                    "multilabel": "multi_label_classification",
                }.get(self.task.kind),
            )
        cut = min(config.max_length, longest)
        self.splits = {
            split: encode(getattr(self.data, split), self.tokenizer, self.task, cut)
            for split in ("train", "validation", "test")
        }
        for split, examples in self.splits.items():
            if not examples:
                raise ValueError(f"{config.task}: {config.data} has no example in {split}")
        self.steps: dict[int, JaxSteps] = {}  # by batch size
        self.lock = threading.Lock()

    def model(self, config: FinetuneConfig, seed: int) -> JaxModel | TorchModel:
        """Fresh weights for one run."""
        if config.backend == "torch":
            pad = self.tokenizer.pad_token_id or 0
            return TorchModel(config, self.task, len(self.data.labels) or 2, pad, seed)
        with self.lock:
            if config.batch not in self.steps:
                self.steps[config.batch] = JaxSteps(config, self.model_config, self.task.kind)
        return JaxModel(config, self.steps[config.batch], self.folder, seed)

    def run(self, config: FinetuneConfig, seed: int, folder: pathlib.Path) -> dict[str, Any]:
        """One seed of one point: trains, picks the best epoch, scores the test split.

        A finished run of the same settings is read back instead.
        """
        settings = {**dataclasses.asdict(config), "seed": seed}
        settings = {k: v for k, v in settings.items() if k not in _FREE}
        result_file = folder / "result.json"
        if result_file.exists():
            found = json.loads(result_file.read_text())
            if found["settings"] == json.loads(json.dumps(settings)):
                return found
            raise ValueError(
                f"{result_file} is of other settings; choose another --out, or remove it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        model = self.model(config, seed)
        train = self.splits["train"]
        a_step = config.batch * config.accumulation
        steps = -(-len(train) // a_step) * config.epochs
        best: tuple[float, int, Any] = (-1.0, 0, None)
        losses: list[float] = []
        seconds: list[float] = []
        epochs: list[dict[str, float]] = []
        bar = tqdm(
            total=steps, desc=f"{folder.parent.name} seed {seed}", unit=" steps",
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        for epoch in range(config.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(train))
            for micro_batches in _steps(order, config):
                lr = config.lr * (1.0 - len(losses) / steps)
                batches = [[train[i] for i in batch] for batch in micro_batches]
                before = time.perf_counter()
                losses.append(model.step(batches, lr))
                seconds.append(time.perf_counter() - before)
                bar.update()
                bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
                if not math.isfinite(losses[-1]):
                    raise RuntimeError(
                        f"seed {seed}, step {len(losses)}: the loss is {losses[-1]}; lower --lr"
                    )
            scores = self.score(model, "validation", config.batch)
            epochs.append({"epoch": epoch + 1, self.task.metric: scores[self.task.metric]})
            if scores[self.task.metric] > best[0]:
                best = (scores[self.task.metric], epoch + 1, model.weights())
        bar.close()
        if best[1] != config.epochs:
            self._take_back(model, best[2])
        result = {
            "settings": settings,
            "best_epoch": best[1],
            "validation": {self.task.metric: best[0]},
            "test": self.score(model, "test", config.batch),
            "epochs": epochs,
            "losses": losses,
            "seconds": time.perf_counter() - started,
            "median_step_seconds": float(np.median(seconds)),  # without the steps that compile
        }
        if config.save_model:
            self._keep_if_best(model, best[2], best[0], folder)
        write_text(result_file, json.dumps(result, indent=1) + "\n")
        return result

    def _take_back(self, model: JaxModel | TorchModel, weights: Any) -> None:
        if isinstance(model, TorchModel):
            model.load(weights)
        else:
            model.trained = {k: jnp.asarray(weights[k]) for k in model.trained}

    def _keep_if_best(
        self, model: JaxModel | TorchModel, weights: Any, score: float, folder: pathlib.Path
    ) -> None:
        """OUT/model is the best run's by validation, over all seeds and points."""
        with self.lock:
            record = self.out / "model" / "score.json"
            if record.exists() and json.loads(record.read_text())["validation"] >= score:
                return
            model.save(weights, self.out / "model", self.tokenizer)
            of = folder.relative_to(self.out).as_posix()
            write_text(record, json.dumps({"validation": score, "run": of}) + "\n")

    def write_card(self, summary: dict[str, Any]) -> None:
        """Writes the card of OUT/model, which tells of all seeds; nothing without a model."""
        record = self.out / "model" / "score.json"
        of = json.loads(record.read_text()).get("run") if record.exists() else None
        if not of:
            return
        saved = json.loads((self.out / of / "result.json").read_text())
        counts = {split: len(examples) for split, examples in self.splits.items()}
        facts = finetuning_facts(self.config, self.task, counts, summary, saved)
        write_card(self.out / "model", facts)

    def score(self, model: JaxModel | TorchModel, split: str, batch: int) -> dict[str, Any]:
        """The scores of a split."""
        examples = self.splits[split]
        # By length, so that few sizes of row occur.
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
        logits: dict[int, np.ndarray] = {}
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            logits.update(zip(some, model.predict([examples[i] for i in some]), strict=True))
        guesses = [logits[i] for i in range(len(examples))]
        labels = self.data.labels
        if self.task.kind == "classification":
            truth = np.asarray([e.target for e in examples])
            return classification_scores(truth, np.asarray(guesses).argmax(-1), labels)
        if self.task.kind == "multilabel":
            truth = np.asarray([e.target for e in examples])
            return multilabel_scores(truth, np.asarray(guesses) > 0, labels)
        if self.task.kind == "qa":
            truth = [e.text_pair[slice(*e.label)] for e in getattr(self.data, split)]  # type: ignore[index,misc]
            pairs = zip(examples, guesses, strict=True)
            return answer_scores(truth, [answer_of(e, guess) for e, guess in pairs])
        named = lambda ids: [labels[i] for i in ids]  # noqa: E731
        return entity_scores(
            [named(e.target[e.target != IGNORE_INDEX]) for e in examples],
            [
                named(guess[e.target != IGNORE_INDEX].argmax(-1))
                for e, guess in zip(examples, guesses, strict=True)
            ],
        )


def _tokenizer(config: FinetuneConfig) -> tuple[Any, int]:
    """(tokenizer with a space before the first word, the most tokens that the model takes)."""
    if config.backend == "torch":
        import transformers

        theirs = transformers.AutoConfig.from_pretrained(config.model)
        # transformers 5 does not heed add_prefix_space for ModernBERT's tokenizer: ours does.
        if theirs.model_type != "modernbert":
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                config.model, add_prefix_space=True
            )
            longest = tokenizer.model_max_length
            return tokenizer, longest if longest < 1_000_000 else 512
    folder = start_folder(config.model)
    positions = ModernBertConfig.from_json(folder / "config.json").max_position_embeddings
    return AutoTokenizer.from_pretrained(folder, add_prefix_space=True), positions


# What may differ when a half-done command is taken up again.
_FREE = {"out", "seeds", "grid", "devices", "save_model"}


def _steps(order: np.ndarray, config: FinetuneConfig) -> Iterator[list[list[int]]]:
    """The examples of each step, by micro-batch."""
    a_step = config.batch * config.accumulation
    for first in range(0, len(order), a_step):
        some = order[first : first + a_step].tolist()
        yield [some[i : i + config.batch] for i in range(0, len(some), config.batch)]


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """All seeds of all points of the grid; returns what OUT/results.json holds.

    Writes OUT/POINT/seed-N/result.json for each run, OUT/results.json, OUT/table.md, OUT/curves.png
    and the best model in OUT/model. A command that was interrupted goes on where it was. Raises
    ValueError or FileNotFoundError with one line for bad input.
    """
    shared = _Finetuning(config)
    counts = ", ".join(f"{len(s)} {name}" for name, s in shared.splits.items())
    print(f"{config.task}: {counts}; {len(shared.data.labels)} labels", flush=True)
    for reason, count in shared.data.skipped.items():
        print(f"  left out, {reason}: {count:,}", flush=True)
    points = config.points()
    jobs = [(i, seed) for i in range(len(points)) for seed in config.seeds]
    free = list(jax.local_devices()[: config.devices]) if config.backend == "jax" else [None]
    if config.devices > len(free):
        raise ValueError(f"devices: expected at most {len(free)}, got {config.devices}")

    def job(item: tuple[int, int]) -> dict[str, Any]:
        index, seed = item
        folder = shared.out / _point_name(config, points[index]) / f"seed-{seed}"
        with shared.lock:
            device = free.pop()
        try:
            with jax.default_device(device):
                return shared.run(points[index], seed, folder)
        finally:
            with shared.lock:
                free.append(device)

    with concurrent.futures.ThreadPoolExecutor(config.devices) as pool:
        results = list(pool.map(job, jobs))
    summary = {
        "task": config.task,
        "model": config.model,
        "backend": config.backend,
        "metric": shared.task.metric,
        "labels": list(shared.data.labels),
        "points": [
            _summary(config, point, [r for (i, _), r in zip(jobs, results, strict=True) if i == n])
            for n, point in enumerate(points)
        ],
    }
    write_text(shared.out / "results.json", json.dumps(summary, indent=1) + "\n")
    write_text(shared.out / "table.md", table(shared.task, summary, results))
    shared.write_card(summary)
    _plot(shared.out / "curves.png", shared.task, jobs, points, config, results)
    print((shared.out / "table.md").read_text())
    return summary


def _point_name(config: FinetuneConfig, point: FinetuneConfig) -> str:
    names = [item.partition("=")[0] for item in config.grid]
    return "_".join(f"{name}={getattr(point, name):g}" for name in names) or "default"


def _summary(config: FinetuneConfig, point: FinetuneConfig, results: list) -> dict[str, Any]:
    """Mean, median, deviation, least and greatest of every number of the test scores."""
    numbers = [{k: v for k, v in r["test"].items() if isinstance(v, int | float)} for r in results]
    ways = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max}
    scores = {
        name: {way: float(f([n[name] for n in numbers])) for way, f in ways.items()}
        | {"std": float(np.std([n[name] for n in numbers], ddof=1)) if len(numbers) > 1 else 0.0}
        for name in numbers[0]
    }
    return {
        "point": _point_name(config, point),
        "seeds": [r["settings"]["seed"] for r in results],
        "validation": float(np.mean([next(iter(r["validation"].values())) for r in results])),
        "test": scores,
        "seconds": float(np.mean([r["seconds"] for r in results])),
    }


def table(task: Task, summary: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Markdown: each point's test scores, the published ones, and the best run label by label."""
    lines = [
        f"# {task.title}",
        "",
        f"Test {task.metric}, per cent; {summary['model']} ({summary['backend']})",
        "",
        "| settings | seeds | mean | median | std | min | max | validation | s a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in summary["points"]:
        score = point["test"][task.metric]
        cells = [f"{100 * score[k]:.2f}" for k in ("mean", "median", "std", "min", "max")]
        lines.append(
            f"| {point['point']} | {len(point['seeds'])} | {' | '.join(cells)} | "
            f"{100 * point['validation']:.2f} | {point['seconds']:.0f} |"
        )
    if task.published:
        lines += ["", "| published | test |", "|---|---|"]
        lines += [f"| {model} | {score} |" for model, score in task.published.items()]
    best = max(results, key=lambda r: r["validation"][task.metric])
    per_label = best["test"].get("per_label", {})
    if per_label:
        lines += ["", f"Label by label, seed {best['settings']['seed']}:", ""]
        lines += ["| label | precision | recall | f1 | support |", "|---|---|---|---|---|"]
    for label, s in per_label.items():
        lines.append(
            f"| {label} | {100 * s['precision']:.1f} | {100 * s['recall']:.1f} | "
            f"{100 * s['f1']:.1f} | {s['support']} |"
        )
    if "confusion" in best["test"]:
        names = summary["labels"]
        lines += ["", "Confusion (rows are the truth):", ""]
        lines += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for name, row in zip(names, best["test"]["confusion"], strict=True):
            lines.append(f"| {name} | {' | '.join(str(n) for n in row)} |")
    return "\n".join(lines) + "\n"


def _plot(path: pathlib.Path, task: Task, jobs, points, config: FinetuneConfig, results) -> None:
    """Training loss and validation score of every run."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's pictures stay as they are

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (index, seed), result in zip(jobs, results, strict=True):
        label = f"{_point_name(config, points[index])} seed {seed}"
        steps = np.arange(1, len(result["losses"]) + 1)
        left.plot(steps, result["losses"], lw=0.9, label=label)
        right.plot(
            [e["epoch"] for e in result["epochs"]], [e[task.metric] for e in result["epochs"]], "o-"
        )
    left.set(xlabel="step", title="training loss")
    right.set(xlabel="epoch", title=f"validation {task.metric}")
    if len(jobs) <= 10:
        left.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
