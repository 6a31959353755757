"""int8 weights: rounding against NumPy, closeness to float32, adapters, inference and refusals."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax import Embedder, lora, pipeline, quantize
from modernbert_jax.checkpoint.params import variables, with_arrays
from modernbert_jax.layers import Linear
from modernbert_jax.weights import weight_of
from tests.benchmarks.int8 import cosine, scaled

CONFIG = mj.ModernBertConfig(
    vocab_size=300, hidden_size=48, intermediate_size=72, num_hidden_layers=3,
    num_attention_heads=4, local_attention=16, pad_token_id=0, max_position_embeddings=512,
    num_labels=3,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(5, 300, (3, 40))


def seeded(cls=mj.ModernBertForMaskedLM, **changes):
    model = cls(CONFIG.replace(**changes), rngs=nnx.Rngs(0))
    scaled(model, seed=1)
    return model


def last_hidden(model, **options) -> np.ndarray:
    call = nnx.jit(lambda model: getattr(model, "model", model)(IDS, **options).last_hidden_state)
    return np.asarray(call(model), np.float64)


@pytest.fixture(scope="module")
def expected():
    """The final hidden states in float32."""
    return last_hidden(seeded())


@pytest.mark.parametrize(
    "mode, dtype",
    [
        ("weights", "float32"),
        ("dynamic", "float32"),
        pytest.param("weights", "bfloat16", marks=pytest.mark.matrix),
        pytest.param("dynamic", "bfloat16", marks=pytest.mark.matrix),
    ],
)
def test_hidden_states_and_vectors_are_close_to_float32(mode, dtype, expected):
    found = last_hidden(quantize(seeded(dtype=dtype, param_dtype=dtype), mode))
    assert cosine(found, expected).min() > 0.99
    assert cosine(found.mean(1), expected.mean(1)).min() > 0.999
    assert cosine(found, expected).max() < 1.0 - 1e-7  # the weights are in use, and rounded


def test_a_layer_computes_what_numpy_does():
    """Both modes, on Wqkv, whose weight has three axes of outputs, and attn.Wo, with two of inputs.

    The largest input and weight is positive: -127.5 may become -128 or -127, 127.5 is always 127.
    """
    x = np.random.default_rng(2).normal(size=(2, 7, 48)).astype(np.float32)
    x[:, :, 5] = 4.0
    x_scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
    x_rounded = np.clip(np.round(x / x_scale), -128, 127)
    for name in ("Wqkv", "Wo"):
        for mode in ("weights", "dynamic"):
            model = seeded()
            layer = getattr(model.model.layers[1].attn, name)
            shape = layer.weight.shape
            matrix = np.array(layer.weight[...]).reshape(48, -1)
            matrix[7] = 1.0
            layer.weight[...] = matrix.reshape(shape)
            scale = np.abs(matrix).max(axis=0, keepdims=True) / 127.5
            rounded = np.clip(np.round(matrix / scale), -128, 127)
            quantize(model, mode)
            assert layer.weight.dtype == jnp.int8
            np.testing.assert_array_equal(layer.weight[...], rounded.reshape(shape))
            if mode == "weights":
                want = x @ (rounded * scale)
            else:
                want = (x_rounded @ rounded) * x_scale * scale
            found = np.asarray(layer(x)).reshape(want.shape)
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


def test_what_is_quantized_and_how_many_bytes_remain():
    model = seeded(mj.ModernBertForSequenceClassification)
    before = {path: param.get_value() for path, param in variables(model).items()}
    count = model.num_parameters()
    assert quantize(model) is model
    after, build = with_arrays(model)
    int8 = {path for path, array in after.items() if array.dtype == jnp.int8}
    assert int8 == {p for p in before if weight_of(p).inputs and not p.startswith("classifier")}
    assert model.num_parameters() == count
    for path in before.keys() - int8:
        np.testing.assert_array_equal(after[path], before[path])
    smaller = sum(after[p].nbytes + after[p.replace("weight", "scale")].nbytes for p in int8)
    assert smaller < 0.35 * sum(before[p].nbytes for p in int8)  # 1 / 4, and a scale per output
    assert type(build(after)) is type(model)


def test_scanned_layers_meshes_and_packed_projections_give_the_same(expected):
    model = quantize(seeded())
    plain = last_hidden(model)
    np.testing.assert_allclose(last_hidden(model, scan_layers=True), plain, atol=1e-5)
    attn, x = model.model.layers[1].attn, jnp.asarray(expected[:1], jnp.float32)
    packed = attn._packed_qkv(x, 2)  # what the TPU kernel reads: [B, L, H/J, 3, J, K]
    qkv = attn.Wqkv(x).reshape(1, 40, 3, 2, 2, 12)
    np.testing.assert_allclose(packed, jnp.swapaxes(qkv, 2, 3), atol=1e-5)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mj.shard_params(model, mesh)
    assert not model.model.layers[1].attn.Wqkv.weight[...].sharding.is_fully_replicated
    np.testing.assert_allclose(last_hidden(model), plain, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected weights on one device.*quantize first"):
        quantize(mj.shard_params(seeded(), mesh))


def test_adapters_train_upon_int8_weights():
    model = quantize(seeded())
    lora.add_lora(model, rank=2)
    frozen = {path: np.asarray(value) for path, value in with_arrays(model)[0].items()}
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=lora.LoRAParam)

    def loss_of(model):
        return model(IDS, labels=IDS).loss

    @nnx.jit
    def step(model, optimizer):
        where = nnx.DiffState(0, lora.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_of, argnums=where)(model)
        optimizer.update(model, grads)
        return loss, grads

    first, grads = step(model, optimizer)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(grads)}
    assert paths == set(variables(model, lora.LoRAParam)) and len(paths) == 2 * 4 * 3
    last = [step(model, optimizer)[0] for _ in range(3)][-1]
    assert last < first
    for path, value in with_arrays(model)[0].items():
        changed = not np.array_equal(np.asarray(value), frozen[path])
        assert changed == ("lora_" in path), path

    # The gradient is that of the float model with the rounded weights.
    full = seeded()
    lora.add_lora(full, rank=2)
    theirs = {p: v.get_value() for p, v in variables(model, nnx.Variable).items()}
    for path, layer in lora.linear_layers(full):
        layer.weight[...] = theirs[f"{path}.weight"] * theirs[f"{path}.scale"]
        if layer.lora_A is not None:  # the head's dense layer has none
            layer.lora_A.weight[...] = theirs[f"{path}.lora_A.weight"]
            layer.lora_B.weight[...] = theirs[f"{path}.lora_B.weight"]
    grad = nnx.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, lora.LoRAParam)))
    for ours, other in zip(jax.tree.leaves(grad(model)), jax.tree.leaves(grad(full)), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)


def test_the_backward_pass_keeps_no_dequantized_weight():
    """Otherwise training adapters would need the memory of the float model."""
    layer = quantize(seeded()).model.layers[1].mlp.Wi
    graph, state = nnx.split(layer)
    x = jnp.ones((1, 4, 48))
    _, kept = jax.eval_shape(lambda x: jax.vjp(lambda x: nnx.merge(graph, state)(x), x), x)
    sizes = [leaf.size for leaf in jax.tree.leaves(kept) if leaf.dtype != jnp.int8]
    assert all(size < layer.weight.size for size in sizes), sizes


def test_adapters_may_come_first_and_are_kept(tmp_path):
    model = seeded()
    lora.add_lora(model, rank=2)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.lora_B is not None:
            module.lora_B.weight[...] = jnp.full(module.lora_B.weight.shape, 0.05)
    want = last_hidden(model)
    plain = last_hidden(quantize(seeded()))
    assert cosine(plain, want).mean() < 0.9
    found = last_hidden(quantize(model))
    assert cosine(found, want).min() > 0.99
    lora.save_adapter(model, tmp_path)
    again = quantize(seeded())
    lora.load_adapter(again, tmp_path)
    np.testing.assert_allclose(last_hidden(again), found, atol=1e-5)
    with pytest.raises(ValueError, match="merge: expected float weights, got int8"):
        lora.merge(model)


TEXTS = ["the patient has no fever", "denies cough", "seen today with a rash and pain " * 3]


@pytest.mark.parametrize("mode", [pytest.param("weights", marks=pytest.mark.matrix), "dynamic"])
def test_embedder_and_pipelines_use_the_int8_weights(mode, small_tokenizer):
    embedder = Embedder(seeded(mj.ModernBertModel), small_tokenizer)
    want = embedder.encode(TEXTS)
    embedder = dataclasses.replace(embedder, model=quantize(embedder.model, mode))
    assert any(array.dtype == jnp.int8 for array in embedder._params.values())
    found = embedder.encode(TEXTS)
    assert 0.99 < cosine(found, want).min() < 1 - 1e-7

    model = quantize(seeded(mj.ModernBertForSequenceClassification), mode)
    classify = pipeline("text-classification", model, tokenizer=small_tokenizer, top_k=None)
    ids = np.array([small_tokenizer(TEXTS[0])["input_ids"]])
    probabilities = jax.nn.softmax(nnx.jit(lambda model: model(ids).logits)(model)[0])
    scores = {row["label"]: row["score"] for row in classify(TEXTS[:1])[0]}
    # A sum in another order may round an input to its other neighbor.
    atol = 1e-4 if mode == "weights" else 0.02
    np.testing.assert_allclose([scores[f"LABEL_{i}"] for i in range(3)], probabilities, atol=atol)


def test_dropout_of_the_model_is_disabled_in_an_embedder(small_tokenizer):
    model = seeded(mj.ModernBertModel, mlp_dropout=0.5)
    want = Embedder(model, small_tokenizer).encode(TEXTS)
    model.train()
    found = Embedder(model, small_tokenizer).encode(TEXTS)
    np.testing.assert_array_equal(found, want)
    assert model.dropout_rngs is not None and not model.deterministic


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mode: expected weights or dynamic, got 'int4'"):
        quantize(seeded(), "int4")
    with pytest.raises(TypeError, match="model: expected a model, got dict"):
        quantize({})
    with pytest.raises(ValueError, match="expected linear layers of ModernBERT, found none"):
        quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = quantize(seeded(), "dynamic")
    with pytest.raises(ValueError, match=r"expected float weights, got int8; load the model"):
        quantize(model)
    with pytest.raises(ValueError, match=r"got int8; save, export and train the float model"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"expected a float weight, got int8; merge adapters"):
        model.model.layers[1].attn.Wo.full_weight()
    with pytest.raises(ValueError, match=r'mode "dynamic": expected inference, got a gradient'):
        nnx.grad(lambda model: model(IDS).logits.sum())(model)
    with pytest.raises(TypeError, match=r"quantization_config: .*quantize\(model\) makes them"):
        mj.ModernBertModel.from_pretrained(tmp_path, quantization_config={})
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"expected the package qwix, found none; pip install"):
        quantize(seeded())
