"""Fine-tuning with this library: the loss, the update and the predictions on packed rows."""

import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from modernbert_jax import (
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    lora,
)
from modernbert_jax.checkpoint.hf import SafetensorsFolder
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax
from modernbert_jax.checkpoint.params import flatten, initialize, module_of, variables
from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.tokenizer import AutoTokenizer, check_ids
from modernbert_jax.weights import HEADS, is_adapter

from ..common.card import start_facts
from ..common.optimizer import adamw
from ..common.settings import with_adapters
from ..common.workdir import start_folder
from .config import FinetuneConfig
from .encode import Encoded, pack
from .tasks.task import KIND

MODELS = {
    "classification": ModernBertForSequenceClassification,
    "multilabel": ModernBertForSequenceClassification,
    "tokens": ModernBertForTokenClassification,
    "qa": ModernBertForQuestionAnswering,
}
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
}


class JaxBackend:
    """What all runs share: the tokenizer, the weights (read once) and the compiled functions."""

    def __init__(self, config: FinetuneConfig, kind: KIND, labels: Sequence[str]):
        folder = start_folder(config.model)
        self.cls = MODELS[kind]
        self.kind: KIND = kind
        head = {
            "num_labels": len(labels) or 2,  # qa: start and end
            "id2label": tuple(labels),
            "problem_type": PROBLEM_TYPES.get(kind),
        }
        model = self.cls.from_pretrained(folder, dtype=config.dtype, param_dtype="float32", **head)
        self.model_config = model.config
        self.tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
        check_ids(self.tokenizer, model.config.vocab_size)
        self.max_length = model.config.max_position_embeddings
        self.weights = {path: np.asarray(value) for path, value in flatten(model).items()}
        saved = (
            load_orbax(folder)["params"]
            if is_orbax(folder)
            else SafetensorsFolder(folder, model.config.tie_word_embeddings)
        )
        # The weights that each seed initializes: those of the head that the checkpoint lacks.
        self.new = tuple(k for k in self.weights if k.startswith(HEADS) and k not in saved)
        self.steps: dict[int, _Steps] = {}  # by batch size
        self.lock = threading.Lock()

    def start(self, config: FinetuneConfig, seed: int) -> "JaxModel":
        """The weights of the checkpoint and a new head, before the first step of a run."""
        with self.lock:
            if config.batch_size not in self.steps:
                self.steps[config.batch_size] = _Steps(self, config)
        new = initialize(self.cls, self.model_config, seed, self.new) if self.new else {}
        params = {path: new.get(path, value) for path, value in self.weights.items()}
        if config.lora_rank is not None:
            model = module_of(self.cls, self.model_config, params)
            lora.add_lora(
                model.model, config.lora_rank, config.lora_alpha, config.lora_targets,
                rngs=nnx.Rngs(seed),
            )  # fmt: skip
            factors = variables(model, lora.LoRAParam)
            params |= {path: factor.get_value() for path, factor in factors.items()}
        return JaxModel(config, self, self.steps[config.batch_size], params, seed)


class _Steps:
    """The compiled functions for a batch size; seeds and grid points share them."""

    def __init__(self, backend: JaxBackend, config: FinetuneConfig):
        self.cls, self.model_config = backend.cls, backend.model_config
        self.kind, self.slots = backend.kind, config.batch_size
        self.config = config
        self.optimizer = adamw(max_grad_norm=config.max_grad_norm)
        self.add = jax.jit(self._add, donate_argnums=2)
        self.update = jax.jit(self._update, donate_argnums=(0, 1, 2))
        self.logits = jax.jit(self._logits)

    def _logits(self, params, batch, key=None):
        """[R, slots, labels], or [R, T, labels] for tokens, or [R, T, 2] for qa."""
        model = with_adapters(self.cls, self.model_config, params, self.config)
        options = {"segment_ids": batch["segment_ids"], "dropout_key": key}
        if self.kind in ("classification", "multilabel"):
            options["num_segments"] = self.slots
        out = model(batch["input_ids"], **options)
        if self.kind == "qa":
            return jnp.stack([out.start_logits, out.end_logits], axis=-1)
        return out.logits

    def _add(self, trained, frozen, sums, batch, key):
        """Adds the loss, the number of targets and the gradients of a micro-batch to `sums`."""

        def loss_of(trained):
            logits = self._logits({**trained, **frozen}, batch, key)
            if self.kind == "qa":
                logits = by_segment(logits, batch["segment_ids"], self.slots)
            return sum_of_losses(logits, batch["targets"])

        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        return jax.tree.map(jnp.add, sums, (loss, count, grads))

    def _update(self, params, state, sums, factors, learning_rate, weight_decay):
        """One step of AdamW on the mean gradient; also returns zeroed sums and the mean loss."""
        loss, count, grads = sums
        mean = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / mean, grads)
        rates = {path: learning_rate * factor for path, factor in factors.items()}
        updates, state = self.optimizer.update(
            grads, state, params, learning_rate=rates, weight_decay=weight_decay
        )
        params = optax.apply_updates(params, updates)
        return params, state, jax.tree.map(jnp.zeros_like, sums), loss / mean


def sum_of_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the losses, in nats, of all targets other than IGNORE_INDEX.

    Binary cross-entropy if each logit has its own target, else softmax cross-entropy.
    """
    used = targets != IGNORE_INDEX
    safe = jnp.where(used, targets, 0)
    if logits.shape == targets.shape:
        losses = optax.sigmoid_binary_cross_entropy(logits, safe)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    return jnp.sum(jnp.where(used, losses, 0.0)), jnp.sum(used)


def by_segment(logits_RT2: jax.Array, segments_RT: jax.Array, slots: int) -> jax.Array:
    """The start and end logits of each segment, [R, slots, 2, T]; -inf outside the segment."""
    own_RST = segments_RT[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]
    own_RST = own_RST | ~jnp.any(own_RST, axis=2, keepdims=True)  # an empty slot makes no NaN
    logits_R2T = jnp.swapaxes(logits_RT2, 1, 2)
    return jnp.where(own_RST[:, :, None, :], logits_R2T[:, None], -jnp.inf)


class JaxModel:
    """The weights and the optimizer state of one run."""

    def __init__(
        self,
        config: FinetuneConfig,
        backend: JaxBackend,
        steps: _Steps,
        params: dict[str, Any],
        seed: int,
    ):
        self.config, self.backend, self.steps = config, backend, steps
        self.load(params)
        self.state = steps.optimizer.init(self.trained)
        zeros = jax.tree.map(jnp.zeros_like, self.trained)
        self.sums = (jnp.zeros(()), jnp.zeros((), jnp.int32), zeros)
        layers = backend.model_config.num_hidden_layers
        self.factors = {
            k: np.float32(config.layer_decay ** _layers_above(k, layers)) for k in self.trained
        }
        self.key = jax.random.key(seed)

    def step(self, micro_batches: Sequence[Sequence[Encoded]], learning_rate: float) -> float:
        """Makes one optimizer step; returns the mean loss over its micro-batches."""
        for batch in micro_batches:
            self.key, key = jax.random.split(self.key)
            self.sums = self.steps.add(
                self.trained, self.frozen, self.sums, self._pack(batch)[0], key
            )
        self.trained, self.state, self.sums, loss = self.steps.update(
            self.trained, self.state, self.sums, self.factors, np.float32(learning_rate),
            np.float32(self.config.weight_decay),
        )  # fmt: skip
        return float(loss)

    def predict(self, batch: Sequence[Encoded]) -> list[np.ndarray]:
        """The logits of each example: [labels], or [tokens, labels], or [tokens, 2] for qa."""
        rows, where = self._pack(batch)
        logits = np.asarray(self.steps.logits(self.trained | self.frozen, rows))
        if self.backend.kind in ("classification", "multilabel"):
            return [logits[r, segment] for r, segment, _ in where]
        return [
            logits[r, start : start + len(e.input_ids)]
            for e, (r, _, start) in zip(batch, where, strict=True)
        ]

    def _pack(self, batch: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], list]:
        labels = self.backend.model_config.num_labels
        return pack(batch, self.config.batch_size, self.backend.kind, labels)

    def weights(self) -> dict[str, np.ndarray]:
        """A copy of the weights on the host."""
        return {k: np.array(v) for k, v in (self.trained | self.frozen).items()}

    def load(self, weights: dict[str, Any]) -> None:
        """Sets the weights to a copy of these."""
        params = {k: jnp.array(v) for k, v in weights.items()}
        frozen = self.config.freeze_encoder or self.config.lora_rank is not None
        self.trained = {
            k: v
            for k, v in params.items()
            if not (frozen and k.startswith("model.")) or is_adapter(k)
        }
        self.frozen = {k: v for k, v in params.items() if k not in self.trained}

    def save(self, weights: dict[str, np.ndarray], folder: pathlib.Path) -> None:
        """Writes weights and tokenizer as a Hugging Face folder.

        Adapters are merged, and written to the folder "adapter" beside it, together with the head.
        """
        config = self.backend.model_config.replace(dtype="float32")
        params = {path: jnp.asarray(value) for path, value in weights.items()}
        model = with_adapters(self.backend.cls, config, params, self.config)
        if self.config.lora_rank is not None:
            heads = (head.removesuffix(".") for head in HEADS)
            lora.save_adapter(
                model,
                folder.with_name("adapter"),
                base_model=start_facts(self.config.model).get("base_model"),
                modules_to_save=[head for head in heads if hasattr(model, head)],
            )
            lora.merge(model)
        model.save_pretrained(folder, tokenizer=self.backend.tokenizer)


def _layers_above(path: str, layers: int) -> int:
    """The number of layers from a parameter up to the head; the embedding is below all of them."""
    if ".embeddings." in path:
        return layers + 1
    if ".layers." in path:
        return layers - int(path.split(".layers.")[1].split(".")[0])
    return 0
