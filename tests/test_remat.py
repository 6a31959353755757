"""What each rematerialization policy computes again, counted in the program of the gradient."""

import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modernbert_jax import ModernBertConfig
from modernbert_jax.attention import xla
from modernbert_jax.attention.rope import rotated
from modernbert_jax.attention.vjp import with_vjp
from modernbert_jax.model import ModernBertModel
from train.pretrain.config import TrainConfig
from train.pretrain.step import REMAT

CONFIG = ModernBertConfig.tiny(num_hidden_layers=3, attention_out_dropout=0.1)
IDS = np.random.default_rng(0).integers(5, 90, (2, 32)).astype(np.int32)


def kernel(q, k, v, bounds, scale):
    return xla.forward(q, k, v, bounds, scale)


attention = functools.partial(rotated, with_vjp(jax.jit(kernel, static_argnums=4), xla.backward))


def gradient(remat, scan):
    model = ModernBertModel(CONFIG, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)  # the rest: keys of the dropout stream

    def loss(state):
        hidden = nnx.merge(graph, state, rest)(
            IDS, dropout_key=jax.random.key(1), attention=attention, remat=REMAT[remat],
            scan_layers=scan,
        ).last_hidden_state  # fmt: skip
        return jnp.sum(jnp.sin(hidden))

    return jax.jit(jax.grad(loss)), state


def counts(remat):
    """How often the gradient's program runs the forward kernel and each product of a layer."""
    run, state = gradient(remat, scan=False)
    text = run.lower(state).as_text()
    patterns = {
        "kernel": r"call @kernel(_\d+)?\(",
        "Wqkv": r"dot_general .* = \[2\] x \[0\].*-> tensor<2x32x3x4x32xf32>",
        "attn.Wo": r"dot_general .* = \[2\] x \[0\].*tensor<128x128xf32>\) -> tensor<2x32x128xf32>",
        "Wi": r"dot_general .* = \[2\] x \[0\].*-> tensor<2x32x2x192xf32>",
        "mlp.Wo": r"dot_general .* = \[2\] x \[0\].*tensor<192x128xf32>\) -> tensor<2x32x128xf32>",
    }
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def test_names():
    assert list(REMAT) == list(typing.get_args(typing.get_type_hints(TrainConfig)["remat"]))


def test_what_is_computed_again():
    n = CONFIG.num_hidden_layers
    once = {"kernel": n, "Wqkv": n, "attn.Wo": n, "Wi": n, "mlp.Wo": n}
    # No gradient needs the result of mlp.Wo, so that it is never computed again.
    again = {"Wqkv": 2 * n, "attn.Wo": 2 * n, "Wi": 2 * n}
    assert {name: counts(name) for name in REMAT} == {
        "none": once,
        "save_dots_and_attention": once,
        "save_attention": once | again,
        "layers": once | again | {"kernel": 2 * n},
    }


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_gradients_are_those_of_no_policy(remat):
    run, state = gradient(remat, scan=True)
    plain, _ = gradient("none", scan=False)
    for a, b in zip(jax.tree.leaves(run(state)), jax.tree.leaves(plain(state)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
