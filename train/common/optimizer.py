"""StableAdamW and AdamW as optax transformations, and what they decay."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modernbert_jax.weights import decays


class StableAdamWState(NamedTuple):
    """step: updates done. mu, nu: the moments without bias, with the parameters' shapes."""

    step: jax.Array
    mu: Any
    nu: Any


def stable_adamw(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    mask: Any = True,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with Adafactor's update clipping, per tensor, and fully decoupled weight decay.

    `update(grads, state, params, learning_rate=..., max_learning_rate=...)`: the rates are scalars
    of the step, since the schedules count tokens. A weight decays by weight_decay * rate / max
    rate, with the clipped rate. mask: a boolean, or a tree of them, for which weights decay.

        b1' = b1 (1 - b1^(t-1)) / (1 - b1^t), b2' likewise         (moments without bias)
        m = b1' m + (1 - b1') g;  v = b2' v + (1 - b2') g^2
        rate = learning_rate / max(1, sqrt(mean(g^2 / max(v, eps^2))))
        update = -rate (weight_decay / max_learning_rate) w - rate m / (sqrt(v) + eps)

    Source: Wortsman et al. 2023 (arXiv 2304.13013); torch-optimi's StableAdamW with decouple_lr.
    """

    def init(params):
        zeros = lambda p: jnp.zeros(p.shape, jnp.float32)  # noqa: E731
        return StableAdamWState(
            jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        )

    @jax.named_scope("optimizer")  # `plan` counts its time apart
    def update(updates, state, params=None, *, learning_rate, max_learning_rate=None, **_):
        if params is None:
            raise ValueError("stable_adamw: update needs the parameters")
        step = state.step + 1
        t = step.astype(jnp.float32)
        keep1, keep2 = _unbiased(b1, t), _unbiased(b2, t)
        peak = learning_rate if max_learning_rate is None else max_learning_rate

        def one(g, m, v, w, decays):
            g = g.astype(jnp.float32)
            m = m + (1 - keep1) * (g - m)
            v = keep2 * v + (1 - keep2) * g * g
            rms = jnp.sqrt(jnp.mean(g * g / jnp.maximum(v, eps**2)))
            rate = learning_rate / jnp.maximum(1.0, rms)
            decay = rate / peak * jnp.where(decays, weight_decay, 0.0)
            change = -decay * w.astype(jnp.float32) - rate * m / (jnp.sqrt(v) + eps)
            return change.astype(w.dtype), m, v

        decays = jax.tree.map(lambda _: mask, params) if isinstance(mask, bool) else mask
        out = jax.tree.map(one, updates, state.mu, state.nu, params, decays)
        updates, mu, nu = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0, 0)), out
        )
        return updates, StableAdamWState(step, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _unbiased(beta: float, t: jax.Array) -> jax.Array:
    """Returns the factor that keeps a moving average unbiased at step t; 0 at the first step."""
    # 1 - beta^t as -expm1(t log beta): float32 loses half its digits in the plain form.
    log = math.log(beta) if beta > 0 else -math.inf
    return beta * jnp.expm1((t - 1) * log) / jnp.expm1(t * log)


def adamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    decayed: Callable[[str], bool] = decays,
) -> optax.GradientTransformationExtraArgs:
    """AdamW after clipping the global gradient norm, both as PyTorch computes them.

    `update(grads, state, params, learning_rate=..., weight_decay=...)`; params maps paths to
    arrays. learning_rate is a scalar, or {path: scalar} for a rate per parameter. decayed: whether
    weight decay applies to the parameter of a path.

        update = -learning_rate (m / (sqrt(v) + eps) + weight_decay w)

    Source: torch.optim.AdamW, torch.nn.utils.clip_grad_norm_.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates, state, params=None, *, learning_rate, weight_decay, **_):
        if params is None:
            raise ValueError("adamw: update needs the parameters")
        scale = jnp.minimum(1.0, max_grad_norm / (optax.tree.norm(updates) + 1e-6))
        scaled: Any = jax.tree.map(lambda g: g * scale, updates)
        moved: Any
        moved, state = adam.update(scaled, state)
        rates = learning_rate if isinstance(learning_rate, Mapping) else None

        def one(path, u):
            rate: Any = learning_rate if rates is None else rates[path]
            return -rate * (u + (weight_decay if decayed(path) else 0.0) * params[path])

        return {path: one(path, u) for path, u in moved.items()}, state

    return optax.GradientTransformationExtraArgs(adam.init, update)  # pyright: ignore[reportArgumentType]


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Returns {path: whether weight decay applies}; see `modernbert_jax.weights`."""
    return {path: decays(path) for path in params}
