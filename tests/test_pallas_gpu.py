"""The GPU attention kernels without a GPU: interpreted against NumPy, and compiled for an H100.

What runs here proves numbers (Triton in Pallas' interpreter, Hopper in JAX's simulator of shared
memory, barriers and TMA) and machine code. No test of this file has run on a GPU.
"""

import functools
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from modernbert_jax.attention import Bounds, make_bounds, pallas_hopper, pallas_triton
from modernbert_jax.attention.gpu_tiles import padded_length, tiled
from modernbert_jax.attention.vjp import with_vjp

SCALE = 0.125
# Largest difference from float64, in units of the largest value compared.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.2e-2, "float16": 2e-3}

needs_simulator = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public simulator of Mosaic GPU kernels (0.11 has)",
)


def layouts(length: int) -> np.ndarray:
    """segment_ids_BL of rows that together hold every case of the contract."""
    one = np.ones(length, np.int32)
    packed = np.zeros(length, np.int32)  # padding first, in the middle and last
    half = length // 2
    packed[3:half] = 1
    packed[half] = 2  # a segment of one token
    packed[half + 1 : half + 9] = 3
    packed[half + 20 : length - 5] = 4
    return np.stack([packed, one, np.zeros(length, np.int32)])


def oracle(q, k, v, d_out, segment_ids, window):
    """(out, dq, dk, dv) in float64 from the segment ids: the formula, with no bounds in it."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    i = np.arange(segment_ids.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    if window is not None:
        mask &= np.abs(i[:, None] - i[None, :]) <= window
    p = np.exp(np.einsum("blhk,bmhk->bhlm", q, k) * SCALE) * mask[:, None]
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhlm,bmhk->blhk", p, v)
    dp = np.einsum("blhk,bmhk->bhlm", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * SCALE
    dq, dk = np.einsum("bhlm,bmhk->blhk", ds, k), np.einsum("bhlm,blhk->bmhk", ds, q)
    return out, dq, dk, np.einsum("bhlm,blhk->bmhk", p, d_out)


def inputs(batch, length, heads, head_dim, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, head_dim)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]


def run(attention, q, k, v, d_out, bounds):
    """(out, dq, dk, dv) of an implementation, jitted."""

    @jax.jit
    def both(q, k, v, d_out, lo, hi):
        mask = Bounds(lo, hi, bounds.window)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scale=SCALE), q, k, v)
        return out, *pull(d_out)

    return both(q, k, v, d_out, bounds.lo_BL, bounds.hi_BL)


def compare(got, expected, dtype, least=1.0):
    """least: the scale of the errors of a result that is smaller."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == dtype, name
        x = np.asarray(x, np.float64)
        assert np.isfinite(x).all(), name
        difference = np.abs(x - y).max() / max(np.abs(y).max(), least)
        assert difference < TOLERANCE[np.dtype(dtype).name], f"{name} differs by {difference:.2g}"


def contract(attention, length, heads, window, dtype, head_dim=64, rows=slice(None)):
    segment_ids = layouts(length)[rows]
    bounds = make_bounds(jnp.asarray(segment_ids), window)
    arguments = inputs(len(segment_ids), length, heads, head_dim, dtype)
    got = run(attention, *arguments, bounds)
    # A token that sees only itself has dq = dk = 0, the difference of two numbers of the size of
    # scale (d_out . v) k, and their rounding errors remain.
    least = 4.0 if window == 0 else 1.0
    compare(got, oracle(*arguments, segment_ids, window), dtype, least)
    padding = segment_ids == 0
    for x in got:
        assert not np.asarray(x, np.float32)[padding].any(), "padding must give exactly 0"


def interpreted(module, interpret, **changed):
    functions = {"forward": module.forward, "backward": module.backward} | changed
    return with_vjp(*(functools.partial(f, interpret=interpret) for f in functions.values()))


triton = interpreted(pallas_triton, True)


@pytest.mark.parametrize(
    ("length", "heads", "window", "dtype", "head_dim"),
    [
        (150, 2, None, jnp.float32, 64),
        (150, 1, 16, jnp.float32, 32),
        (150, 1, 1, jnp.bfloat16, 128),
        (301, 3, 64, jnp.bfloat16, 64),
        (301, 1, None, jnp.bfloat16, 64),
    ],
)
def test_triton_matches_the_formula(length, heads, window, dtype, head_dim):
    contract(triton, length, heads, window, dtype, head_dim)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("window", [0, 1, 16, 64, 512, None])
@pytest.mark.parametrize(("length", "heads"), [(64, 1), (129, 16), (384, 5)])
def test_triton_matrix(length, heads, window, dtype):
    contract(triton, length, heads, window, dtype)


def test_triton_gives_equal_bits_twice():
    arguments = inputs(3, 100, 2, 64, jnp.float32)
    bounds = make_bounds(jnp.asarray(layouts(100)), 16)
    first, second = (run(triton, *arguments, bounds) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_a_broken_gradient_is_seen(which):
    """The tolerance is narrow enough: a gradient wrong by 2% in bf16 fails."""

    def broken(*arguments, **options):
        gradients = list(pallas_triton.backward(*arguments, **options))
        gradients[which] = gradients[which] * 1.02
        return tuple(gradients)

    attention = interpreted(pallas_triton, True, backward=broken)
    with pytest.raises(AssertionError, match=f"{'dq dk dv'.split()[which]} differs"):
        contract(attention, 100, 1, None, jnp.bfloat16)


def check_untouched(attention):
    """Two segments, NaN in all inputs of one of them: a tile visited in vain would spread it."""
    length, half = 512, 256
    segment_ids = np.repeat(np.array([[1, 2]], np.int32), half, axis=1)
    bounds = make_bounds(jnp.asarray(segment_ids), None)
    for poisoned, clean in ((slice(half, None), slice(half)), (slice(half), slice(half, None))):
        arguments = inputs(1, length, 1, 64, jnp.bfloat16)
        got = run(attention, *[x.at[:, poisoned].set(jnp.nan) for x in arguments], bounds)
        expected = oracle(*[x[:, clean] for x in arguments], segment_ids[:, clean], None)
        compare([x[:, clean] for x in got], expected, jnp.bfloat16)


def test_triton_does_not_touch_tiles_outside_the_bounds():
    check_untouched(triton)


def check_isolated(attention, window):
    """What is not finite in v and d_out of one segment stays there, within one tile."""
    segment_ids = np.repeat(np.array([[1, 2, 0]], np.int32), (30, 25, 5), axis=1)
    bounds = make_bounds(jnp.asarray(segment_ids), window)
    q, k, v, d_out = arrays = inputs(1, 60, 1, 64, jnp.bfloat16)
    ours, theirs = segment_ids[0] == 1, segment_ids[0] == 2
    want = [x[:, ours] for x in oracle(*arrays, segment_ids, window)]
    bad_v = v.at[:, 32, :, 7].set(jnp.nan).at[:, 58].set(jnp.inf)
    bad_d_out = d_out.at[:, 35, :, 9].set(jnp.inf).at[:, 57].set(jnp.nan)
    for arguments in ((q, k, bad_v, d_out), (q, k, v, bad_d_out), (q, k, bad_v, bad_d_out)):
        got = run(attention, *arguments, bounds)
        compare([x[:, ours] for x in got], want, jnp.bfloat16)
        hidden = [np.isfinite(np.asarray(x, np.float32)[:, theirs]).all() for x in got]
        # NaN is not hidden from its own segment, either.
        assert hidden == [arguments[2] is v, False, False, False]
        assert all(not np.asarray(x, np.float32)[:, segment_ids[0] == 0].any() for x in got)


@pytest.mark.parametrize("window", [None, 16])
def test_triton_keeps_what_is_not_finite_in_its_segment(window):
    check_isolated(triton, window)


@pytest.mark.parametrize("window", [None, 0, 1, 16, 64])
def test_ranges_hold_every_visible_key_and_no_mask_is_left_out(window):
    """Against the mask written out: tiles outside are all 0, whole tiles all 1."""
    segment_ids = layouts(200)
    bounds = make_bounds(jnp.asarray(segment_ids), window)
    for rows, columns in ((16, 16), (32, 16), (16, 64), (64, 32)):
        length = padded_length(200, rows, columns)
        mask = np.zeros((3, length, length), bool)
        mask[:, :200, :200] = bounds.as_mask()
        blocks = mask.reshape(3, length // rows, rows, length // columns, columns)
        some, every = blocks.any((2, 4)), blocks.all((2, 4))
        first, whole, whole_end, end = np.moveaxis(
            np.asarray(tiled(bounds, length, rows, columns).ranges_BT4), -1, 0
        )
        t = np.arange(length // columns)
        visited = (first[..., None] <= t) & (t < end[..., None])
        unmasked = (whole[..., None] <= t) & (t < whole_end[..., None])
        assert not (some & ~visited).any()
        assert (visited.sum(-1) <= np.maximum(some.sum(-1), 1) + 2).all()
        np.testing.assert_array_equal(unmasked, every)


def device(capability, platform="gpu"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    ("module", "where", "dtype", "head_dim", "reason"),
    [
        (pallas_triton, device("8.0"), jnp.float32, 64, None),
        (pallas_triton, device("8.9"), jnp.bfloat16, 128, None),
        (pallas_triton, device("7.5"), jnp.bfloat16, 64, "8.0 to 9.0, got 7.5"),
        (pallas_triton, device("8.0"), jnp.bfloat16, 48, "head dim of 32, 64 or 128, got 48"),
        (pallas_triton, device("8.0"), jnp.float64, 64, "got float64"),
        (pallas_triton, device("", "cpu"), jnp.float32, 64, "NVIDIA GPU, got cpu"),
        (pallas_hopper, device("9.0"), jnp.bfloat16, 64, None),
        (pallas_hopper, device("9.0"), jnp.float16, 128, None),
        (pallas_hopper, device("9.0"), jnp.float32, 64, "got float32"),
        (pallas_hopper, device("9.0"), jnp.bfloat16, 32, "head dim of 64 or 128, got 32"),
        (pallas_hopper, device("8.0"), jnp.bfloat16, 64, "9.0 (H100, H200), got 8.0"),
        (pallas_hopper, device("", "tpu"), jnp.bfloat16, 64, "NVIDIA GPU, got tpu"),
    ],
)
def test_supports_says_why_not(module, where, dtype, head_dim, reason):
    q = jax.ShapeDtypeStruct((1, 8, 1, head_dim), dtype)
    got = module.supports(q, make_bounds(jnp.ones((1, 8), jnp.int32)), where)
    assert got is None if reason is None else reason in got


def test_what_a_kernel_cannot_take_is_refused_by_name():
    bounds = make_bounds(jnp.ones((1, 64), jnp.int32))
    q = jnp.zeros((1, 64, 1, 64), jnp.float32)
    with pytest.raises(ValueError, match="pallas_hopper: expected bfloat16 or float16.*float32"):
        pallas_hopper.attention(q, q, q, bounds, scale=SCALE)
    with pytest.raises(ValueError, match="scale: expected a positive number, got -1.0"):
        triton(q, q, q, bounds, scale=-1.0)


def hopper():
    # Races between TMA, wgmma and plain loads raise; so does a barrier that is never reached.
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    return interpreted(pallas_hopper, params)


@needs_simulator
@pytest.mark.parametrize("window", [None, 16])
def test_hopper_matches_the_formula(window):
    contract(hopper(), 301, 1, window, jnp.bfloat16, rows=slice(0, 1))


@needs_simulator
@pytest.mark.parametrize(
    ("length", "heads", "window", "dtype", "head_dim"),
    [
        (150, 2, 64, jnp.bfloat16, 64),
        (150, 1, 1, jnp.float16, 64),
        (150, 1, None, jnp.bfloat16, 128),
        pytest.param(640, 1, 512, jnp.bfloat16, 64, marks=pytest.mark.matrix),
        pytest.param(1030, 1, None, jnp.bfloat16, 64, marks=pytest.mark.matrix),
    ],
)
def test_hopper_matrix(length, heads, window, dtype, head_dim):
    contract(hopper(), length, heads, window, dtype, head_dim)


@needs_simulator
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's, for the NaN
@pytest.mark.parametrize("window", [None, 16])
def test_hopper_keeps_what_is_not_finite_in_its_segment(window):
    check_isolated(hopper(), window)


@needs_simulator
def test_hopper_does_not_touch_tiles_outside_the_bounds():
    check_untouched(hopper())


@pytest.mark.optimized
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("sm90", marks=pytest.mark.slow),
        pytest.param("sm80", marks=pytest.mark.matrix),
        pytest.param("sm89", marks=pytest.mark.matrix),
    ],
)
def test_compiles_for_an_absent_gpu(target, cuda_compiler):
    """Every kernel to machine code, in a process of its own: wgmma where it must be, no spills."""
    script = Path(__file__).with_name("compile_h100.py")
    command = [sys.executable, str(script), str(cuda_compiler), "--target", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout)
    implementations = 2 if target == "sm90" else 1
    # kernels x local and global x base and large x L
    assert len(records) == implementations * 3 * 2 * 2 * 2
    for record in records:
        assert record["spilled_bytes"] == 0, record
        hopper_kernel = record["implementation"] == "pallas_hopper"
        tensor_cores = "wgmma" if hopper_kernel else "mma_sync" if target != "sm90" else "wgmma"
        assert record[tensor_cores] > 0, record
        assert record["tma_copies"] > 0 or not hopper_kernel, record
        if hopper_kernel and record["kernel"] == "forward" and record["layer"] == "global":
            # Two loops, each with the softmax of 64 x 128 scores on 128 threads.
            assert record["overlapped_exp2"] >= 2 * 64 * 128 // 128, record
