"""What the model promises without a reference: sizes, packing, padding, locality, scan, dropout."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax.attention import attention, make_bounds, make_segment_ids
from modernbert_jax.config import FULL, SLIDING

CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=4, local_attention=8
)


@functools.cache
def mlm():
    return mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnames="num_segments")
def run(model, ids, **inputs):
    """model(ids, **inputs), compiled."""
    return model(ids, **inputs)


def ids_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(5, 64, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("size, parameters", [("base", 149_655_232), ("large", 395_881_664)])
def test_published_parameter_counts(size, parameters):
    config = getattr(mj.ModernBertConfig, size)()
    model = nnx.eval_shape(lambda: mj.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == parameters
    ids = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    out = nnx.eval_shape(lambda m, i: m(i, predict_positions=i[:, :16]), model, ids)
    assert out.logits.shape == (2, 16, 50368)


class TestBounds:
    """Masks written by hand."""

    ids = np.array([[1, 1, 1, 2, 2, 0, 0, 3]], np.int32)

    def test_segments(self):
        want = """11100000
                  11100000
                  11100000
                  00011000
                  00011000
                  00000000
                  00000000
                  00000001"""
        self.compare(make_bounds(self.ids), want)

    def test_window_of_one(self):
        want = """11000000
                  11100000
                  01100000
                  00011000
                  00011000
                  00000000
                  00000000
                  00000001"""
        self.compare(make_bounds(self.ids, 1), want)

    def compare(self, bounds, text):
        want = np.array([[int(c) for c in line.strip()] for line in text.split("\n")], bool)
        np.testing.assert_array_equal(bounds.as_mask()[0], want)
        np.testing.assert_array_equal(bounds.as_mask()[0].T, want)  # symmetric

    def test_a_segment_is_a_run(self):
        bounds = make_bounds(np.array([[1, 1, 0, 1]], np.int32))
        np.testing.assert_array_equal(bounds.lo_BL, [[0, 0, 2, 3]])
        np.testing.assert_array_equal(bounds.hi_BL, [[2, 2, 2, 4]])

    def test_modernbert_sees_129_keys(self):
        bounds = make_bounds(np.ones((1, 400), np.int32), mj.ModernBertConfig().window)
        assert int((bounds.hi_BL - bounds.lo_BL)[0, 200]) == 129

    def test_refusals(self):
        with pytest.raises(ValueError, match="radius of at least 0 tokens, got -1"):
            make_bounds(self.ids, -1)
        with pytest.raises(ValueError, match="expected ids of 0 .padding. to .*, got -3"):
            make_bounds(-self.ids)
        with pytest.raises(ValueError, match="one run of ones per sequence .* 0 has holes"):
            make_segment_ids((1, 3), np.array([[1, 0, 1]]))


def test_attention_refuses_what_it_cannot_do():
    x = jnp.zeros((1, 4, 2, 8))
    bounds = make_bounds(np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="expected one of .*got 'magic'"):
        attention(x, x, x, bounds, scale=1.0, implementation="magic")
    with pytest.raises(ValueError, match="expected q .B, L, H, K. and k and v"):
        attention(x, x[:, :3], x, bounds, scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        attention(x, x.astype(jnp.bfloat16), x, bounds, scale=1.0)
    with pytest.raises(ValueError, match="bounds of shape"):
        attention(x[:, :3], x[:, :3], x[:, :3], bounds, scale=1.0)


def test_packed_equals_separate():
    """One row of three sequences against three rows, hidden states and gradients, to 1e-6."""
    model = mlm()
    lengths = [13, 1, 22]
    parts = [ids_of(1, n, seed=n) for n in lengths]
    packed = np.concatenate([*parts, np.zeros((1, 4), np.int32)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 4])[None].astype(np.int32)

    def loss(model, rows):
        return sum(jnp.sum(jnp.sin(model(i, segment_ids=s).logits) * (s > 0)[..., None])
                   for i, s in rows)  # fmt: skip

    row = [(packed, segments)]
    rows = [(p, np.ones_like(p)) for p in parts]
    hidden = np.asarray(run(model.model, packed, segment_ids=segments).last_hidden_state)[0]
    alone = np.concatenate([np.asarray(run(model.model, p).last_hidden_state)[0] for p in parts])
    np.testing.assert_allclose(hidden[:36], alone, atol=1e-6 * np.abs(alone).max())
    for a, b in zip(
        jax.tree.leaves(nnx.jit(nnx.grad(loss))(model, row)),
        jax.tree.leaves(nnx.jit(nnx.grad(loss))(model, rows)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    ids = ids_of(1, 20)
    alone = np.asarray(run(mlm(), ids).logits)[0]
    before, after = (11, 0) if side == "left" else (0, 11)
    padded = np.pad(ids, ((0, 0), (before, after)), constant_values=2)
    mask = np.pad(np.ones_like(ids), ((0, 0), (before, after)))
    got = np.asarray(run(mlm(), padded, attention_mask=mask).logits)[0][mask[0] == 1]
    np.testing.assert_allclose(got, alone, atol=1e-6 * np.abs(alone).max())


def test_a_local_layer_sees_its_window_only():
    """Gradient of one position's output by every input: zero beyond the radius, not within."""
    config = CONFIG.replace(num_hidden_layers=1, layer_types=(SLIDING,))
    model = mj.ModernBertModel(config, rngs=nnx.Rngs(0))
    ids = ids_of(1, 30)
    table = np.asarray(model.embeddings.tok_embeddings.weight[...])[ids[0]]
    model.config = config.replace(vocab_size=30)
    model.embeddings.tok_embeddings.weight.set_value(jnp.asarray(table))
    model.embeddings.tok_embeddings.pad_token_id = None

    def output(model):
        out = model(np.arange(30, dtype=np.int32)[None]).last_hidden_state
        return jnp.sum(out[0, 15] * jnp.arange(32.0))

    grads = nnx.jit(nnx.grad(output))(model).embeddings.tok_embeddings.weight[...]
    seen = np.flatnonzero(np.abs(np.asarray(grads)).max(-1) > 0)
    np.testing.assert_array_equal(seen, np.arange(15 - 4, 15 + 4 + 1))


@pytest.mark.parametrize("layers, remat", [(7, True), (1, False)])
def test_scan_and_remat_change_nothing(layers, remat):
    config = CONFIG.replace(num_hidden_layers=layers, attention_out_dropout=0.3)
    model = mj.ModernBertForMaskedLM(config, rngs=nnx.Rngs(1))
    ids, key = ids_of(2, 24), jax.random.key(3)

    def loss(model, **how):
        return jnp.sum(jnp.sin(model(ids, dropout_key=key, **how).logits))

    want = nnx.jit(nnx.value_and_grad(loss))(model)
    got = nnx.jit(nnx.value_and_grad(functools.partial(loss, scan_layers=True, remat=remat)))(model)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


def test_predicted_positions_are_a_choice_of_the_logits():
    ids = ids_of(2, 24)
    places = np.array([[3, 0, 23, 3], [5, 6, 7, 0]], np.int32)
    everything = np.asarray(run(mlm(), ids).logits)
    some = np.asarray(run(mlm(), ids, predict_positions=places).logits)
    want = np.take_along_axis(everything, places[..., None], axis=1)
    np.testing.assert_allclose(some, want, atol=1e-5)
    predict = nnx.jit(lambda m: m.logits(m.predict_hidden(ids, predict_positions=places)))
    np.testing.assert_allclose(predict(mlm()), want, atol=1e-5)


class TestDropout:
    @pytest.mark.parametrize(
        "field",
        ["embedding_dropout", "attention_dropout", "attention_out_dropout", "mlp_dropout"],
    )
    def test_acts_only_with_a_key_and_is_a_function_of_it(self, field):
        config = CONFIG.replace(num_hidden_layers=2, **{field: 0.3})
        model = mj.ModernBertModel(config, rngs=nnx.Rngs(0))
        plain = mj.ModernBertModel(config.replace(**{field: 0.0}), rngs=nnx.Rngs(0))
        ids = ids_of(1, 12)

        def hidden(model, seed):
            key = None if seed is None else jax.random.key(seed)
            return np.asarray(run(model, ids, dropout_key=key).last_hidden_state)

        np.testing.assert_array_equal(hidden(model, None), hidden(plain, None))
        np.testing.assert_array_equal(hidden(model, 1), hidden(model, 1))
        assert np.abs(hidden(model, 1) - hidden(model, 2)).max() > 1e-4
        np.testing.assert_array_equal(hidden(plain, 1), hidden(plain, None))

    def test_a_key_per_sequence(self):
        """Each sequence depends on its own key alone; another number of keys is refused."""
        model = mj.ModernBertModel(
            CONFIG.replace(num_hidden_layers=2, attention_dropout=0.1, mlp_dropout=0.2),
            rngs=nnx.Rngs(0),
        )
        ids = np.repeat(ids_of(1, 12), 3, axis=0)
        keys = jax.random.split(jax.random.key(0), 2)[np.array([0, 1, 0])]
        out = np.asarray(run(model, ids, dropout_key=keys).last_hidden_state)
        np.testing.assert_array_equal(out[0], out[2])
        assert np.abs(out[0] - out[1]).max() > 1e-4
        with pytest.raises(ValueError, match="dropout_key: expected one key or 3, one per seq"):
            model(ids, dropout_key=keys[:2])


class TestPooling:
    hidden = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
    ids = np.array([[0, 1, 1, 2, 3, 3, 3]], np.int32)

    def test_mean_and_cls(self):
        h = self.hidden[0]
        mean = mj.pool(self.hidden, self.ids, 4, "mean")[0]
        np.testing.assert_allclose(
            mean, [h[1:3].mean(0), h[3], h[4:].mean(0), np.zeros(3)], atol=1e-6
        )
        cls = mj.pool(self.hidden, self.ids, 4, "cls")[0]
        np.testing.assert_array_equal(cls, [h[1], h[3], h[4], np.zeros(3)])

    def test_other_poolings_without_a_prompt(self):
        h = self.hidden[0]
        pooled = {
            mode: mj.pool(self.hidden, self.ids, 4, mode, skip=1)[0]
            for mode in ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
        }
        want = {
            "cls": h[5], "lasttoken": h[6], "max": h[5:].max(0), "mean": h[5:].mean(0),
            "mean_sqrt_len_tokens": h[5:].sum(0) / 2**0.5,
            "weightedmean": (2 * h[5] + 3 * h[6]) / 5,
        }  # fmt: skip
        for mode, got in pooled.items():
            np.testing.assert_allclose(got[2], want[mode], atol=1e-6)
            np.testing.assert_allclose(got[0], h[2], atol=1e-6)
            assert not np.any(got[1]) and not np.any(got[3])  # no token left, and no segment

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize(
        "cls", [mj.ModernBertForSequenceClassification, mj.ModernBertForMultipleChoice]
    )
    def test_heads_on_packed_rows_equal_heads_on_rows(self, cls, pooling):
        model = cls(CONFIG.replace(classifier_pooling=pooling, num_labels=3), rngs=nnx.Rngs(0))
        parts = [ids_of(1, n, seed=n) for n in (9, 4, 11)]
        packed = np.concatenate(parts, axis=1)
        segments = np.repeat([1, 2, 3], [9, 4, 11])[None].astype(np.int32)
        got = run(model, packed, segment_ids=segments, num_segments=3).logits
        one = (lambda p: p[:, None]) if cls is mj.ModernBertForMultipleChoice else (lambda p: p)
        want = [run(model, one(p)).logits[0] for p in parts]
        want = np.squeeze(want, -1) if cls is mj.ModernBertForMultipleChoice else np.array(want)
        np.testing.assert_allclose(got[0], want, atol=1e-5)

    def test_packed_rows_need_the_number_of_segments(self):
        model = mj.ModernBertForSequenceClassification(CONFIG, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="need num_segments"):
            model(self.ids, segment_ids=self.ids)


@pytest.mark.parametrize(
    "call",
    [
        mj.ModernBertModel.__call__,
        mj.ModernBertForMaskedLM.__call__,
        mj.ModernBertForMaskedLM.predict_hidden,
        mj.ModernBertForSequenceClassification.__call__,
        mj.ModernBertForTokenClassification.__call__,
        mj.ModernBertForQuestionAnswering.__call__,
        mj.ModernBertForMultipleChoice.__call__,
    ],
    ids=lambda call: call.__qualname__,
)
def test_signatures_show_every_argument(call):
    """In the order and with the names of transformers; only refused names are not listed."""
    parameters = inspect.signature(call).parameters
    expected = ["self", "input_ids", "attention_mask", "segment_ids", "position_ids"]
    assert list(parameters)[:5] == expected
    assert {"inputs_embeds", "dropout_key", "attention", "scan_layers", "remat"} <= set(parameters)
    hidden = [p.name for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert hidden == ["unsupported"]


def test_batch_encodings_of_transformers():
    """What a tokenizer returns goes in as **inputs, also into a compiled call."""
    transformers = pytest.importorskip("transformers")
    inputs = transformers.BatchEncoding(
        {"input_ids": ids_of(2, 9), "attention_mask": np.repeat([[1] * 7 + [0] * 2], 2, axis=0)}
    )
    forward = nnx.jit(mj.ModernBertForMaskedLM.__call__)
    got = forward(mlm(), **inputs).logits
    np.testing.assert_allclose(got, mlm()(**inputs).logits, atol=1e-5)
    with pytest.raises(TypeError, match=r"input_ids: expected an array, .*model\(\*\*inputs\)"):
        mlm()(inputs)
    with pytest.raises(TypeError, match="decoder_input_ids: not an argument of this model"):
        mlm()(**inputs, decoder_input_ids=inputs["input_ids"])


def test_refuses_shapes_that_do_not_match():
    ids = ids_of(2, 8)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape .*got \(2, 7\)"):
        mlm()(ids, np.ones((2, 7)))
    with pytest.raises(ValueError, match=r"expected shape \[B, L\]"):
        mlm()(ids[0])


def test_the_two_kinds_of_layers_have_their_own_angles():
    """In either order of calls: no table may be kept under too narrow a key."""
    from modernbert_jax.attention.rope import rope_tables

    config, positions = mj.ModernBertConfig(), np.arange(50)[None]
    tables = [
        np.asarray(rope_tables(positions, 64, config.rope_theta(kind))[0])
        for kind in (FULL, SLIDING, FULL)
    ]
    np.testing.assert_array_equal(tables[0], tables[2])
    assert np.abs(tables[0] - tables[1]).max() > 0.1
    frequencies = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(tables[1], np.cos(positions[..., None] * frequencies), atol=5e-6)
