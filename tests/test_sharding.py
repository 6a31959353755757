"""Every mesh shape against one device, the rules that map paths to axes, the rows of a process."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel
from modernbert_jax.attention import attention, context_parallel
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.config import FULL, SLIDING
from modernbert_jax.packing import IGNORE_INDEX
from train.common import sharding
from train.common.sharding import (
    MeshShape,
    at_positions,
    local_slots,
    make_mesh,
    padded_batch_size,
    param_shardings,
    to_devices,
)
from train.plan import hlo
from train.pretrain.config import Optimizer, TrainConfig
from train.pretrain.loss import masked_cross_entropy
from train.pretrain.step import Trainer

STEPS, RATE = 20, 3e-3
MODEL = ModernBertConfig.tiny(
    vocab_size=256, hidden_size=64, intermediate_size=48, num_hidden_layers=5,
    num_attention_heads=8, attention_out_dropout=0.1, local_attention=16,
)  # fmt: skip
RECIPE = TrainConfig(
    model=MODEL, optimizer=Optimizer(weight_decay=1e-2), global_batch_size=10,
    gradient_accumulation_steps=2, loss_chunk=16, scan_layers=True, remat="layers",
)  # fmt: skip
A, ROWS, LENGTH, PLACES = 2, 5, 96, 24


def mesh_of(shape: str):
    sizes = [int(n) for n in shape.split("x")]
    return make_mesh(MeshShape(*sizes), jax.devices()[: math.prod(sizes)])


def batch_of(step: int, slots: int) -> dict[str, np.ndarray]:
    """Rows of random packed segments; the slots beyond ROWS are empty."""
    rng = np.random.default_rng(step)
    shape = {"input_ids": LENGTH, "segment_ids": LENGTH, "predict_positions": PLACES}
    arrays = {k: np.zeros((A, slots, n), np.int32) for k, n in shape.items()}
    arrays["labels"] = np.full((A, slots, PLACES), IGNORE_INDEX, np.int32)
    for a in range(A):
        for r in range(ROWS):
            end = 0
            for number, length in enumerate(rng.integers(10, 30, 3), start=1):
                arrays["segment_ids"][a, r, end : end + length] = number
                end += length
            ids = rng.integers(5, 256, end)
            count = int(rng.integers(PLACES // 2, PLACES))
            arrays["input_ids"][a, r, :end] = ids
            arrays["predict_positions"][a, r, :count] = rng.choice(end, count, replace=False)
            arrays["labels"][a, r, :count] = rng.integers(5, 64, count)
    return arrays


@functools.cache
def trained(shape: str, weighting: str = "tokens"):
    """(losses, parameters) of twenty steps on a mesh whose devices do not divide the rows."""
    mesh = mesh_of(shape)
    trainer = Trainer(dataclasses.replace(RECIPE, loss_weighting=weighting), MODEL, mesh)
    slots = padded_batch_size(ROWS, mesh)
    own = local_slots(slots, mesh)
    state, losses = trainer.fresh(), []
    for step in range(STEPS):
        batch = to_devices(batch_of(step, slots), own, slots, mesh)
        state, metrics = trainer.train_step(state, batch, np.float32(RATE), np.float32(RATE))
        losses.append(float(metrics["loss"]))
    for tree in (state.params, state.optimizer.mu, state.optimizer.nu):
        for path, value in tree.items():
            assert value.sharding == trainer.shardings.params[path], path
    return losses, {k: np.asarray(v) for k, v in state.params.items()}


@pytest.mark.parametrize(
    "shape",
    [
        "2x2x1x2",
        "1x2x2x2",
        pytest.param("1x8x1x1", marks=pytest.mark.matrix),
        pytest.param("1x1x4x2", marks=pytest.mark.matrix),
        pytest.param("8x1x1x1", marks=pytest.mark.matrix),
        pytest.param("4x1x1x2", marks=pytest.mark.matrix),
        pytest.param("1x1x1x8", marks=pytest.mark.matrix),
        pytest.param("1x1x8x1", marks=pytest.mark.matrix),
        pytest.param("2x1x4x1", marks=pytest.mark.matrix),
    ],
)
def test_twenty_steps_equal_one_device(shape):
    want, params = trained("1x1x1x1")
    got, ours = trained(shape)
    assert want[0] - want[-1] > 0.5  # it learns
    np.testing.assert_allclose(got, want, atol=1e-5)
    for path, value in params.items():  # 1e-3 of the sum of the learning rates
        np.testing.assert_allclose(ours[path], value, atol=1e-3 * RATE * STEPS, err_msg=path)


def test_gradients_are_reduced_once_in_float32():
    """Nothing communicates in the loop over micro-batches, and the sums are reduced in float32."""
    model = MODEL.replace(num_hidden_layers=2, dtype="bfloat16")
    mesh = mesh_of("2x2x1")
    trainer = Trainer(RECIPE, model, mesh)
    batch = to_devices(batch_of(0, 8), np.arange(8), 8, mesh)
    traced = trainer.train_step.trace(trainer.fresh(), batch, RATE, RATE)
    # In the program as it is traced: a CPU's compiler widens bfloat16.
    dtypes = re.findall(r":(\w+)\[[\d,]*\] = reduce_scatter", str(traced.jaxpr))
    assert len(dtypes) > 8 and set(dtypes) == {"f32"}
    text = traced.lower().compile().as_text()
    found = hlo.read(text, mesh.size).collectives
    assert {c.count for c in found} == {1}
    size = 4 * sum(math.prod(leaf.shape) for leaf in trainer.shapes.values())
    scattered = sum(c.bytes for c in found if c.kind == "reduce-scatter")
    assert 0.9 * size < scattered <= size  # all but the norms and the decoder's bias


def test_dropout_does_not_depend_on_the_number_of_micro_batches():
    """The same ten sequences as two micro-batches of five, and as one of ten."""
    batch, rate, losses = batch_of(0, ROWS), np.float32(RATE), []
    for steps in (2, 1):
        config = dataclasses.replace(RECIPE, gradient_accumulation_steps=steps)
        trainer = Trainer(config, MODEL, mesh_of("1x1x1"))
        arrays = {k: v.reshape(steps, -1, v.shape[-1]) for k, v in batch.items()}
        losses.append(float(trainer.train_step(trainer.fresh(), arrays, rate, rate)[1]["loss"]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.parametrize(
    "shape", ["2x2x1x2", "1x1x4x2", pytest.param("1x2x2x2", marks=pytest.mark.matrix)]
)
def test_evaluation_equals_one_device(shape):
    def sums(shape):
        trainer = Trainer(RECIPE, MODEL, mesh := mesh_of(shape))
        slots = padded_batch_size(ROWS, mesh)
        batch = {name: x[:1] for name, x in batch_of(3, slots).items()}
        batch = to_devices(batch, local_slots(slots, mesh), slots, mesh)
        return [float(x) for x in trainer.eval_step(trainer.fresh().params, batch)]

    got, want = sums(shape), sums("1x1x1x1")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert got[1:] == want[1:]


class TestPartsOfSequences:
    """Devices that hold a part of the tokens of each sequence, against complete sequences."""

    @pytest.mark.parametrize("kind", [FULL, SLIDING])
    def test_a_model_of_one_kind_of_layers(self, kind):
        """Output and every gradient, with dropout and segments across the edges of four parts."""
        config = MODEL.replace(
            num_hidden_layers=2, layer_types=(kind,) * 2, embedding_dropout=0.1, mlp_dropout=0.2
        )
        # The keys of the dropout stream are state as well, but have no gradient.
        graph, state, rest = nnx.split(ModernBertModel(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
        segment_ids = jnp.asarray(batch_of(0, ROWS)["segment_ids"][0])
        x, d = np.random.default_rng(0).normal(size=(2, ROWS, LENGTH, 64)).astype(np.float32)
        keys = jax.random.split(jax.random.key(3), ROWS)

        def both(state, x, d, **more):
            def run(state, x):
                model = nnx.merge(graph, state, rest)
                return model(
                    inputs_embeds=x, segment_ids=segment_ids, dropout_key=keys, **more
                ).last_hidden_state

            out, pull = jax.vjp(run, state, x)
            return out, *pull(d)

        def local(state, x, d):
            first = jax.lax.axis_index("sequence") * x.shape[1]
            attend = context_parallel(attention, "sequence")
            out, d_state, d_x = both(state, x, d, first_token=first, attention=attend)
            return out, jax.lax.psum(d_state, "sequence"), d_x

        part = P(None, "sequence")
        parts = jax.shard_map(
            local, mesh=mesh_of("1x1x4x1"), in_specs=(P(), part, part), out_specs=(part, P(), part),
            check_vma=False,
        )  # fmt: skip
        want = jax.tree.leaves(jax.jit(both)(state, x, d))
        for ours, plain in zip(jax.tree.leaves(jax.jit(parts)(state, x, d)), want, strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())

    def test_states_at_predicted_positions(self):
        """Each device gets its share of the positions, whichever device holds the states."""
        rng = np.random.default_rng(0)
        hidden = rng.normal(size=(2, 16, 4)).astype(np.float32)
        positions = np.array([[3, 15, 0, 0, 7, 8, 12, 4], [1] * 8], np.int32)
        d = rng.normal(size=(2, 8, 4)).astype(np.float32)
        part = P(None, "sequence")
        parts = jax.shard_map(
            at_positions, mesh=mesh_of("1x1x4x1"), in_specs=(part, P()), out_specs=part,
            check_vma=False,
        )  # fmt: skip
        out, pull = jax.vjp(lambda hidden: parts(hidden, jnp.asarray(positions)), hidden)
        want = np.take_along_axis(hidden, positions[..., None], axis=1)
        np.testing.assert_array_equal(out, want)
        d_want = np.zeros_like(hidden)
        for b in range(2):
            np.add.at(d_want[b], positions[b], d[b])
        np.testing.assert_allclose(pull(jnp.asarray(d))[0], d_want, atol=1e-6)

    def test_refusals(self):
        model = ModernBertModel(MODEL, rngs=nnx.Rngs(0))
        x, ids = jnp.zeros((2, 8, 64)), np.ones((2, 16), np.int32)
        run = functools.partial(model, inputs_embeds=x, first_token=jnp.int32(8))
        with pytest.raises(ValueError, match="first_token: expected segment_ids of the complete 2"):
            run()
        with pytest.raises(ValueError, match="first_token: expected a dropout key per sequence"):
            run(segment_ids=ids, dropout_key=jax.random.key(0))
        with pytest.raises(ValueError, match="attention: expected bounds of shape"):
            run(segment_ids=ids)  # the plain op, which knows no parts


def test_weights_and_moments_are_split():
    trainer = Trainer(RECIPE, MODEL, mesh_of("2x2x1x2"))
    state = trainer.fresh()
    for tree in (state.params, state.optimizer.mu, state.optimizer.nu):
        shard = tree["model.layers.1.mlp.Wi.weight"].addressable_shards[0].data
        assert shard.shape == (64 // 2, 2, 48 // 2)  # D over fsdp, F over tensor
        shard = tree["model.embeddings.tok_embeddings.weight"].addressable_shards[0].data
        assert shard.shape == (256 // 2, 64 // 2)  # V over tensor, D over fsdp


def test_the_reference_weighting_by_its_formula():
    """Micro-batch means weighted by sequences, as Composer does, against NumPy on plain losses."""
    mesh = mesh_of("1x1x1x1")
    batch = batch_of(0, ROWS)
    batch["labels"][1, :, 6:] = IGNORE_INDEX  # so that the two weightings differ
    batch["segment_ids"][0, 0, 50:] = 0
    trainer = Trainer(RECIPE, dataclasses.replace(MODEL, attention_out_dropout=0.0), mesh)
    state = trainer.fresh()
    means, counts = [], []
    for a in range(A):
        micro = {k: v[a : a + 1] for k, v in batch.items()}
        loss, _, masked = trainer.eval_step(state.params, micro)
        means.append(float(loss) / float(masked))
        ids = batch["segment_ids"][a]
        counts.append(sum(len(set(row) - {0}) + (row[-1] == 0) for row in ids.tolist()))
    quirk = dataclasses.replace(RECIPE, loss_weighting="sequences")
    other = Trainer(quirk, dataclasses.replace(MODEL, attention_out_dropout=0.0), mesh)
    rate = np.float32(1e-3)
    got = float(other.train_step(other.fresh(), batch, rate, rate)[1]["loss"])
    plain = float(trainer.train_step(state, batch, rate, rate)[1]["loss"])
    want = np.average(means, weights=counts)
    assert abs(plain - want) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", ["2x2x2", "1x1x4"])
def test_cross_entropy_of_a_split_vocabulary(shape):
    """Each device's own sequences, its part of the vocabulary left to the partitioner."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 7, 16)).astype(np.float32)
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    bias = rng.normal(size=32).astype(np.float32)
    labels = rng.integers(0, 32, (4, 7)).astype(np.int32)
    labels[rng.random((4, 7)) < 0.3] = IGNORE_INDEX

    def sums(hidden, weight, bias, labels):
        loss = lambda *x: masked_cross_entropy(*x, labels, 4)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(hidden, weight, bias)

    def local(*arrays):
        sum_, (d_hidden, *others) = sums(*arrays)
        return *jax.lax.psum((sum_, others), sharding.BATCH), d_hidden

    mesh, split = mesh_of(shape), P(sharding.BATCH)
    run = sharding.split_over_tokens(local, mesh, (split, P(), P(), split), (P(), P(), split))
    parts = jax.device_put(
        (weight, bias), (NamedSharding(mesh, P("tensor")), NamedSharding(mesh, P("tensor")))
    )
    (want, right), grads = sums(hidden, weight, bias, labels)
    (got, ours), others, d_hidden = jax.jit(run)(hidden, *parts, labels)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert ours == right
    for a, b in zip((d_hidden, *others), grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class TestRules:
    def test_every_parameter_has_one_rule(self):
        everything = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}
        everything |= {"classifier_bias": True, "tie_word_embeddings": False}
        for changes in ({}, everything):
            shapes = param_shapes(ModernBertForMaskedLM, MODEL.replace(**changes))
            found = param_shardings(shapes, mesh_of("2x2x1x2"))
            assert set(found) == set(shapes)
        assert found["model.layers.0.attn.Wqkv.bias"].spec == P(None, "tensor", None)
        assert found["model.layers.2.mlp_norm.weight"].spec == P()

    @pytest.mark.parametrize(
        "path, spec",
        [
            ("model.embeddings.tok_embeddings.weight", P("tensor", "fsdp")),  # V D
            ("model.layers.3.attn.Wqkv.weight", P("fsdp", None, "tensor", None)),  # D 3 H K
            ("model.layers.3.attn.Wo.weight", P("tensor", None, "fsdp")),  # H K D
            ("model.layers.3.mlp.Wi.weight", P("fsdp", None, "tensor")),  # D 2 F
            ("model.layers.3.mlp.Wo.weight", P("tensor", "fsdp")),  # F D
            ("model.layers.3.mlp.Wi.bias", P(None, "tensor")),  # 2 F
            ("model.layers.3.mlp.Wo.bias", P()),
            ("decoder.bias", P("tensor")),  # V
            ("head.norm.weight", P()),
        ],
    )
    def test_specs(self, path, spec):
        assert sharding.spec_of(path) == spec

    def test_strangers_are_refused(self):
        with pytest.raises(ValueError, match="attn.rotary: expected a parameter of ModernBERT"):
            sharding.spec_of("model.layers.0.attn.rotary")

    def test_sizes_that_an_axis_does_not_divide(self):
        shapes = param_shapes(ModernBertForMaskedLM, MODEL.replace(num_attention_heads=4))
        with pytest.raises(
            ValueError, match=r"attn\.W.*4 to be a multiple of mesh axis tensor = 8.*4"
        ):
            param_shardings(shapes, mesh_of("1x1x1x8"))

    def test_mesh(self):
        assert dict(make_mesh(MeshShape(-1, 2, 2, 1)).shape) == {
            "data": 2, "fsdp": 2, "sequence": 2, "tensor": 1,
        }  # fmt: skip
        assert make_mesh(MeshShape(1, 2)).devices.size == 2
        for shape in (MeshShape(3, 3), MeshShape(-1, 16), MeshShape(0), MeshShape(4, 1, 4)):
            with pytest.raises(ValueError, match="to equal the 8 devices"):
                make_mesh(shape)


def test_rows_of_a_process():
    mesh = mesh_of("2x2x1x2")
    assert padded_batch_size(5, mesh) == 8 and padded_batch_size(8, mesh) == 8
    np.testing.assert_array_equal(local_slots(8, mesh), np.arange(8))
    array = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    placed = to_devices({"x": array}, np.arange(8), 8, mesh)["x"]
    np.testing.assert_array_equal(placed, array)
    assert placed.addressable_shards[0].data.shape == (2, 2, 3)
