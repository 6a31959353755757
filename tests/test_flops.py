"""The FLOP model against published totals, XLA's own count and a count of visible keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, attention
from modernbert_jax.checkpoint.params import module_of, param_shapes
from modernbert_jax.config import FULL, SLIDING
from train.common.flops import PEAK, hardware_flops, mfu, model_flops, segment_lengths

BASE, LARGE = ModernBertConfig.base(), ModernBertConfig.large()


def per_token(config, length):
    return model_flops(config, np.array([length]), 0.3 * length)


@pytest.mark.parametrize(
    "config, linear, head, at_1024, at_8192",
    [(BASE, 0.2206, 0.0236, 0.0307, 0.2069), (LARGE, 0.6863, 0.0316, 0.0515, 0.3451)],
    ids=["base", "large"],
)
def test_published_totals(config, linear, head, at_1024, at_8192):
    """GFLOP a token of the forward pass, derived by others from the paper's table 3."""
    for length, attention_ in ((1024, at_1024), (8192, at_8192)):
        flops = per_token(config, length)
        assert flops.linear / length / 1e9 == pytest.approx(linear, abs=5e-5)
        assert flops.head / length / 1e9 == pytest.approx(head, abs=5e-5)
        assert flops.attention / length / 1e9 == pytest.approx(attention_, abs=5e-5)
        assert flops.train == pytest.approx(3 * (linear + head + attention_) * length * 1e9, 1e-3)


def test_published_utilisation():
    """Base at 1024 on an H100: 312,000 tokens/s are 26 %, large 142,000 are 33 %."""
    for config, speed, share in ((BASE, 312e3, 0.26), (LARGE, 142e3, 0.33)):
        used = mfu(speed, per_token(config, 1024).train / 1024, "NVIDIA H100 80GB HBM3")
        assert used == pytest.approx(share, abs=0.006)


def test_xla_counts_the_same():
    """A dense forward of global layers, where the model's work and the compiler's are the same."""
    B, L, P = 2, 128, 40
    config = ModernBertConfig.tiny(
        hidden_size=256, intermediate_size=384, num_hidden_layers=3, layer_types=(FULL,) * 3,
        vocab_size=1024,
    )  # fmt: skip

    def forward(params, ids, places):
        model = module_of(ModernBertForMaskedLM, config, params)
        op = functools.partial(attention.attention, implementation="reference")
        return model(ids, predict_positions=places, attention=op).logits

    params = param_shapes(ModernBertForMaskedLM, config)
    ids, places = (jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (L, P))
    analysis = jax.jit(forward).lower(params, ids, places).compile().cost_analysis()
    assert analysis is not None
    ours = model_flops(config, np.full(B, L), B * P).forward
    # XLA counts norms, RoPE, GELU and softmax as well.
    assert 1.0 <= analysis["flops"] / ours < 1.05


def test_attention_counts_visible_keys():
    """Against the boolean mask of packed rows; a window's ends count as whole (129 keys)."""
    config = BASE.replace(layer_types=(FULL, SLIDING), num_hidden_layers=2, local_attention=16)
    lengths = np.array([5, 40, 17])
    ids = np.repeat([1, 2, 3], lengths)
    same = ids[:, None] == ids[None, :]
    clipped = np.minimum(same.sum(1), 2 * config.window + 1)
    want = 4 * config.hidden_size * (same.sum() + clipped.sum())
    assert model_flops(config, lengths, 0).attention == want


def test_segment_lengths():
    ids = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    assert segment_lengths(ids).tolist() == [2, 3, 1, 5]
    assert segment_lengths(ids.reshape(3, 1, 6)).tolist() == [2, 3, 1, 5]
    # The end of a row ends a segment, also where the next row begins with the same id.
    assert segment_lengths(np.ones((2, 4), int)).tolist() == [4, 4]


class TestHardware:
    ROWS, LENGTH, PLACES = 4, 1024, 400

    def flops(self, **how):
        lengths = np.full(self.ROWS, self.LENGTH)
        return hardware_flops(
            BASE,
            lengths,
            sequences=self.ROWS,
            sequence_length=self.LENGTH,
            predictions=self.PLACES,
            **how,
        )

    def test_adds_to_the_model(self):
        model = model_flops(BASE, np.full(self.ROWS, self.LENGTH), self.ROWS * self.PLACES)
        D, V = BASE.hidden_size, BASE.vocab_size
        more = 0.5 * model.attention + 4 * self.ROWS * self.PLACES * V * D
        assert self.flops() == pytest.approx(model.train + more)
        assert self.flops(remat="save_dots_and_attention") == self.flops()
        assert self.flops(remat="save_attention") == pytest.approx(self.flops() + model.linear)
        again = model.linear + model.attention
        assert self.flops(remat="layers") == pytest.approx(self.flops() + again)

    def test_counts_padding(self):
        half = hardware_flops(
            BASE, np.full(self.ROWS // 2, self.LENGTH), sequences=self.ROWS,
            sequence_length=self.LENGTH, predictions=self.PLACES,
        )  # fmt: skip
        attention_ = model_flops(BASE, np.full(self.ROWS // 2, self.LENGTH), 0).attention
        assert half == pytest.approx(self.flops() - 3.5 * attention_)

    def test_refuses_another_policy(self):
        with pytest.raises(ValueError, match="remat: expected one of none, save_dots"):
            self.flops(remat="some")


def test_unknown_device_is_refused_in_one_line():
    with pytest.raises(ValueError, match="'cpu': expected one of TPU v4") as error:
        mfu(1.0, 1.0, "cpu")
    assert "\n" not in str(error.value)


def test_peaks_are_per_device():
    """Published for a chip; TPU7x shows two devices a chip."""
    chips = {"TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918, "TPU v4": 275}
    for kind, tera in chips.items():
        assert PEAK[kind].flops == tera * 1e12
    assert 2 * PEAK["TPU7x"].flops == 2307e12
    assert 2 * PEAK["TPU7x"].hbm_bytes == 192 * 2**30
    assert PEAK["NVIDIA H200"].flops == PEAK["NVIDIA H100 80GB HBM3"].flops == 989e12
