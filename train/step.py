"""One optimizer step and one evaluation step: pure functions of arrays, ready for jit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.pretrained import module_of

from .loss import IGNORE, masked_cross_entropy
from .optimizer import StableAdamWState

Batch = dict[str, jax.Array]  # leaves [A, B, ...]: A micro-batches of B rows; see data.Batch


class TrainState(NamedTuple):
    """params: {path: array}, param_dtype. optimizer: moments and the step, which never restarts."""

    params: dict[str, jax.Array]
    optimizer: StableAdamWState


def micro_loss(
    config: ModernBertConfig, params, batch: Batch, key, *, chunk: int, **how: Any
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, right guesses) of one micro-batch."""
    model = module_of(ModernBertForMaskedLM, config, params)
    hidden_BPD = model.predict_hidden(
        batch["input_ids"],
        segment_ids_BL=batch["segment_ids"],
        predict_positions_BP=batch["predict_positions"],
        dropout_key=key,
        **how,
    )
    return masked_cross_entropy(
        hidden_BPD, model.decoder_weight_VD, model.decoder_bias_V, batch["labels"], chunk
    )


def make_train_step(
    config: ModernBertConfig,
    tx: optax.GradientTransformationExtraArgs,
    *,
    seed: int,
    loss_chunk: int = 1024,
    **how: Any,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, batch, learning_rate, max_learning_rate) -> (state, metrics).

    The loss is the mean over all masked tokens of the step, whatever the number of micro-batches.
    Dropout keys are folded from (seed, step, micro-batch). `how` goes to the model.
    metrics: loss (nats), accuracy, grad_norm; float32 scalars.
    """

    def step(state: TrainState, batch: Batch, learning_rate, max_learning_rate):
        count = jnp.maximum(jnp.sum(batch["labels"] != IGNORE), 1).astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), state.optimizer.step)

        def loss_of(params, micro, index):
            loss, right = micro_loss(
                config, params, micro, jax.random.fold_in(key, index), chunk=loss_chunk, **how
            )
            return loss / count, right

        def one(carry, item):
            (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, *item)
            return jax.tree.map(jnp.add, carry, (loss, right, grads)), None

        micro_batches = batch["labels"].shape[0]
        if micro_batches == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, first, 0)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            zero = jnp.zeros((), jnp.float32)
            (loss, right, grads), _ = jax.lax.scan(
                one, (zero, zero, zeros), (batch, jnp.arange(micro_batches))
            )
        updates: Any
        optimizer: Any
        updates, optimizer = tx.update(
            grads,
            state.optimizer,
            state.params,
            learning_rate=learning_rate,
            max_learning_rate=max_learning_rate,
        )
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": right / count,
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(params, optimizer), metrics

    return step


def make_eval_step(config: ModernBertConfig, *, loss_chunk: int = 1024, **how: Any):
    """step(params, batch) -> (sum of losses, right guesses); no dropout; batch leaves [B, ...]."""

    def step(params, batch: Batch):
        return micro_loss(config, params, batch, None, chunk=loss_chunk, **how)

    return step
