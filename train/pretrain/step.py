"""One optimizer step and one evaluation step: pure functions of arrays on a mesh, ready for jit."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.attention import sharded
from modernbert_jax.checkpoint.params import flatten, module_of, param_shapes
from modernbert_jax.packing import IGNORE_INDEX

from ..common.optimizer import StableAdamWState, decay_mask, stable_adamw
from ..common.sharding import (
    BATCH,
    TENSOR,
    gather,
    local_slots,
    padded_batch_size,
    param_shardings,
    scatter,
    to_devices,
)
from ..common.watch import norms_by_kind
from .config import TrainConfig
from .embedding import look_up
from .loss import masked_cross_entropy

# Arrays [A, B, ...]: A micro-batches of B packed sequences; see data.Batch.
Batch = Mapping[str, jax.Array]
_INPUTS = ("input_ids", "segment_ids", "predict_positions", "labels")

_REMAT: dict[str, bool | Callable[..., bool]] = {
    "none": False,
    "layers": True,
    "all_but_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TrainState(NamedTuple):
    """params: {path: array}, param_dtype. optimizer: moments and the step, which never restarts."""

    params: dict[str, jax.Array]
    optimizer: StableAdamWState


class Trainer:
    """The compiled steps of one model on one mesh, and where their state is placed.

    config: what changes a step (optimizer, seed, remat, loss_chunk, ...). model_config: the model
    that is trained. mesh: the devices; they may be absent, since `plan` only compiles for them.
    """

    def __init__(self, config: TrainConfig, model_config: ModernBertConfig, mesh: Mesh):
        self.config, self.model_config, self.mesh = config, model_config, mesh
        self.shapes = param_shapes(ModernBertForMaskedLM, model_config)
        optimizer = config.optimizer
        self.tx = stable_adamw(
            optimizer.b1,
            optimizer.b2,
            optimizer.eps,
            optimizer.weight_decay,
            decay_mask(self.shapes),
        )
        params = param_shardings(self.shapes, mesh)
        self.replicated = NamedSharding(mesh, P())
        self.shardings = TrainState(params, StableAdamWState(self.replicated, params, params))  # type: ignore[arg-type]
        self.train_step = jax.jit(
            self._train, donate_argnums=0, out_shardings=(self.shardings, self.replicated)
        )
        self.eval_step = jax.jit(self._evaluate, out_shardings=self.replicated)

    def fresh(self) -> TrainState:
        """Returns random weights from config.seed and zero moments, created on their devices."""

        def make():
            params = flatten(
                ModernBertForMaskedLM(self.model_config, rngs=nnx.Rngs(self.config.seed))
            )
            return TrainState(params, self.tx.init(params))  # type: ignore[arg-type]

        return jax.jit(make, out_shardings=self.shardings)()

    def local_slots(self) -> np.ndarray:
        """Returns which sequences of a micro-batch this process provides, in order."""
        size = padded_batch_size(self.config.micro_batch_size, self.mesh)
        return local_slots(size, self.mesh)

    def to_devices(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns global arrays [A, B, ...] from this process's sequences [A, local, ...]."""
        size = padded_batch_size(self.config.micro_batch_size, self.mesh)
        return to_devices(arrays, self.local_slots(), size, self.mesh)

    def _train(self, state: TrainState, batch: Batch, learning_rate, max_learning_rate):
        """step(state, batch, learning_rate, max_learning_rate) -> (state, metrics).

        The loss depends neither on the number of micro-batches (with loss_weighting "tokens") nor
        on that of devices. metrics, float32 scalars: loss (nats), accuracy, masked (tokens to
        predict), norms of gradients and parameters in total and by kind of weight, and the sum of
        each batch array that is not an input of the model.
        """
        loss, correct, grads = self._gradients(state, batch)
        updates: Any
        optimizer: Any
        updates, optimizer = self.tx.update(
            grads,
            state.optimizer,
            state.params,
            learning_rate=learning_rate,
            max_learning_rate=max_learning_rate,
        )
        params: Any = optax.apply_updates(state.params, updates)
        masked = jnp.sum(batch["labels"] != IGNORE_INDEX).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": correct / jnp.maximum(masked, 1.0),
            "grad_norm": optax.tree.norm(grads),
            "masked": masked,
        }
        for name, tree in (("grad_norm", grads), ("param_norm", state.params)):
            metrics |= {f"{name}/{kind}": x for kind, x in norms_by_kind(tree).items()}
        metrics |= {k: jnp.sum(batch[k]).astype(jnp.float32) for k in batch if k not in _INPUTS}
        return TrainState(params, optimizer), metrics

    def _gradients(self, state: TrainState, batch: Batch):
        """Returns (loss, correct predictions, gradients), summed over micro-batches in float32.

        Each sequence has a dropout key of its own, folded from (seed, step, its number in the
        step), so that dropout depends neither on the mesh nor on the number of micro-batches.
        """
        weight_A = _loss_weights(self.config.loss_weighting, batch)
        key = jax.random.key(self.config.seed, impl="threefry2x32")
        key = jax.random.fold_in(key, state.optimizer.step)
        inputs = {k: batch[k] for k in _INPUTS}
        params = gather(state.params, self.mesh, self.model_config.dtype)

        def weighted_loss(params, micro, index):
            number_B = index * self.config.micro_batch_size + jnp.arange(len(micro["labels"]))
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)
            loss, correct = self._forward(params, micro, key_B)
            return loss * weight_A[index], correct

        gradient = jax.value_and_grad(weighted_loss, has_aux=True)

        def float32(grads):
            # Gradients are split over fsdp only after they have been added up: splitting each
            # layer's at once would compute slices of D / fsdp, too narrow for a TPU's matrix units.
            return gather(
                {k: g.astype(jnp.float32) for k, g in grads.items()}, self.mesh, jnp.float32
            )

        def accumulate(sums, item):
            (loss, correct), grads = gradient(params, *item)
            return jax.tree.map(jnp.add, sums, (loss, correct, float32(grads))), None

        micro_batches = batch["labels"].shape[0]
        if micro_batches == 1:
            (loss, correct), grads = gradient(params, jax.tree.map(lambda x: x[0], inputs), 0)
            grads = float32(grads)
        else:
            zeros = {k: jnp.zeros(p.shape, jnp.float32) for k, p in state.params.items()}
            zero = jnp.zeros((), jnp.float32)
            (loss, correct, grads), _ = jax.lax.scan(
                accumulate, (zero, zero, float32(zeros)), (inputs, jnp.arange(micro_batches))
            )
        return loss, correct, scatter(grads, self.mesh)

    def _evaluate(self, params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """step(params, batch) -> (sum of losses, correct predictions, labels) of a micro-batch."""
        params = gather(params, self.mesh, self.model_config.dtype)
        loss, correct = self._forward(params, jax.tree.map(lambda x: x[0], dict(batch)), None)
        return loss, correct, jnp.sum(batch["labels"] != IGNORE_INDEX)

    def _forward(self, params, batch: Batch, dropout_key) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of losses, correct predictions) of one micro-batch; `params` gathered."""
        config = self.config
        model = module_of(ModernBertForMaskedLM, self.model_config, params)
        embedding = model.model.embeddings.tok_embeddings
        embeds_BLD = look_up(
            self.mesh, embedding.pad_token_id, embedding.weight[...], batch["input_ids"]
        )
        hidden_BPD = model.predict_hidden(
            segment_ids=batch["segment_ids"],
            inputs_embeds=embeds_BLD,
            predict_positions=batch["predict_positions"],
            dropout_key=dropout_key,
            attention=sharded(
                self.mesh, rows=BATCH, heads=TENSOR, implementation=config.attention or None
            ),
            scan_layers=config.scan_layers,
            remat=_REMAT[config.remat],
        )
        return masked_cross_entropy(
            hidden_BPD,
            model.decoder_weight_VD,
            model.decoder_bias_V,
            batch["labels"],
            config.loss_chunk,
            self.mesh,
        )


def _loss_weights(weighting: str, batch: Batch) -> jax.Array:
    """Returns the factor of each micro-batch's sum of losses, [A]; see TrainConfig."""
    masked_A = jnp.sum(batch["labels"] != IGNORE_INDEX, axis=(1, 2)).astype(jnp.float32)
    if weighting == "tokens":
        return jnp.full_like(masked_A, 1.0) / jnp.maximum(jnp.sum(masked_A), 1.0)
    # Composer counts the documents of a micro-batch, with a tail of padding as one more.
    ids_ABL = batch["segment_ids"]
    used_AB = jnp.max(ids_ABL, axis=-1)
    counts_A = jnp.sum(jnp.where(used_AB > 0, used_AB + (ids_ABL[..., -1] == 0), 0), axis=1)
    share_A = counts_A / jnp.maximum(jnp.sum(counts_A), 1)
    return share_A.astype(jnp.float32) / jnp.maximum(masked_A, 1.0)
