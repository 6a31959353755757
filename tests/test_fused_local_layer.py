"""A local layer as one TPU kernel, in the interpreter, beside EncoderLayer."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from modernbert_jax import ModernBertConfig, ModernBertModel
from modernbert_jax.attention import (
    attention,
    context_parallel,
    make_bounds,
    packed_heads,
    row_major,
)
from modernbert_jax.attention.rope import rope_tables
from modernbert_jax.fused_local_layer import FusedLocalLayers, refusal
from modernbert_jax.layers import EncoderLayer
from train.common.sharding import MeshShape, make_mesh
from train.plan.compile import abstract_arguments
from train.plan.kernels import local_layer_cycles
from train.pretrain.config import TrainConfig
from train.pretrain.step import Trainer

INTERPRET = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)
REFERENCE = functools.partial(attention, implementation="reference")
CONFIG = ModernBertConfig.tiny().replace(
    dtype="bfloat16", param_dtype="float32", hidden_size=256,
    num_attention_heads=4, num_hidden_layers=2, intermediate_size=256, embedding_dropout=0.0,
    attention_out_dropout=0.1, initializer_range=0.02,
)  # fmt: skip
LENGTH = 768  # three tiles a row


def segment_ids():
    """Segments over edges of tiles, padding in the middle and last, a segment of one token."""
    runs = [[(1, 200), (2, 100), (0, 60), (3, 1), (4, 350), (0, 57)], [(1, 768)]]
    return np.stack([np.repeat([i for i, _ in row], [n for _, n in row]) for row in runs])


def layer_and_inputs():
    rng = np.random.default_rng(0)
    layer = EncoderLayer(CONFIG, 1, nnx.Rngs(0))
    for norm in (layer.attn_norm, layer.mlp_norm):
        norm.weight[...] = jnp.asarray(1 + 0.2 * rng.standard_normal(256), jnp.float32)
    for linear in (layer.attn.Wqkv, layer.attn.Wo, layer.mlp.Wi, layer.mlp.Wo):
        linear.weight[...] = 3 * linear.weight[...]  # sharper attention
    ids_BL = segment_ids()
    bounds = make_bounds(ids_BL, 64)
    positions_BL = np.arange(LENGTH)[None] - np.asarray(make_bounds(ids_BL).lo_BL)
    rope = rope_tables(jnp.asarray(positions_BL), 64, 10000.0)
    x, dy = jnp.asarray(rng.standard_normal((2, *ids_BL.shape, 256)), jnp.float32)
    return layer, x, rope, bounds, dy


def results(attention, key):
    """y, dx and the gradients of all weights, by name."""
    layer, x, rope, bounds, dy = layer_and_inputs()
    graph, state = nnx.split(layer)

    @jax.jit
    def run(x, state, dy):
        def apply(x, state):
            return nnx.merge(graph, state)(x, rope, bounds, attention, key)

        y, pull = jax.vjp(apply, x, state)
        return y, *pull(dy)

    y, dx, d_state = run(x, state, dy)
    grads = {str(path): g[...] for path, g in nnx.to_flat_state(d_state)}
    return {"y": y, "dx": dx} | grads


@functools.cache
def of_layer(seed):
    return results(REFERENCE, None if seed is None else jax.random.key(seed))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(x, np.float64)
        # The same products in bfloat16; a weight's gradient is summed in float32 here and rounded
        # once there, hence 4e-3 (its rounding) instead of 1e-3.
        limit = 1e-3 if name in ("y", "dx") else 6e-3
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b), name


@pytest.mark.parametrize("seed", [None, 5])
def test_equals_the_layer(seed):
    """On packed rows, without and with dropout: y, dx and the gradient of each weight."""
    key = None if seed is None else jax.random.key(seed)
    assert_same(results(FusedLocalLayers(REFERENCE, interpret=INTERPRET), key), of_layer(seed))


def test_rows_split_over_a_mesh():
    """Each device runs its rows with its own words of the hash; weights' gradients are summed."""
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "tensor"))
    fused = FusedLocalLayers(REFERENCE, mesh, "data", interpret=True)
    assert_same(results(fused, jax.random.key(5)), of_layer(5))


def test_in_a_model():
    """Global layers and maps use the function that it was given; a row of NaN stays alone."""
    model = ModernBertModel(CONFIG, rngs=nnx.Rngs(0))
    ids_BL = np.arange(2 * 512).reshape(2, 512) % 64
    fused = FusedLocalLayers(REFERENCE, interpret=True)
    expected = model(ids_BL, attention=REFERENCE).last_hidden_state
    got = model(ids_BL, attention=fused).last_hidden_state
    np.testing.assert_allclose(got, expected, atol=2e-2)
    maps = model(ids_BL, attention=fused, output_attentions=True).attentions
    assert maps is not None and [x.shape for x in maps] == 2 * [(2, 4, 512, 512)]
    holes = jnp.ones((2, 512), jnp.int32).at[0, 7].set(0)
    alone = model(ids_BL, holes, attention=fused).last_hidden_state
    assert np.isnan(alone[0]).all()
    np.testing.assert_array_equal(alone[1], got[1])


@pytest.mark.parametrize(
    "changes, shape, kind, message",
    [
        ({}, (2, 512), "cpu", "expected one of .*, got 'cpu'"),
        ({}, (2, 512), "TPU v5", "expected one of TPU v5 lite, TPU v6 lite, got .TPU v5."),
        ({"dtype": "float32"}, (2, 512), "TPU v6 lite", "expected dtype='bfloat16', got 'float32'"),
        ({"num_attention_heads": 8}, (2, 512), "TPU v6 lite", "expected head_dim=64, got 32"),
        ({"mlp_bias": True}, (2, 512), "TPU v6 lite", "expected mlp_bias=False, got True"),
        ({"mlp_dropout": 0.1}, (2, 512), "TPU v6 lite", "expected mlp_dropout=0.0, got 0.1"),
        ({"intermediate_size": 2624}, (2, 512), "TPU v6 lite", "multiple of 128 .*, got 2624"),
        ({"local_attention": 256}, (2, 512), "TPU v6 lite", "at most 64, got 128"),
        ({}, (2, 500), "TPU v6 lite", "multiple of 256 tokens, .*, got 2 of 500"),
        ({}, (1, 256), "TPU v6 lite", "at least 512 in all, got 1 of 256"),
        (
            {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192},
            (2, 512), "TPU v6 lite", "gradients fit 128 MiB",
        ),
    ],
)  # fmt: skip
def test_refuses_by_name(changes, shape, kind, message):
    config = CONFIG.replace(**changes)
    bounds = SimpleNamespace(window=config.window, key_lo_BM=None)
    reason = refusal(config, bounds, shape, kind, training=True)  # type: ignore[arg-type]
    assert reason is not None and re.search(message, reason), reason


def test_refuses_a_mesh_that_splits_more_than_rows():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor"))
    with pytest.raises(ValueError, match="splits rows only .*, got tensor=2"):
        FusedLocalLayers(REFERENCE, mesh, "data")


@pytest.mark.parametrize("wrap", [FusedLocalLayers, lambda a: context_parallel(a, "sequence")])
def test_wrappers_keep_the_layouts_of_a_kernel_for_tpus(wrap):
    """XLA would otherwise copy what the global layers' kernels read."""

    def kernel(*args, **kwargs):
        raise AssertionError("not called")

    def pins(attention):
        program = jax.jit(lambda x: row_major(attention, x)).lower(jnp.zeros((2, 8, 4)))
        return "LayoutConstraint" in program.as_text()

    assert not pins(wrap(kernel))
    kernel.heads_in_a_block = lambda q, bounds: 2
    assert pins(wrap(kernel))
    packed = packed_heads(wrap(kernel), jnp.zeros((2, 8, 4, 64)), None)
    assert packed == (2 if wrap is FusedLocalLayers else 0)


def test_the_trainer_passes_it_on():
    """Traced for a CPU, the first local layer refuses."""
    config = TrainConfig(model=CONFIG, fused_local_layers=True, sequence_length=512)
    trainer = Trainer(config, config.model, make_mesh(MeshShape(data=1)))
    with pytest.raises(ValueError, match="fused_local_layers: expected one of TPU .*, got 'cpu'"):
        trainer.train_step.trace(*abstract_arguments(trainer, config.phases[0]))


def test_plan_knows_its_cycles():
    base, large = ModernBertConfig.base(), ModernBertConfig.large()
    forward, backward = (
        local_layer_cycles("TPU v6 lite", f"local_layer_{name}", base, 8192)
        for name in ("forward", "backward")
    )
    assert 2 * forward < backward < 3 * forward
    for kind, model in (("TPU v6 lite", large), ("TPU v5", base)):
        with pytest.raises(ValueError, match="known only for base on v5e and v6e"):
            local_layer_cycles(kind, "local_layer_forward", model, 8192)
