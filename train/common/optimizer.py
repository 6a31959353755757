"""StableAdamW as an optax transformation, and its decay mask."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modernbert_jax.weights import decays


class StableAdamWState(NamedTuple):
    """step: updates done. mu, nu: the moments, already free of bias, shaped as the parameters."""

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
    of
    the step, since the schedules count tokens. The decay takes weight_decay * rate / max rate of a
    weight, where the rate is the clipped one. mask: a tree of booleans (or one) saying what decays.

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
    """The factor that keeps a moving average free of bias at step t; 0 at the first step."""
    # 1 - beta^t as -expm1(t log beta): float32 loses half its digits in the plain form.
    log = math.log(beta) if beta > 0 else -math.inf
    return beta * jnp.expm1((t - 1) * log) / jnp.expm1(t * log)


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Path -> whether weight decay applies, see `modernbert_jax.weights`."""
    return {path: decays(path) for path in params}
