"""The TPU kernels: numerics in the interpreter (races, bounds, NaN memory), and compilation."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from modernbert_jax import ModernBertConfig
from modernbert_jax.attention import Bounds, dispatch, make_bounds, pallas_tpu, reference
from modernbert_jax.attention.pallas_tpu import Generation, Tiles
from modernbert_jax.attention.rope import rope_tables
from modernbert_jax.attention.vjp import with_vjp
from modernbert_jax.layers import EncoderLayer

INTERPRET = pltpu.InterpretParams(
    detect_races=True,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
)
# A chip of two cores shares the parallel axes of the grid out between them.
TWO_CORES = dataclasses.replace(INTERPRET, num_cores_or_threads=2)
# Several tiles and units in a few hundred tokens.
SMALL = Generation(
    vmem_bytes=64 * 2**20,
    forward_global=Tiles(256, 128, 256, 128),
    forward_local=Tiles(256, 128),
    backward_global=Tiles(256, 128, 256, 128),
    backward_local=Tiles(256, 128),
)
# Of the largest value of each array. A wrong gradient must fail at these (test below).
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}

# Runs of (segment id, tokens).
MIXED = [(0, 10), (1, 90), (2, 1), (0, 19), (3, 180)]  # padding first and in the middle, one token
PACKED = [(1, 500), (2, 90), (0, 10)]  # padding last, a segment over two tile edges
PADDING = [(0, 300)]


def segment_ids(*rows):
    return np.stack([np.repeat([i for i, _ in row], [n for _, n in row]) for row in rows])


def draw(ids_BL, heads, head_dim, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shape = (*ids_BL.shape, heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def out_and_gradients(attention, qkv, d_out, bounds):
    """out, dq, dk, dv, compiled once for the two runs that are compared."""

    @jax.jit
    def run(q, k, v, d_out):
        scale = q.shape[-1] ** -0.5
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, bounds, scale=scale), q, k, v)
        return out, *pull(d_out)

    return functools.partial(run, *qkv, d_out)


def expected(qkv, d_out, bounds):
    """The same from the reference in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*qkv, d_out)]
        return [
            np.asarray(x)
            for x in out_and_gradients(reference.attention, wide[:3], wide[3], bounds)()
        ]


def interpreted(generation=SMALL, interpret=INTERPRET):
    options = {"generation": generation, "interpret": interpret}
    return with_vjp(
        functools.partial(pallas_tpu.forward, **options),
        functools.partial(pallas_tpu.backward, **options),
    )


def errors(got, want):
    """The largest error of out, dq, dk and dv, each relative to its largest value, or to 1.

    1 is the size of the inputs: in segments of one token, dq and dk are nothing but rounding.
    """
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in got)
    return [
        np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1.0)
        for x, y in zip(got, want, strict=True)
    ]


def check(ids_BL, heads, head_dim, window, dtype, capfd, generation=SMALL, interpret=INTERPRET):
    *qkv, d_out = draw(ids_BL, heads, head_dim, dtype)
    bounds = make_bounds(jnp.asarray(ids_BL), window)
    run = out_and_gradients(interpreted(generation, interpret), qkv, d_out, bounds)
    got = run()
    assert [x.dtype for x in got] == [dtype] * 4
    assert max(errors(got, expected(qkv, d_out, bounds))) < TOLERANCE[dtype]
    padding = ids_BL == 0
    assert all(not np.asarray(x, np.float32)[padding].any() for x in got)
    assert all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(got, run(), strict=True)
    )
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("part", [0, 1])
def test_queries_of_a_part_of_the_rows(part):
    """Half the queries against all keys, as under a mesh that splits sequences."""
    ids = segment_ids(PACKED)
    q, k, v, d_out = draw(ids, 2, 64, jnp.float32)
    half = slice(part * 300, part * 300 + 300)
    whole = make_bounds(jnp.asarray(ids))
    lo, hi = whole.lo_BL - half.start, whole.hi_BL - half.start
    bounds = Bounds(
        whole.lo_BL[:, half], whole.hi_BL[:, half],
        key_lo_BM=jnp.clip(lo, 0, 300), key_hi_BM=jnp.clip(hi, 0, 300),
    )  # fmt: skip
    run = functools.partial(dispatch._with_all_queries, interpreted())
    got = out_and_gradients(run, (q[:, half], k, v), d_out[:, half], bounds)()
    assert max(errors(got, expected((q[:, half], k, v), d_out[:, half], bounds))) < 1e-5


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_reference(window, dtype, capfd):
    check(segment_ids(MIXED, PADDING), 2, 64, window, dtype, capfd)


@pytest.mark.parametrize(
    ("heads", "window"), [(3, None), (1, 16), pytest.param(3, 1, marks=pytest.mark.matrix), (1, 0)]
)
def test_odd_heads_and_several_tiles(heads, window, capfd):
    check(segment_ids(PACKED), heads, 64, window, jnp.float32, capfd)


@pytest.mark.matrix
@pytest.mark.parametrize("window", [64, None])
def test_two_cores(window, capfd):
    check(segment_ids(MIXED), 2, 64, window, jnp.bfloat16, capfd, interpret=TWO_CORES)


@pytest.mark.matrix
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 1), (64, 5), (64, 16), (32, 5), (128, 1)])
@pytest.mark.parametrize(
    ("dtype", "window"),
    [(jnp.float32, w) for w in (1, 16, 64, 300, None)] + [(jnp.bfloat16, w) for w in (64, None)],
)
def test_matches_reference_everywhere(head_dim, heads, window, dtype, capfd):
    check(segment_ids(PACKED), heads, head_dim, window, dtype, capfd)


@pytest.mark.matrix
@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize("length", [1024, 1100, 2048])
def test_matches_reference_with_the_tiles_in_use(length, window, capfd):
    ids_BL = segment_ids([(1, 700), (2, length - 800), (0, 100)])
    generation = pallas_tpu.GENERATIONS["TPU v6 lite"]
    check(ids_BL, 2, 64, window, jnp.bfloat16, capfd, generation)


@pytest.mark.matrix
@hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 200)), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 16, 64, 512]),
)
def test_any_layout_of_segments(runs, window, capfd):
    row = [(i if token else 0, n) for i, (token, n) in enumerate(runs, start=1)]
    check(segment_ids(row), 2, 64, window, jnp.float32, capfd)


def rotated(x_BLHK, rope):
    """The rotation as one complex product; the halves of a head are real and imaginary parts."""
    first, second = jnp.split(x_BLHK, 2, axis=-1)
    turn = (rope[0] + 1j * rope[1])[:, :, None]
    z = (first + 1j * second) * turn
    return jnp.concatenate([z.real, z.imag], axis=-1).astype(x_BLHK.dtype)


def packed(op):
    """Calls `op` with q, k and v in one array."""

    def run(q, k, v, bounds, **options):
        B, L, H, K = q.shape
        x = jnp.stack([q, k, v], axis=2).reshape(B, L, 3, H // 2, 2, K)
        return op(jnp.swapaxes(x, 2, 3), None, None, bounds, **options)

    return run


@pytest.mark.parametrize("form", [lambda op: op, packed])
@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_rotates_as_outside(form, window, shared):
    """dq and dk too; `shared` tables have one row."""
    ids_BL = segment_ids(MIXED, PADDING) if shared else segment_ids(MIXED)
    *qkv, d_out = draw(ids_BL, 4, 64, jnp.float32)
    bounds = make_bounds(jnp.asarray(ids_BL), window)
    rope = rope_tables(jnp.arange(300)[None], 64, 100.0)
    op = functools.partial(form(interpreted(interpret=True)), rope=rope)

    def outside(q, k, v, bounds, *, scale):
        return reference.attention(rotated(q, rope), rotated(k, rope), v, bounds, scale=scale)

    got = out_and_gradients(op, qkv, d_out, bounds)()
    want = out_and_gradients(outside, qkv, d_out, bounds)()
    assert max(errors(got, want)) < 1e-5


@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize("which", ["v", "d_out", "q"])
def test_nan_stays_in_its_segment(window, which):
    ids_BL = segment_ids(MIXED)
    arrays = dict(zip(("q", "k", "v", "d_out"), draw(ids_BL, 2, 64, jnp.float32), strict=True))
    bounds = make_bounds(jnp.asarray(ids_BL), window)

    def run(q, k, v, d_out):
        return out_and_gradients(interpreted(interpret=True), (q, k, v), d_out, bounds)()

    want = run(**arrays)
    spoilt = arrays | {which: arrays[which].at[0, 130, 1, 5].set(jnp.nan)}
    got = run(**spoilt)
    assert any(np.isnan(np.asarray(x)).any() for x in got)
    others = ids_BL != 3
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others])


def test_refuses_a_negative_scale():
    *qkv, d_out = draw(segment_ids(MIXED), 2, 64, jnp.float32)
    bounds = make_bounds(jnp.asarray(segment_ids(MIXED)), None)
    with pytest.raises(ValueError, match="scale: expected a positive number, got -1.0"):
        pallas_tpu.attention(*qkv, bounds, scale=-1.0)


def test_a_layer_with_packed_projections_is_the_same():
    """Also the gradients of its parameters, with biases, and with the layouts of x pinned."""
    config = ModernBertConfig.base().replace(
        hidden_size=256, intermediate_size=64, num_attention_heads=4, attention_bias=True
    )
    layer = EncoderLayer(config, 1, nnx.Rngs(0))
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda p: p + 0.01 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), state)
    ids_BL = segment_ids(MIXED)
    bounds = make_bounds(jnp.asarray(ids_BL), 64)
    rope = rope_tables(jnp.arange(300)[None], 64, 100.0)
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 300, 256)), jnp.float32)
    op = interpreted(interpret=True)
    calls = []

    def preferring(q, k, v, bounds, **options):
        calls.append(q.shape)
        return op(q, k, v, bounds, **options)

    preferring.heads_in_a_block = lambda q_BLHK, bounds: 2

    @functools.partial(jax.jit, static_argnums=0)
    def run(op, state, x):
        y, pull = jax.vjp(lambda s, x: nnx.merge(graph, s)(x, rope, bounds, op, None), state, x)
        return y, pull(jnp.cos(y))

    want, got = run(op, state, x_BLD), run(preferring, state, x_BLD)
    assert calls == [(1, 300, 2, 3, 2, 64)]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


def test_log_sum_exp():
    ids_BL = segment_ids(MIXED, PADDING)
    q, k, v, _ = draw(ids_BL, 2, 64, jnp.float32)
    bounds = make_bounds(jnp.asarray(ids_BL), None)
    _, lse_BHL = pallas_tpu.forward(q, k, v, bounds, 0.125, generation=SMALL, interpret=INTERPRET)
    scores_BHLM = np.einsum("blhk,bmhk->bhlm", *(np.asarray(x, np.float64) for x in (q, k))) / 8
    scores_BHLM[~np.broadcast_to(bounds.as_mask()[:, None], scores_BHLM.shape)] = -np.inf
    want_BHL = np.logaddexp.reduce(scores_BHLM, axis=-1)
    np.testing.assert_allclose(lse_BHL, want_BHL, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_wrong_gradient_fails(dtype):
    """64 keys that got the values of their neighbours: what reading a wrong tile would do."""
    ids_BL = segment_ids(MIXED)
    *qkv, d_out = draw(ids_BL, 2, 64, dtype)
    bounds = make_bounds(jnp.asarray(ids_BL), 64)
    got = out_and_gradients(interpreted(), qkv, d_out, bounds)()
    want = expected(qkv, d_out, bounds)
    for wrong in (1, 2, 3):
        broken = list(got)
        broken[wrong] = got[wrong].at[:, 128:192].set(got[wrong][:, 192:256])
        found = errors(broken, want)
        assert found.pop(wrong) > 5 * TOLERANCE[dtype]
        assert max(found) < TOLERANCE[dtype]


def test_race_detector_speaks(capfd):
    """Two cores writing one block: the check for races above would have seen it."""

    def kernel(x, out):
        out[...] = x[...] * 2.0

    x = jnp.ones((256, 128))
    run = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((128, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((128, 128), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=TWO_CORES,
    )
    found = ""
    try:
        run(x).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises where 0.10 prints
        found = str(error)
    assert "RACE DETECTED" in found + capfd.readouterr().out


def test_supports():
    def ask(shape, dtype=jnp.bfloat16, device="TPU v6 lite"):
        bounds = make_bounds(jnp.ones((1, 8), jnp.int32))
        return pallas_tpu.supports(jax.ShapeDtypeStruct(shape, dtype), bounds, device)

    assert all(ask((2, 8192, 12, 64), device=kind) is None for kind in pallas_tpu.GENERATIONS)
    assert "got 'NVIDIA H100'" in ask((2, 8192, 12, 64), device="NVIDIA H100")
    assert "got float16" in ask((2, 8192, 12, 64), jnp.float16)
    assert "got 48" in ask((2, 8192, 12, 48))
    assert "L=1000000" in ask((2, 1000000, 12, 64))


# Compiled for TPUs that are not there

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ALL_CASES = [f"{s}:{L}:{w}" for s in ("base", "large") for L in (1024, 8192) for w in (64, "none")]


def compile_for(generation, cases):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    script = Path(__file__).with_name("tpu_compile.py")
    found = subprocess.run(
        [sys.executable, script, TOPOLOGIES[generation], *cases],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONWARNINGS="ignore"),
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == list(cases)
    for line in lines:
        assert line["device_kind"] in pallas_tpu.GENERATIONS
        assert line["kernels"] == 2  # one forward, one backward
        # Padded and relaid copies of the arrays at most; scores would be hundreds of times q.
        assert line["temp_bytes"] < 12 * line["qkv_bytes"]


@pytest.mark.optimized
def test_compiles_for_v6e():
    compile_for("v6e", ["base:8192:64", "base:8192:none"])


@pytest.mark.matrix
@pytest.mark.optimized
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles_everywhere(generation):
    compile_for(generation, ALL_CASES)
