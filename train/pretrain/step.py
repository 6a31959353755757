"""One optimizer step and one evaluation step: pure functions of arrays on a mesh, ready for jit."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.attention import sharded
from modernbert_jax.checkpoint.params import flatten, module_of, param_shapes
from modernbert_jax.packing import IGNORE_INDEX

from ..common.optimizer import StableAdamWState, decay_mask, stable_adamw
from ..common.sharding import ROWS, TENSOR, gather, param_shardings, scatter
from ..common.watch import norms_by_kind
from .config import TrainConfig
from .embedding import look_up
from .loss import masked_cross_entropy

Batch = Mapping[
    str, jax.Array
]  # leaves [A, B, ...]: A micro-batches of B row slots; see data.Batch

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
    """The compiled steps of one model on one mesh, and where their state lies.

    `config` gives what changes a step (optimizer, seed, remat, loss_chunk, ...), `model_config` the
    model that is trained, `mesh` the devices, which need not be here: `plan` compiles for absent
    ones.
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
        where = param_shardings(self.shapes, mesh)
        self.replicated = NamedSharding(mesh, P())
        self.shardings = TrainState(where, StableAdamWState(self.replicated, where, where))  # type: ignore[arg-type]
        self.train_step = jax.jit(
            self._train, donate_argnums=0, out_shardings=(self.shardings, self.replicated)
        )
        self.eval_step = jax.jit(self._evaluate, out_shardings=self.replicated)

    def fresh(self) -> TrainState:
        """New weights from config.seed and zero moments, made where they belong."""

        def make():
            params = flatten(
                ModernBertForMaskedLM(self.model_config, rngs=nnx.Rngs(self.config.seed))
            )
            return TrainState(params, self.tx.init(params))  # type: ignore[arg-type]

        return jax.jit(make, out_shardings=self.shardings)()

    def _sums(self, params, batch: Batch, key) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, right guesses) of one micro-batch; `params` gathered."""
        config = self.config
        model = module_of(ModernBertForMaskedLM, self.model_config, params)
        embedding = model.model.embeddings.tok_embeddings
        embeds_BLD = look_up(
            self.mesh, embedding.pad_token_id, embedding.weight[...], batch["input_ids"]
        )
        hidden_BPD = model.predict_hidden(
            batch["input_ids"],
            segment_ids=batch["segment_ids"],
            inputs_embeds=embeds_BLD,
            predict_positions=batch["predict_positions"],
            dropout_key=key,
            attention=sharded(
                self.mesh, rows=ROWS, heads=TENSOR, implementation=config.attention or None
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

    def _train(self, state: TrainState, batch: Batch, learning_rate, max_learning_rate):
        """step(state, batch, learning_rate, max_learning_rate) -> (state, metrics).

        The loss depends neither on the number of micro-batches (loss_weighting "tokens") nor on
        that of devices. Dropout keys are folded from (seed, step, micro-batch). metrics, float32
        scalars: loss (nats), accuracy, masked (tokens predicted), norms of gradients and
        parameters, whole and by kind of weight, and the sum of every further leaf of the batch.
        """
        config = self.config
        weight_A = _weights(config.loss_weighting, batch)
        key = jax.random.key(config.seed, impl=config.prng)
        key = jax.random.fold_in(key, state.optimizer.step)
        rows = {k: batch[k] for k in ("input_ids", "segment_ids", "predict_positions", "labels")}

        def loss_of(params, micro, index):
            loss, right = self._sums(params, micro, jax.random.fold_in(key, index))
            return loss * weight_A[index], right

        params = gather(state.params, self.mesh, self.model_config.dtype)
        gradient = jax.value_and_grad(loss_of, has_aux=True)

        def whole(grads):
            # Split over fsdp only once they are added up: each layer's, split at once, would be
            # computed in slices of D / fsdp, too narrow for a TPU's matrix units.
            return gather(
                {k: g.astype(jnp.float32) for k, g in grads.items()}, self.mesh, jnp.float32
            )

        def one(carry, item):
            (loss, right), grads = gradient(params, *item)
            return jax.tree.map(jnp.add, carry, (loss, right, whole(grads))), None

        gradient_accumulation_steps = batch["labels"].shape[0]
        if gradient_accumulation_steps == 1:
            (loss, right), grads = gradient(params, jax.tree.map(lambda x: x[0], rows), 0)
            grads = whole(grads)
        else:
            zeros = {k: jnp.zeros(p.shape, jnp.float32) for k, p in state.params.items()}
            zero = jnp.zeros((), jnp.float32)
            (loss, right, grads), _ = jax.lax.scan(
                one, (zero, zero, whole(zeros)), (rows, jnp.arange(gradient_accumulation_steps))
            )
        grads = scatter(grads, self.mesh)
        updates: Any
        optimizer: Any
        updates, optimizer = self.tx.update(
            grads,
            state.optimizer,
            state.params,
            learning_rate=learning_rate,
            max_learning_rate=max_learning_rate,
        )
        new_params: Any = optax.apply_updates(state.params, updates)
        masked = jnp.sum(batch["labels"] != IGNORE_INDEX).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": right / jnp.maximum(masked, 1.0),
            "grad_norm": optax.tree.norm(grads),
            "masked": masked,
        }
        for name, tree in (("grad_norm", grads), ("param_norm", state.params)):
            metrics |= {f"{name}/{kind}": x for kind, x in norms_by_kind(tree).items()}
        metrics |= {k: jnp.sum(batch[k]).astype(jnp.float32) for k in batch if k not in rows}
        return TrainState(new_params, optimizer), metrics

    def _evaluate(self, params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """step(params, batch) -> (sum of losses, right guesses, labels) of one micro-batch."""
        params = gather(params, self.mesh, self.model_config.dtype)
        loss, right = self._sums(params, jax.tree.map(lambda x: x[0], dict(batch)), None)
        return loss, right, jnp.sum(batch["labels"] != IGNORE_INDEX)


def _weights(weighting: str, batch: Batch) -> jax.Array:
    """What the sum of losses of each micro-batch is multiplied with, [A]."""
    masked_A = jnp.sum(batch["labels"] != IGNORE_INDEX, axis=(1, 2)).astype(jnp.float32)
    if weighting == "tokens":
        return jnp.full_like(masked_A, 1.0) / jnp.maximum(jnp.sum(masked_A), 1.0)
    # Composer counts the sequences of a micro-batch, the tail of padding as one more.
    ids_ABL = batch["segment_ids"]
    used_AB = jnp.max(ids_ABL, axis=-1)
    counts_A = jnp.sum(jnp.where(used_AB > 0, used_AB + (ids_ABL[..., -1] == 0), 0), axis=1)
    share_A = counts_A / jnp.maximum(jnp.sum(counts_A), 1)
    return share_A.astype(jnp.float32) / jnp.maximum(masked_A, 1.0)
