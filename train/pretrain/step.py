"""One optimizer step and one evaluation step: pure functions of arrays on a mesh, ready for jit."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, lora
from modernbert_jax.attention import context_parallel, sharded
from modernbert_jax.checkpoint.params import param_shapes, variables
from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.weights import is_adapter

from ..common.optimizer import StableAdamWState, decay_mask, stable_adamw
from ..common.settings import with_adapters
from ..common.sharding import (
    BATCH,
    SEQUENCE,
    TENSOR,
    TOKENS,
    at_positions,
    fsdp_spec,
    gather,
    local_slots,
    padded_batch_size,
    param_shardings,
    part_of,
    scatter,
    split_over_tokens,
    sum_over,
    to_devices,
)
from ..common.watch import norms_by_kind
from .config import TrainConfig
from .loss import masked_cross_entropy

# Arrays [A, B, ...]: A micro-batches of B packed sequences; see data.Batch.
Batch = Mapping[str, jax.Array]
_INPUTS = ("input_ids", "segment_ids", "predict_positions", "labels")

_policies = jax.checkpoint_policies
_ATTENTION = _policies.save_only_these_names("attention_out", "attention_lse")

# What the backward pass finds saved, from the most memory to the least; see TrainConfig.remat.
REMAT: dict[str, bool | Callable[..., bool]] = {
    "none": False,
    "save_dots_and_attention": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "save_attention": _ATTENTION,
    "layers": True,
}


class TrainState(NamedTuple):
    """params: {path: array}, param_dtype; the factors of adapters are float32.

    optimizer: moments of what is trained, and the step, which never restarts.
    """

    params: dict[str, jax.Array]
    optimizer: StableAdamWState


class Trainer:
    """The compiled steps of one model on one mesh, and where their state is placed.

    config: what changes a step (optimizer, seed, remat, loss_chunk, ...). model_config: the model
    that is trained. mesh: the devices; they may be absent, since `plan` only compiles for them.
    """

    def __init__(self, config: TrainConfig, model_config: ModernBertConfig, mesh: Mesh):
        self.config, self.model_config, self.mesh = config, model_config, mesh
        shapes: dict[str, Any] = param_shapes(ModernBertForMaskedLM, model_config)
        if config.lora_rank is not None:
            adapted = variables(nnx.eval_shape(self._model))
            shapes = {path: v.get_value() for path, v in adapted.items()}
        self.shapes = shapes
        self.trained = [k for k in shapes if config.lora_rank is None or is_adapter(k)]
        optimizer = config.optimizer
        self.tx = stable_adamw(
            optimizer.b1,
            optimizer.b2,
            optimizer.eps,
            optimizer.weight_decay,
            decay_mask(self.of_trained(shapes)),
        )
        params = param_shardings(self.shapes, mesh)
        moments = self.of_trained(params)
        self.replicated = NamedSharding(mesh, P())
        self.shardings = TrainState(params, StableAdamWState(self.replicated, moments, moments))  # type: ignore[arg-type]
        self.train_step = jax.jit(
            self._train, donate_argnums=0, out_shardings=(self.shardings, self.replicated)
        )
        self.eval_step = jax.jit(self._evaluate, out_shardings=self.replicated)

    def fresh(self) -> TrainState:
        """Returns random weights from config.seed and zero moments, created on their devices."""

        def make():
            params = {path: v.get_value() for path, v in variables(self._model()).items()}
            return TrainState(params, self.tx.init(self.of_trained(params)))  # type: ignore[arg-type]

        return jax.jit(make, out_shardings=self.shardings)()

    def of_trained(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries {path: value} of the parameters that are trained."""
        return {path: tree[path] for path in self.trained}

    def add_adapters(self, model: ModernBertForMaskedLM) -> None:
        """Adds the adapters of --lora-rank, if it is set, to a model, drawn from config.seed."""
        config = self.config
        if config.lora_rank is not None:
            lora.add_lora(
                model, config.lora_rank, config.lora_alpha, config.lora_targets,
                rngs=nnx.Rngs(config.seed),
            )  # fmt: skip

    def build(self, params: Mapping[str, Any]) -> ModernBertForMaskedLM:
        """Returns the model around parameters, with its adapters; works under jit."""
        return with_adapters(ModernBertForMaskedLM, self.model_config, params, self.config)

    def _model(self) -> ModernBertForMaskedLM:
        model = ModernBertForMaskedLM(self.model_config, rngs=nnx.Rngs(self.config.seed))
        self.add_adapters(model)
        return model

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
        trained = self.of_trained(state.params)
        updates: Any
        optimizer: Any
        updates, optimizer = self.tx.update(
            grads,
            state.optimizer,
            trained,
            learning_rate=learning_rate,
            max_learning_rate=max_learning_rate,
        )
        params: Any = state.params | optax.apply_updates(trained, updates)  # type: ignore[operator]
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

        Each device adds up the gradients of its own sequences; the sums are reduced once per step.
        """
        weight_A = _loss_weights(self.config.loss_weighting, batch)
        specs = {path: fsdp_spec(path) for path in self.shapes}

        def local(shards, inputs, weight_A, step):
            params = gather(shards, self.model_config.dtype)
            trained = self.of_trained(params)

            def weighted_loss(trained, micro, index):
                keys = self._dropout_keys(step, index, len(micro["labels"]))
                loss, correct = self._forward(params | trained, micro, keys)
                return loss * weight_A[index], correct

            def accumulate(sums, item):
                (loss, correct), grads = jax.value_and_grad(weighted_loss, has_aux=True)(
                    trained, *item
                )
                grads = {k: g.astype(jnp.float32) for k, g in grads.items()}
                return jax.tree.map(jnp.add, sums, (loss, correct, grads)), None

            zero = jnp.zeros((), jnp.float32)
            zeros = {k: jnp.zeros(p.shape, jnp.float32) for k, p in trained.items()}
            indices = jnp.arange(len(weight_A))
            sums, _ = jax.lax.scan(accumulate, (zero, zero, zeros), (inputs, indices))
            loss, correct, grads = sums
            # Split over fsdp only now: each layer's own slices of D / fsdp would be too narrow for
            # a TPU's matrix units.
            return *sum_over(TOKENS, (loss, correct)), scatter(grads)

        run = split_over_tokens(
            local, self.mesh, (specs, P(None, BATCH), P(), P()), (P(), P(), self.of_trained(specs))
        )
        inputs = {k: batch[k] for k in _INPUTS}
        return run(state.params, inputs, weight_A, state.optimizer.step)

    def _dropout_keys(self, step, micro_batch, size: int) -> jax.Array:
        """Returns the keys of a device's sequences, from (seed, step, number in the step).

        So dropout depends neither on the mesh nor on the number of micro-batches.
        """
        key = jax.random.key(self.config.seed, impl="threefry2x32")
        key = jax.random.fold_in(key, step)
        first = micro_batch * self.config.micro_batch_size + jax.lax.axis_index(BATCH) * size
        return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(size))

    def _evaluate(self, params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """step(params, batch) -> (sum of losses, correct predictions, labels) of a micro-batch."""

        def local(shards, batch):
            params = gather(shards, self.model_config.dtype)
            return sum_over(TOKENS, self._forward(params, batch, None))

        specs = {path: fsdp_spec(path) for path in self.shapes}
        run = split_over_tokens(local, self.mesh, (specs, P(BATCH)), (P(), P()))
        loss, correct = run(params, {k: batch[k][0] for k in _INPUTS})
        return loss, correct, jnp.sum(batch["labels"] != IGNORE_INDEX)

    def _forward(self, params, batch: Batch, dropout_key) -> tuple[jax.Array, jax.Array]:
        """Returns (sum of losses, correct predictions) of a device's share; params gathered.

        It computes its part of the tokens, and the losses of an equal share of the predictions.
        """
        config, parts = self.config, self.mesh.shape[SEQUENCE]
        model = self.build(params)
        attention = sharded(
            self.mesh, rows=BATCH, heads=TENSOR, implementation=config.attention or None
        )
        if config.fused_local_layers:
            # Imported when needed: only this option depends on Pallas's part for TPUs.
            from modernbert_jax.fused_local_layer import FusedLocalLayers

            attention = FusedLocalLayers(attention, self.mesh, BATCH)
        ids_BL, first = batch["input_ids"], None
        if parts > 1:
            attention = context_parallel(attention, SEQUENCE)
            ids_BL, first = part_of(ids_BL)
        hidden_BLD = model.model(
            ids_BL,
            segment_ids=batch["segment_ids"],
            first_token=first,
            dropout_key=dropout_key,
            attention=attention,
            scan_layers=config.scan_layers,
            remat=REMAT[config.remat],
            output_hidden_states=False,
            output_attentions=False,
        ).last_hidden_state
        positions_BP, labels_BP = batch["predict_positions"], batch["labels"]
        tail = ((0, 0), (0, -labels_BP.shape[1] % parts))
        hidden_BPD = at_positions(hidden_BLD, jnp.pad(positions_BP, tail))
        labels_BP = jnp.pad(labels_BP, tail, constant_values=IGNORE_INDEX)
        return masked_cross_entropy(
            model.head(hidden_BPD),
            model.decoder_weight_VD,
            model.decoder_bias_V,
            part_of(labels_BP)[0],
            config.loss_chunk,
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
