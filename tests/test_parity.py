"""Exactness against transformers in torch: a ladder from one norm to logits and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax import attention as attention_op
from modernbert_jax.attention import make_bounds
from modernbert_jax.attention.rope import apply_rope, rope_tables
from modernbert_jax.checkpoint.hf import hf_to_params
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.config import FULL, SLIDING
from modernbert_jax.weights import to_hf
from tests.parity_cases import CASES, QUICK, hf_model, inputs, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.optimized

FORWARD, GRADIENT = 1e-5, 1e-4  # of the reference's largest value
every_case = [pytest.param(n, marks=() if n in QUICK else pytest.mark.matrix) for n in CASES]
HEADS = {
    "ModernBertForMaskedLM": mj.ModernBertForMaskedLM,
    "ModernBertForSequenceClassification": mj.ModernBertForSequenceClassification,
    "ModernBertForTokenClassification": mj.ModernBertForTokenClassification,
    "ModernBertForQuestionAnswering": mj.ModernBertForQuestionAnswering,
    "ModernBertForMultipleChoice": mj.ModernBertForMultipleChoice,
}


def ours_of(reference, head="ModernBertForMaskedLM", **changes):
    """Our module with the weights of a transformers model."""
    config = mj.ModernBertConfig.from_dict(reference.config.to_dict()).replace(**changes)
    tensors = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    cls = HEADS[head]
    return module_of(cls, config, hf_to_params(cls, config, tensors))


def t(x):
    return torch.tensor(np.asarray(x))


class TestLadder:
    """Each rung uses the ones below, so the first red one names the fault."""

    reference = functools.cached_property(
        lambda self: hf_model("ModernBertForMaskedLM", {**CASES["biases"][0]})
    )
    ours = functools.cached_property(lambda self: ours_of(self.reference))
    x = np.random.default_rng(0).normal(size=(2, 40, 48)).astype(np.float32) * 3 + 1

    def test_1_norm(self):
        want = self.reference.model.final_norm(t(self.x)).detach()
        assert relative_error(self.ours.model.final_norm(jnp.asarray(self.x)), want) < 1e-6

    def test_2_embeddings(self):
        ids, _ = inputs(40)
        want = self.reference.model.embeddings(t(ids)).detach()
        assert relative_error(self.ours.model.embeddings(jnp.asarray(ids), None), want) < 1e-6

    @pytest.mark.parametrize("kind", [FULL, SLIDING])
    def test_3_rope(self, kind):
        from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

        q = np.random.default_rng(1).normal(size=(2, 40, 4, 12)).astype(np.float32)
        positions = np.arange(40)[None] * 37
        cos, sin = self.reference.model.rotary_emb(t(q), t(positions), kind)
        want, _ = apply_rotary_pos_emb(t(q), t(q), cos, sin, unsqueeze_dim=2)
        tables = rope_tables(jnp.asarray(positions), 12, self.ours.config.rope_theta(kind))
        # The angle reaches 1443 radians, where one float32 step is 1.2e-4.
        assert relative_error(apply_rope(jnp.asarray(q), tables), want) < 2e-4

    def test_4_mlp(self):
        want = self.reference.model.layers[1].mlp(t(self.x)).detach()
        got = self.ours.model.layers[1].mlp(jnp.asarray(self.x), None)
        assert relative_error(got, want) < FORWARD

    @pytest.mark.parametrize("layer", [0, 1])
    def test_5_attention(self, layer):
        model, kind = self.reference.model, self.reference.config.layer_types[layer]
        index = np.arange(40)
        window = self.ours.config.window if kind == SLIDING else 40
        allowed = np.abs(index[:, None] - index[None]) <= window
        mask = torch.where(t(allowed), 0.0, torch.finfo(torch.float32).min)[None, None]
        rope = model.rotary_emb(t(self.x), t(index[None]), kind)
        want, _ = model.layers[layer].attn(t(self.x), rope, mask)
        bounds = make_bounds(np.ones((2, 40), np.int32), None if kind == FULL else window)
        tables = rope_tables(jnp.asarray(index[None]), 12, self.ours.config.rope_theta(kind))
        got = self.ours.model.layers[layer].attn(
            jnp.asarray(self.x), tables, bounds, attention_op.attention, None
        )
        assert relative_error(got, want.detach()) < FORWARD

    def test_6_every_layer(self):
        ids, mask = inputs(40, padding="right")
        with torch.no_grad():
            want = self.reference.model(t(ids), t(mask), output_hidden_states=True)
        got = self.ours.model(ids, mask, output_hidden_states=True)
        assert len(got.hidden_states) == len(want.hidden_states)
        for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            assert relative_error(ours, theirs, mask) < FORWARD

    def test_7_head(self):
        want = self.reference.head(t(self.x)).detach()
        assert relative_error(self.ours.head(jnp.asarray(self.x)), want) < FORWARD


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("case", every_case)
def test_masked_lm(case, padding):
    changes, length = CASES[case]
    reference = hf_model("ModernBertForMaskedLM", changes)
    model = ours_of(reference)
    ids, mask = inputs(length, padding=padding)
    with torch.no_grad():
        want = reference(t(ids), t(mask), output_hidden_states=True)
    got = nnx.jit(lambda m, i, a: m(i, a, output_hidden_states=True))(
        model, jnp.asarray(ids), jnp.asarray(mask)
    )
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative_error(ours, theirs, mask) < FORWARD
    assert relative_error(got.logits, want.logits, mask) < FORWARD
    assert np.isfinite(np.asarray(got.logits)).all()


def test_a_token_that_sees_only_itself():
    """A window of one token, half of which is a radius of 0."""
    changes = {"num_hidden_layers": 2, "layer_types": [SLIDING] * 2, "local_attention": 1}
    reference = hf_model("ModernBertForMaskedLM", changes)
    ids, mask = inputs(20, padding="right")
    with torch.no_grad():
        want = reference(t(ids), t(mask)).logits
    assert relative_error(ours_of(reference)(ids, mask).logits, want, mask) < FORWARD


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("head", list(HEADS)[1:])
def test_classifiers(head, padding, pooling):
    labels = 2 if head == "ModernBertForQuestionAnswering" else 5
    changes = {"num_hidden_layers": 4, "classifier_pooling": pooling, "num_labels": labels}
    reference = hf_model(head, changes)
    model = ours_of(reference, head)
    ids, mask = inputs(35, rows=6, padding=padding)
    if head == "ModernBertForMultipleChoice":
        ids, mask = ids.reshape(2, 3, 35), mask.reshape(2, 3, 35)
    with torch.no_grad():
        want = reference(t(ids), attention_mask=t(mask))
        if head == "ModernBertForSequenceClassification" and (padding, pooling) == ("left", "cls"):
            # transformers pools position 0, which is padding here: compare with bare rows.
            rows = [reference(t(i[m == 1])[None]).logits for i, m in zip(ids, mask, strict=True)]
            want.logits = torch.cat(rows)
    got = model(input_ids=ids, attention_mask=mask)
    if head == "ModernBertForQuestionAnswering":
        assert relative_error(got.start_logits, want.start_logits, mask) < FORWARD
        assert relative_error(got.end_logits, want.end_logits, mask) < FORWARD
    else:
        where = mask if head == "ModernBertForTokenClassification" else None
        assert relative_error(got.logits, want.logits, where) < FORWARD


@pytest.mark.parametrize("case", every_case)
def test_gradients(case):
    changes, length = CASES[case]
    reference = hf_model("ModernBertForMaskedLM", changes)
    model = ours_of(reference)
    ids, mask = inputs(length, padding="right")
    labels = np.where((np.random.default_rng(5).random(ids.shape) < 0.4) & (mask == 1), ids, -100)
    labels[0, 0] = ids[0, 0]
    reference(t(ids), t(mask), labels=t(labels)).loss.backward()

    def loss(model):
        logp = jax.nn.log_softmax(model(jnp.asarray(ids), jnp.asarray(mask)).logits)
        picked = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0.0)) / (labels >= 0).sum()

    grads = {
        ".".join(map(str, k)): v.get_value()
        for k, v in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model))
    }
    theirs = {k: p.grad for k, p in reference.named_parameters()}
    assert set(grads) == set(theirs)
    for key, want in theirs.items():
        assert relative_error(to_hf(key, grads[key]), want) < GRADIENT, key


@pytest.mark.parametrize("layers", [4, 7])
def test_bfloat16_is_no_worse_than_torch(layers):
    """RMS error of bf16 against float32 at most 1.5 times torch's own."""
    reference = hf_model("ModernBertForMaskedLM", {"num_hidden_layers": layers})
    ids, mask = inputs(64, padding="right")
    rms = lambda a, b: float(np.sqrt(np.mean(((a - b)[mask == 1]) ** 2)))  # noqa: E731
    model, half = ours_of(reference), ours_of(reference, dtype="bfloat16")
    exact = np.asarray(model(ids, mask).logits)
    ours = rms(np.asarray(half(ids, mask).logits), exact)
    with torch.no_grad():
        theirs = rms(reference.bfloat16()(t(ids), t(mask)).logits.float().numpy(), exact)
    assert 0 < ours <= 1.5 * theirs, (ours, theirs)


def test_whole_rows_of_padding_are_finite():
    model = ours_of(hf_model("ModernBertForMaskedLM"))
    ids, mask = inputs(40)
    mask[1] = 0

    def loss(model):
        return jnp.sum(model(jnp.asarray(ids), jnp.asarray(mask)).logits ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    assert np.isfinite(float(value))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_initialisation_has_transformers_spread():
    """Standard deviation of each weight against transformers' own initialisation."""
    import transformers

    changes = {"hidden_size": 192, "intermediate_size": 256, "vocab_size": 2000}
    torch.manual_seed(0)
    reference = transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**changes, num_hidden_layers=4, num_attention_heads=4,
                                      pad_token_id=0, num_labels=150)
    )  # fmt: skip
    config = mj.ModernBertConfig.from_dict(reference.config.to_dict())
    ours = flatten(mj.ModernBertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    for key, p in reference.named_parameters():
        if p.ndim == 2:
            want, got = float(p.detach().std()), float(np.std(ours[key]))
            assert abs(got / want - 1) < 0.03, (key, got, want)
            assert float(np.abs(ours[key]).max()) <= 1.03 * 2.0 * want / 0.8796  # cut at 2 sigma
        else:
            np.testing.assert_array_equal(ours[key], p.detach().numpy())
