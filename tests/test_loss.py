"""The chunked loss against a float64 softmax in NumPy, its gradients, and its memory."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from modernbert_jax.packing import IGNORE_INDEX
from train.pretrain.loss import masked_cross_entropy


def case(rows=3, places=7, width=5, vocabulary=11, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, places, width)).astype(np.float32)
    weight = rng.normal(size=(vocabulary, width)).astype(np.float32)
    bias = rng.normal(size=vocabulary).astype(np.float32)
    labels = rng.integers(0, vocabulary, (rows, places)).astype(np.int32)
    labels[rng.random((rows, places)) < 0.3] = IGNORE_INDEX
    return hidden, weight, bias, labels


def dense(hidden, weight, bias, labels):
    """(sum, right, gradients of the sum) written out in float64."""
    h, w = hidden.astype(np.float64).reshape(-1, hidden.shape[-1]), weight.astype(np.float64)
    labels = labels.ravel()
    logits = h @ w.T + (0 if bias is None else bias)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    used = labels != IGNORE_INDEX
    rows = np.flatnonzero(used)
    d = p * used[:, None]
    d[rows, labels[rows]] -= 1
    loss = -np.log(p[rows, labels[rows]]).sum()
    right = (logits.argmax(1) == labels)[used].sum()
    return loss, right, (d @ w).reshape(hidden.shape), d.T @ h, d.sum(0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 21, 1000])
def test_equals_the_dense_formula(chunk, with_bias):
    hidden, weight, bias, labels = case()
    bias = bias if with_bias else None
    f = lambda h, w, b: masked_cross_entropy(h, w, b, labels, chunk)  # noqa: E731
    (loss, right), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, weight, bias)
    want = dense(hidden, weight, bias, labels)
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    assert right == want[1]
    np.testing.assert_allclose(grads[0], want[2], atol=1e-5)
    np.testing.assert_allclose(grads[1], want[3], atol=1e-5)
    if with_bias:
        db = jax.grad(lambda b: f(hidden, weight, b)[0])(bias)
        np.testing.assert_allclose(db, want[4], atol=1e-5)


def test_nothing_to_predict_is_zero_and_finite():
    hidden, weight, bias, labels = case()
    labels[:] = IGNORE_INDEX
    (loss, right), grads = jax.value_and_grad(masked_cross_entropy, has_aux=True)(
        jnp.asarray(hidden), weight, bias, labels, 4
    )
    assert loss == right == 0 and not np.asarray(grads).any()


def test_no_array_of_all_logits_exists():
    """The largest array of the forward and backward program is one chunk of logits or smaller."""
    hidden, weight, bias, labels = case(rows=4, places=64, width=8, vocabulary=512)
    f = lambda h, w: masked_cross_entropy(h, w, bias, labels, 16)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(hidden, weight)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    assert 16 * 512 in set(sizes(jaxpr.jaxpr))
    assert max(sizes(jaxpr.jaxpr)) <= 16 * 512
