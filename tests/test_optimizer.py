"""StableAdamW against torch-optimi, AdamW against torch, the decay mask, and schedules."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.params import flatten
from train.common.optimizer import adamw, decay_mask, stable_adamw
from train.pretrain.config import Phase

SHAPES = {
    "head.dense.weight": (7, 5),
    "head.dense.bias": (5,),
    "head.norm.weight": (6,),
    "model.layers.0.mlp.Wi.weight": (3, 4, 2),
}


@pytest.mark.parametrize("rate_of", [lambda i: 1e-2, lambda i: 1e-2 * (1 - i / 200)])
@pytest.mark.parametrize("weight_decay", [0.0, 9e-4])
def test_stable_adamw_equals_optimi(weight_decay, rate_of):
    """100 steps, gradients that jump (so that the clipping acts), decay on matrices only.

    optimi runs in float64: in float32 it rounds 1 - decay to 2^-24, the same way at every step,
    which alone moves its weights by 2e-6 in 40 steps. Ours is float32, as in training.
    """
    torch = pytest.importorskip("torch")
    optimi = pytest.importorskip("optimi")
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v).double()) for k, v in start.items()}
    decays = decay_mask(start)
    assert decays == {
        "head.dense.weight": True,
        "head.dense.bias": False,
        "head.norm.weight": False,
        "model.layers.0.mlp.Wi.weight": True,
    }
    optimizer = optimi.StableAdamW(
        [
            {"params": [theirs[k] for k in SHAPES if decays[k]], "weight_decay": weight_decay},
            {"params": [theirs[k] for k in SHAPES if not decays[k]], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.9, 0.98), eps=1e-6, decouple_lr=True, max_lr=1e-2,
        triton=False, foreach=False,
    )  # fmt: skip
    tx = stable_adamw(0.9, 0.98, 1e-6, weight_decay, decays)
    params, state = start, tx.init(start)
    update = jax.jit(tx.update)
    clipped = 0
    for i in range(100):
        scale = 30.0 if i % 17 == 16 else 1.0
        grads = {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}
        for group in optimizer.param_groups:
            group["lr"] = rate_of(i)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k]).double()
        optimizer.step()
        updates, state = update(
            grads, state, params, learning_rate=rate_of(i), max_learning_rate=1e-2
        )
        params = optax.apply_updates(params, updates)
        v = np.asarray(state.nu["head.dense.weight"])
        clipped += np.sqrt(np.mean(grads["head.dense.weight"] ** 2 / np.maximum(v, 1e-12))) > 1
        for k in SHAPES:
            np.testing.assert_allclose(
                params[k], theirs[k].detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=f"{k} at {i}"
            )
    assert clipped > 5
    assert int(state.step) == 100


def test_adamw_equals_torch():
    """Clipped gradients, a rate per parameter, and no decay of a bias that has several axes."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shapes = {**SHAPES, "layers.1.attn.Wqkv.bias": (3, 2, 4)}
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v).double()) for k, v in start.items()}
    factors = {k: 0.5**i for i, k in enumerate(shapes)}
    matrices = {"head.dense.weight", "model.layers.0.mlp.Wi.weight"}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (k in matrices)} for k, p in theirs.items()]
    )
    tx = adamw(max_grad_norm=2.0)
    params, state = start, tx.init(start)
    for i in range(20):
        scale = (0.01, 1.0)[i % 2]  # below and above max_grad_norm
        grads = {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
        rates = {k: 1e-2 * (1 - i / 40) * f for k, f in factors.items()}
        updates, state = tx.update(grads, state, params, learning_rate=rates, weight_decay=0.1)
        params = optax.apply_updates(params, updates)
        for group, (k, p) in zip(optimizer.param_groups, theirs.items(), strict=True):
            group["lr"], p.grad = rates[k], torch.tensor(grads[k]).double()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        optimizer.step()
    for k, p in theirs.items():
        np.testing.assert_allclose(params[k], p.detach().numpy(), atol=2e-6)


def test_moments_equal_the_textbook_means():
    """mu and nu are the weighted means of Adam after bias correction, in float64."""
    rng = np.random.default_rng(1)
    grads = rng.normal(size=(12, 4)).astype(np.float32)
    tx = stable_adamw(0.9, 0.98, 1e-6, 0.0)
    params = {"w": np.zeros(4, np.float32)}
    state = tx.init(params)
    for t, g in enumerate(grads, start=1):
        _, state = tx.update({"w": g}, state, params, learning_rate=1e-3)
        for beta, power, got in ((0.9, 1, state.mu["w"]), (0.98, 2, state.nu["w"])):
            weights = (1 - beta) * beta ** np.arange(t - 1, -1, -1.0) / (1 - beta**t)
            want = weights @ grads[:t].astype(np.float64) ** power
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_no_norm_and_no_bias_decays():
    config = ModernBertConfig.tiny(norm_bias=True, attention_bias=True, mlp_bias=True)
    params = flatten(nnx.eval_shape(lambda: ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))))
    mask = decay_mask(params)
    assert set(mask) == set(params)
    undecayed = {k for k, decays in mask.items() if not decays}
    # By shape: a norm or a bias is a vector, or a bias reshaped to [3, H, K] or [2, F].
    assert undecayed == {k for k, p in params.items() if p.ndim == 1 or k.endswith("bias")}
    assert "model.embeddings.tok_embeddings.weight" not in undecayed


class TestSchedule:
    """Whole curves against NumPy."""

    tokens = np.linspace(0, 1_000_000, 4001).astype(int)

    def curve(self, **changes):
        rate = Phase(tokens=1_000_000, learning_rate=3e-4, **changes).learning_rate_at
        return np.array([rate(int(t)) for t in self.tokens])

    def test_constant(self):
        np.testing.assert_array_equal(self.curve(), np.full(4001, 3e-4))

    def test_one_minus_sqrt_over_the_last_part(self):
        x = np.clip((self.tokens - 666_667) / 333_333, 0, 1)
        want = 3e-4 * (0.001 + 0.999 * (1 - np.sqrt(x)))
        np.testing.assert_allclose(self.curve(decay_tokens=333_333), want, rtol=1e-12)

    def test_decay_over_the_whole_phase_ends_at_its_share(self):
        curve = self.curve(decay_tokens=1_000_000, final_lr_ratio=0.01)
        assert curve[0] == 3e-4 and np.isclose(curve[-1], 3e-6)
        assert (np.diff(curve) < 0).all()

    def test_warm_up_then_linear_decay(self):
        got = self.curve(warmup_tokens=100_000, decay_tokens=200_000, decay="linear")
        want = np.interp(self.tokens, [0, 1e5, 8e5, 1e6], [0, 3e-4, 3e-4, 3e-7])
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-18)

    def test_clock_beyond_int32(self):
        phase = Phase(tokens=160_453_000_000, learning_rate=1.0, decay_tokens=80_226_500_000)
        rate = phase.learning_rate_at
        assert rate(80_226_500_000) == 1.0
        assert np.isclose(rate(100_283_125_000), 0.001 + 0.999 * 0.5)
