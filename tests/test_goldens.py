"""Parity with numbers that transformers gave once (tests/goldens): needs no torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modernbert_jax import ModernBertForMaskedLM
from modernbert_jax.weights import to_hf
from tests.parity_cases import relative_error

FOLDER = pathlib.Path(__file__).parent / "goldens" / "tiny"


@pytest.mark.optimized
def test_forward_and_gradients():
    expected = np.load(FOLDER / "expected.npz")
    model = ModernBertForMaskedLM.from_pretrained(FOLDER)
    ids, mask, labels = (expected[k] for k in ("input_ids", "attention_mask", "labels"))
    out = model(ids, mask, output_hidden_states=True)
    assert relative_error(out.logits, expected["logits"], mask) < 1e-5
    for ours, theirs in zip(out.hidden_states, expected["hidden_states"], strict=True):
        assert relative_error(ours, theirs, mask) < 1e-5

    def loss(model):
        logp = jax.nn.log_softmax(model(jnp.asarray(ids), jnp.asarray(mask)).logits)
        picked = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0.0)) / (labels >= 0).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(model)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    for path, grad in nnx.to_flat_state(grads):
        key = ".".join(map(str, path))
        assert relative_error(to_hf(key, grad.get_value()), expected[f"grad:{key}"]) < 1e-4, key
