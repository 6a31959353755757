"""What a call does with inputs that do not fit, and what it takes from transformers' calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import modernbert_jax as mj
from modernbert_jax.attention import make_segment_ids

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, local_attention=4,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(5, 64, (2, 12))
ONES = np.ones_like(IDS)


@functools.cache
def model(cls=mj.ModernBertForMaskedLM):
    return cls(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def compiled():
    """logits(input_ids, attention_mask, predict_positions) as one program."""
    return jax.jit(lambda i, m, p: model()(i, m, predict_positions=p).logits)


def changed(array, value, at=(1, 3)):
    array = array.copy()
    array[at] = value
    return array


class TestValues:
    """Lists and NumPy arrays are checked; jax arrays give NaN where they would be refused."""

    @pytest.mark.parametrize(
        "inputs, message",
        [
            ({"input_ids": changed(IDS, 64)}, r"input_ids: expected 0 to 63 .*got 64"),
            ({"input_ids": changed(IDS, -1)}, r"input_ids: expected 0 to 63 .*got -1"),
            ({"input_ids": changed(IDS, 2**32 + 5)}, r"input_ids: .*got 4294967301"),
            ({"input_ids": changed(IDS, 64).tolist()}, r"input_ids: .*got 64"),
            ({"input_ids": IDS.astype(np.float32)}, "input_ids: expected integers, got float32"),
            ({"input_ids": jnp.ones((1, 4))}, "input_ids: expected integers, got float32"),
            ({"input_ids": [[5, 6], [7]]}, "input_ids: expected lists of one length"),
            ({"input_ids": IDS[:0]}, r"at least one token, got \(0, 12\)"),
            ({"input_ids": IDS[:, :0]}, r"at least one token, got \(2, 0\)"),
            ({"attention_mask": changed(ONES, 2)}, "1 for tokens and 0 for padding, got 2"),
            ({"attention_mask": changed(ONES, 0)}, "one run of ones .* sequence 1 has holes"),
            ({"segment_ids": changed(ONES, -3)}, "segment_ids: expected ids of 0 .*got -3"),
            ({"segment_ids": changed(ONES, 2**32 + 1)}, "segment_ids: .*got 4294967297"),
            ({"segment_ids": ONES * 1.5}, "segment_ids: expected integers, got float64"),
            ({"position_ids": ONES[:, :11]}, r"position_ids: expected the shape .*got \(2, 11\)"),
            ({"position_ids": ONES[0]}, r"position_ids: expected the shape .*got \(12,\)"),
            ({"position_ids": ONES * 2**32}, "position_ids: .*got 4294967296"),
            ({"predict_positions": [[0], [12]]}, "predict_positions: expected 0 to 11 .*got 12"),
            ({"predict_positions": [[0], [-1]]}, "predict_positions: expected 0 to 11 .*got -1"),
            (
                {"predict_positions": [[0]]},
                r"predict_positions: .* \[B, P\] with B = 2",
            ),
            ({"predict_positions": ONES == 1}, "predict_positions: expected integers, got bool"),
        ],
    )
    def test_refused(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            model()(**{"input_ids": IDS, **inputs})
        with pytest.raises(ValueError, match=message):
            mj.capture(model(), "logits", **{"input_ids": IDS, **inputs})

    def test_jax_arrays_become_nan_eagerly_and_compiled(self):
        """Only the token of an id or position, but the whole sequence of a mask with holes."""
        good, everywhere = (IDS, ONES, np.tile(np.arange(12), (2, 1))), np.ones((2, 12), bool)
        finite = lambda *x: np.isfinite(np.asarray(compiled()(*map(jnp.asarray, x)))).all(-1)  # noqa: E731
        np.testing.assert_array_equal(finite(*good), everywhere)
        for at, value, wrong in (
            (0, 64, np.s_[1]), (0, -1, np.s_[1]), (1, 0, np.s_[1]),
            (2, 12, np.s_[1, 3]), (2, -1, np.s_[1, 3]),
        ):  # fmt: skip
            inputs = list(good)
            inputs[at] = changed(good[at], value)
            # An id reaches its whole sequence through attention.
            np.testing.assert_array_equal(finite(*inputs), changed(everywhere, False, wrong))
        holes = model().model(IDS, jnp.asarray(changed(ONES, 0))).last_hidden_state
        np.testing.assert_array_equal(np.isnan(holes).any((1, 2)), [False, True])

    @pytest.mark.parametrize("value", [64, -1])
    def test_checkify_reports_ids_on_a_device(self, value):
        table = model().model.embeddings.tok_embeddings
        check = checkify.checkify(table, errors=checkify.index_checks)
        message = check(jnp.asarray([[5, value]]))[0].get()
        assert f"index {value} is out of bounds" in str(message)
        assert check(jnp.asarray([[5, 6]]))[0].get() is None

    def test_segments_need_their_slots(self):
        """None of 3 segments is dropped from 2 slots."""
        segments = np.repeat([[1, 2, 3]], 4, axis=1).repeat(2, axis=0)
        classifier = model(mj.ModernBertForSequenceClassification)
        message = "num_segments: expected at least the largest segment id 3, got 2"
        for call in (
            lambda: classifier(IDS, segment_ids=segments, num_segments=2),
            lambda: mj.capture(
                classifier, "logits", input_ids=IDS, segment_ids=segments, num_segments=2
            ),
            lambda: mj.pool(np.ones((2, 12, 4)), segments, 2),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(ValueError, match="num_segments: expected a positive int, got 0"):
            classifier(IDS, segment_ids=segments, num_segments=0)

    def test_runners_check_the_ids_of_a_tokenizer(self, small_tokenizer):
        """A model of 64 tokens with a tokenizer of 300, without `from_pretrained`."""
        with pytest.raises(ValueError, match="ids below the model's vocab_size 64, got 299"):
            mj.Embedder(model().model, small_tokenizer)
        with pytest.raises(ValueError, match="ids below the model's vocab_size 64, got 299"):
            mj.pipeline("fill-mask", model(), tokenizer=small_tokenizer)


def test_embeddings_instead_of_ids():
    """As in transformers: one of the two, and the same result."""
    plain = model().model(IDS).last_hidden_state
    embeds = model().model.embeddings.tok_embeddings(jnp.asarray(IDS))
    np.testing.assert_array_equal(model().model(inputs_embeds=embeds).last_hidden_state, plain)
    np.testing.assert_array_equal(
        mj.capture(model(), "logits", inputs_embeds=embeds)["logits"],
        mj.capture(model(), "logits", input_ids=IDS)["logits"],
    )
    choices = model(mj.ModernBertForMultipleChoice)
    np.testing.assert_array_equal(
        choices(inputs_embeds=embeds[None]).logits, choices(IDS[None]).logits
    )
    with pytest.raises(ValueError, match="expected one of them, got both"):
        model()(IDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="expected one of them, got neither"):
        choices()
    with pytest.raises(ValueError, match=r"inputs_embeds: expected \[B, L, 16\], got \(2, 12, 8\)"):
        model()(inputs_embeds=embeds[..., :8])
    with pytest.raises(ValueError, match=r"expected \[B, choices, L, D\], got \(2, 12, 16\)"):
        choices(inputs_embeds=embeds)


def test_one_row_of_positions_is_for_all_sequences():
    positions = np.arange(12)[None] * 3
    np.testing.assert_array_equal(
        model().model(IDS, position_ids=positions).last_hidden_state,
        model().model(IDS, position_ids=positions.repeat(2, axis=0)).last_hidden_state,
    )


def test_outputs_by_configuration():
    """output_hidden_states and output_attentions of config.json, unless the call decides."""
    config = mj.ModernBertConfig.from_dict(
        CONFIG.to_dict() | {"output_hidden_states": True, "output_attentions": True}
    )
    assert mj.ModernBertConfig.from_dict(config.to_dict()) == config
    talkative = mj.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    out = talkative(IDS)
    assert out.hidden_states and len(out.hidden_states) == 3
    assert out.attentions and len(out.attentions) == 2
    out = talkative(IDS, output_hidden_states=False, output_attentions=False)
    assert out.hidden_states is None and out.attentions is None
    out = talkative(IDS, dropout_key=jax.random.key(0))
    assert out.hidden_states is None and out.attentions is None
    assert talkative.predict_hidden(IDS).shape == (2, 12, 16)
    assert model()(IDS).hidden_states is None


def test_export_with_a_symbolic_batch():
    """One exported program for every batch size: a dense global layer, a local one in bands."""
    classifier = model(mj.ModernBertForSequenceClassification)
    run = jax.jit(lambda ids, mask: classifier(ids, mask).logits)
    (B,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((B, 60), jnp.int32)
    exported = jax.export.export(run)(shape, shape)
    ids = np.random.default_rng(1).integers(5, 64, (3, 60)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, 7:] = 0
    np.testing.assert_allclose(exported.call(ids, mask), run(ids, mask), atol=1e-6)


@pytest.mark.parametrize("attention_mask", [jnp.ones((1, 3)), jnp.array([[True, False, False]])])
def test_masks_of_other_dtypes(attention_mask):
    np.testing.assert_array_equal(make_segment_ids((1, 3), attention_mask), attention_mask)
