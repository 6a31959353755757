"""The contract of every implementation that runs anywhere, the choice, and attention under a mesh.

The kernels' own files (test_pallas_tpu.py, test_pallas_gpu.py) hold them to the same in interpret
mode and compile them for their hardware.
"""

import functools
import json
import pathlib
import re
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modernbert_jax import attention as op
from modernbert_jax.attention import __main__ as self_check, make_bounds, xla
from modernbert_jax.attention.bounds import tile_bounds
from modernbert_jax.attention.vjp import LSE, OUT, with_vjp
from tests.benchmarks import accelerator

IMPLEMENTATIONS = ["reference", "xla"]
# Of the largest value: float32 rounds its sums, bfloat16 its inputs, probabilities and outputs.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def exact(q, k, v, d_out, ids, window, scale):
    """out, dq, dk, dv in float64 from a mask written out: nothing of ours."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    L = q.shape[1]
    i = np.arange(L)
    changes = np.concatenate([np.zeros((len(ids), 1)), ids[:, 1:] != ids[:, :-1]], axis=1)
    run = np.cumsum(changes, axis=1)
    mask = (run[:, :, None] == run[:, None, :]) & (ids > 0)[:, :, None]
    if window is not None:
        mask &= np.abs(i[:, None] - i[None]) <= window
    s = np.einsum("blhk,bmhk->bhlm", q, k) * scale
    s = np.where(mask[:, None], s, -np.inf)
    top = np.where(mask.any(-1)[:, None], s.max(-1), 0.0)[..., None]
    p = np.exp(s - top)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhlm,bmhk->blhk", p, v)
    dv = np.einsum("bhlm,blhk->bmhk", p, d_out)
    dp = np.einsum("blhk,bmhk->bhlm", d_out, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    return (
        out,
        np.einsum("bhlm,bmhk->blhk", ds, k),
        np.einsum("bhlm,blhk->bmhk", ds, q),
        dv,
    )


def arrays_of(rows, length, heads, head_dim, dtype, seed=0):
    x = np.random.default_rng(seed).normal(size=(4, rows, length, heads, head_dim))
    return list(jnp.asarray(x.astype(np.float32)).astype(dtype))


@functools.partial(jax.jit, static_argnames=("name", "scale"))
def both_passes(q, k, v, d_out, bounds, *, name, scale):
    f = lambda q, k, v: op.attention(q, k, v, bounds, scale=scale, implementation=name)  # noqa: E731
    out, pull = jax.vjp(f, q, k, v)
    return (out, *pull(d_out))


def check(name, ids, window, *, heads=2, head_dim=8, dtype="float32", seed=0, tamper=None):
    """Holds one case to the contract."""
    ids = np.asarray(ids, np.int32)
    q, k, v, d_out = arrays_of(*ids.shape, heads, head_dim, dtype, seed)
    bounds = make_bounds(ids, window)
    got = both_passes(q, k, v, d_out, bounds, name=name, scale=0.37)
    again = both_passes(q, k, v, d_out, bounds, name=name, scale=0.37)
    if tamper:
        got = tamper(got)
    want = exact(q, k, v, d_out, ids, window, 0.37)
    for one, two, reference, like in zip(got, again, want, (q, q, k, v), strict=True):
        assert one.dtype == like.dtype
        if not tamper:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))  # equal bits
        one = np.asarray(one, np.float64)
        assert np.isfinite(one).all()
        assert not one[ids == 0].any()  # padding: 0 and zero gradients
        largest = max(np.abs(reference).max(), 0.1)  # a gradient may cancel to 0 exactly
        assert np.abs(one - reference).max() <= TOLERANCE[dtype] * largest


def packed(length, *segments, rows=1):
    """A row of (id, tokens) pairs."""
    row = np.concatenate([np.full(n, i) for i, n in segments])
    assert len(row) == length
    return np.tile(row, (rows, 1)).astype(np.int32)


LAYOUTS = {
    "one": packed(150, (1, 150)),
    "many": packed(150, (1, 40), (2, 1), (3, 60), (4, 49)),
    "padding-first": packed(150, (0, 30), (1, 50), (2, 70)),
    "padding-middle": packed(150, (1, 30), (0, 50), (2, 70)),
    "padding-last": packed(150, (1, 64), (2, 64), (0, 22)),
    "all-padding": packed(150, (0, 150)),
    "two-rows": np.concatenate([packed(150, (1, 150)), packed(150, (1, 3), (0, 147))]),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
class TestContract:
    @pytest.mark.parametrize("window", [0, 1, 16, 64, None])
    def test_layouts_and_windows(self, name, window):
        for layout in LAYOUTS.values():  # one compilation for each number of rows
            check(name, layout, window)

    @pytest.mark.parametrize("window", [16, None])
    @pytest.mark.parametrize("length", [1, 7, 129])
    def test_lengths_that_divide_no_tile(self, name, length, window):
        check(name, np.ones((2, length)), window)

    @pytest.mark.parametrize("heads, head_dim", [(1, 64), (5, 32), (16, 8)])
    def test_heads(self, name, heads, head_dim):
        check(name, LAYOUTS["many"], 16, heads=heads, head_dim=head_dim)

    @pytest.mark.parametrize("window", [16, None])
    def test_bfloat16(self, name, window):
        check(name, LAYOUTS["many"], window, dtype="bfloat16")

    @pytest.mark.parametrize(
        "window, length",
        [pytest.param(512, 1700, marks=pytest.mark.matrix), (None, 1100),
         pytest.param(64, 1100, marks=pytest.mark.matrix)],
    )  # fmt: skip
    def test_rows_longer_than_the_tiles(self, name, window, length):
        """More than one chunk of queries and of keys, segments across their edges."""
        third = length // 3
        row = packed(length, (1, third), (2, 1), (0, 20), (3, length - 2 * third - 21), (4, third))
        check(name, np.concatenate([row, np.ones_like(row)]), window, heads=1)

    @pytest.mark.parametrize("which", range(4))
    def test_a_broken_result_fails(self, name, which):
        """Each of out, dq, dk, dv a hundredth off in one tile, one at a time."""

        def tamper(results):
            x = np.asarray(results[which]).copy()
            x[:, 16:32] *= 1.01
            return (*results[:which], x, *results[which + 1 :])

        with pytest.raises(AssertionError):
            check(name, LAYOUTS["one"], None, tamper=tamper)


def as_on_an_accelerator(patch):
    """Makes the global path of `xla` run several chunks at once on this CPU, too."""
    patch.setattr(jax.lax, "platform_dependent", lambda *, cpu, default: default())


@pytest.mark.parametrize("chunked", ["", "one", "several"], ids=lambda x: x or "dense-or-bands")
@hypothesis.settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_any_layout(chunked, data):
    """Property: any segments, any window; the chunked path with small chunks, one or 3 at once."""
    length = 40
    lengths = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1))
    row = np.concatenate([np.full(n, (i + 1) * real) for i, (real, n) in enumerate(lengths)])
    row = np.resize(np.pad(row, (0, max(0, length - len(row))))[:length], (1, length))
    window = data.draw(st.sampled_from([None, 1, 5, 15, 39]))
    if not chunked:
        check("xla", row, window)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_DENSE_LENGTH", 1)
        patch.setattr(xla, "_CHUNK_Q", 8)
        patch.setattr(xla, "_CHUNK_K", 16)
        patch.setattr(xla, "_plan", lambda q, k, bounds: ("chunks", 8))
        if chunked == "several":
            as_on_an_accelerator(patch)
            patch.setattr(xla, "_SCORES", 3 * 2 * 8 * 16)  # 5 chunks: the last group has 2 of its 3
        ids = np.asarray(row, np.int32)
        q, k, v, d_out = arrays_of(1, length, 2, 8, "float32")
        bounds = make_bounds(ids, window)
        out, pull = jax.vjp(lambda q, k, v: xla.attention(q, k, v, bounds, scale=0.37), q, k, v)
        want = exact(q, k, v, d_out, ids, window, 0.37)
        for one, reference in zip((out, *pull(d_out)), want, strict=True):
            assert np.abs(np.asarray(one) - reference).max() <= 1e-5 * max(
                0.1, np.abs(reference).max()
            )


class TestTileBounds:
    def test_by_hand(self):
        ids = packed(16, (1, 5), (2, 4), (0, 3), (3, 4))
        lo, hi = tile_bounds(make_bounds(ids), 4, 4)
        np.testing.assert_array_equal(lo, [[0, 0, 1, 3]])
        np.testing.assert_array_equal(hi, [[2, 3, 3, 4]])
        lo, hi = tile_bounds(make_bounds(ids, 1), 4, 2)
        np.testing.assert_array_equal(lo, [[0, 1, 3, 6]])  # in tiles of two keys
        np.testing.assert_array_equal(hi, [[3, 5, 5, 8]])

    def test_padding_visits_nothing(self):
        lo, hi = tile_bounds(make_bounds(packed(16, (1, 4), (0, 12))), 4, 4)
        np.testing.assert_array_equal(hi - lo, [[1, 0, 0, 0]])

    def test_chunks_outside_the_bounds_are_not_visited(self):
        """NaN in keys that no visited chunk holds cannot reach the result."""
        length = 2048
        ids = packed(length, (1, 512), (2, 1536))
        q, k, v, d_out = arrays_of(1, length, 1, 8, "float32")
        spoilt = v.at[:, 1024:].set(jnp.nan)
        bounds = make_bounds(ids)
        assert xla._plan(q, k, bounds)[0] == "chunks"
        out = xla.attention(q, k, spoilt, bounds, scale=0.3)
        assert np.isfinite(np.asarray(out[:, :512])).all()
        assert np.isnan(np.asarray(out[:, 512:])).all()


class TestChunksAtOnce:
    def test_steps(self, monkeypatch):
        """8 rows of 8192 are 256 chunks of queries: 256 steps on a CPU, 13 elsewhere."""
        q = jax.ShapeDtypeStruct((8, 8192, 12, 64), jnp.bfloat16)
        edge = jax.ShapeDtypeStruct((8, 8192), jnp.int32)

        def steps():
            f = lambda q, lo, hi: xla.forward(q, q, q, op.Bounds(lo, hi), 0.125)  # noqa: E731
            return re.findall(r"length=(\d+)", str(jax.make_jaxpr(f)(q, edge, edge)))

        assert "256" in steps()
        as_on_an_accelerator(monkeypatch)
        assert steps() == ["13"]

    def test_a_symbolic_batch(self, monkeypatch):
        as_on_an_accelerator(monkeypatch)
        length, head_dim = 1100, 8
        (B,) = jax.export.symbolic_shape("B")
        shapes = [jax.ShapeDtypeStruct((B, length, 1, head_dim), jnp.float32)] * 3
        shapes += [jax.ShapeDtypeStruct((B, length), jnp.int32)] * 2
        exported = jax.export.export(
            jax.jit(lambda q, k, v, lo, hi: xla.attention(q, k, v, op.Bounds(lo, hi), scale=0.3))
        )(*shapes)
        q, k, v, _ = arrays_of(2, length, 1, head_dim, "float32")
        bounds = make_bounds(packed(length, (1, 700), (2, 400), rows=2))
        got = exported.call(q, k, v, bounds.lo_BL, bounds.hi_BL)
        want = op.attention(q, k, v, bounds, scale=0.3, implementation="reference")
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("length, window", [(60, None), (60, 16), (700, None)])
def test_what_is_not_finite_stays_in_its_segment(length, window):
    """NaN in v and d_out of a segment that shares its tiles with another: dense, bands, chunks."""
    ids = packed(length, (1, length // 3), (2, length - length // 3))
    arrays = q, k, v, d_out = arrays_of(1, length, 1, 8, "float32")
    bounds, ours, theirs = make_bounds(ids, window), ids[0] == 1, ids[0] == 2
    bad = v.at[:, length // 2, :, 3].set(jnp.nan), d_out.at[:, -9, :, 3].set(jnp.nan)
    got = both_passes(q, k, *bad, bounds, name="xla", scale=0.37)
    for x, want in zip(got, exact(*arrays, ids, window, 0.37), strict=True):
        np.testing.assert_allclose(x[:, ours], want[:, ours], atol=1e-5)
        assert not np.isfinite(x[:, theirs]).all()
    out = op.attention(q, k, bad[0], bounds, scale=0.37, implementation="reference")
    np.testing.assert_allclose(out, got[0], atol=1e-5)  # NaN for the same queries


def test_what_is_saved_for_the_backward_pass():
    """q, k, v, out, the log-sum-exp and the bounds: no array of scores."""
    length = 1024
    q, k, v, _ = arrays_of(1, length, 2, 8, "float32")
    bounds = make_bounds(np.ones((1, length), np.int32))
    _, pull = jax.vjp(lambda q, k, v: xla.attention(q, k, v, bounds, scale=0.3), q, k, v)
    sizes = sorted(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size"))
    assert sum(sizes) <= 4 * q.size + 2 * length + 2 * length + 16


class TestChoice:
    bounds = make_bounds(np.ones((2, 64), np.int32))
    q = jax.ShapeDtypeStruct((2, 64, 12, 64), jnp.bfloat16)

    @staticmethod
    def device(platform, kind, **more):
        return types.SimpleNamespace(platform=platform, device_kind=kind, **more)

    def test_cpu(self):
        choice = op.choose(self.q, self.bounds)
        assert choice.name == "xla" and "tested" in choice.reason

    def test_the_device_that_jax_is_told_to_use(self):
        last = jax.devices()[-1]
        with jax.default_device(last):
            assert op.default_device() == last
        with jax.default_device("cpu"):
            assert op.default_device().platform == "cpu"
        assert op.default_device() == jax.devices()[0]

    @pytest.mark.parametrize(
        "capability, name",
        [("9.0", "pallas_hopper"), ("8.9", "pallas_triton"), ("8.0", "pallas_triton"),
         ("8.6", "xla"), ("12.0", "xla")],
    )  # fmt: skip
    def test_an_absent_gpu_gets_what_a_run_there_would_check_first(self, capability, name):
        device = self.device("gpu", "NVIDIA", compute_capability=capability)
        choice = op.choose(self.q, self.bounds, device)
        assert choice.name == name and not choice.unchecked
        assert name == "xla" or "assumed for sm" in choice.reason

    def test_measured_wins(self, monkeypatch):
        device = self.device("gpu", "NVIDIA H100", compute_capability="9.0")
        monkeypatch.setitem(op.PROVEN, ("pallas_hopper", "sm90"), op.MEASURED)
        assert op.choose(self.q, self.bounds, device).name == "pallas_hopper"

    def test_an_absent_tpu_gets_its_kernel(self):
        choice = op.choose(self.q, self.bounds, self.device("tpu", "TPU v6 lite"))
        assert choice.name == "pallas_tpu" and "a run checks it first" in choice.reason

    def test_unknown_tpu_falls_back(self):
        assert op.choose(self.q, self.bounds, self.device("tpu", "TPU v99")).name == "xla"

    @pytest.mark.parametrize(
        "name, match",
        [
            ("pallas_tpu", "pallas_tpu: expected .*got 'cpu'"),
            ("pallas_hopper", "pallas_hopper: expected an NVIDIA GPU, got cpu"),
            ("pallas_triton", "pallas_triton: .*"),
            ("cudnn", "cudnn: expected an NVIDIA GPU, got cpu"),
            ("magic", "expected one of reference, xla, .*got 'magic'"),
        ],
    )
    def test_a_named_one_on_the_wrong_device_raises(self, name, match):
        x = jnp.zeros((2, 64, 2, 64), jnp.bfloat16)
        with pytest.raises(ValueError, match=match):
            op.attention(x, x, x, self.bounds, scale=1.0, implementation=name)

    def test_cudnn_takes_whole_global_rows_only(self):
        device = self.device("gpu", "NVIDIA H100", compute_capability="9.0")
        ids = np.ones((2, 64), np.int32)
        whole = make_bounds(ids, whole=True)
        assert op.refusal("cudnn", self.q, whole, device) is None
        assert "segment ids or a mask" in op.refusal("cudnn", self.q, self.bounds, device)
        assert "window of 8" in op.refusal("cudnn", self.q, make_bounds(ids, 8, whole=True), device)

    def test_a_measurement_is_claimed_if_and_only_if_its_result_file_has_it(self):
        """In those of tests/benchmarks/accelerator.py, and for the CPU in the self check's."""
        folder = pathlib.Path(__file__).parent / "benchmarks" / "results"
        records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        found = {
            (name, record["generation"])
            for record in records
            if isinstance(record, dict)
            for name in record.get("measured", ())
        }
        assert (folder / "self_check_cpu.json").exists()
        found.add(("xla", "cpu"))
        assert found == {key for key, status in op.PROVEN.items() if status == op.MEASURED}

    def test_which_kernels_a_measurement_makes_the_default(self):
        row = {"implementation": "pallas_hopper", "layer": "local, packed", "dtype": "bfloat16"}
        good = row | {"error": 0.01, "speed_against_xla": 3.0}
        triton = good | {"implementation": "pallas_triton"}
        check = lambda *rows: accelerator.measured({"results": list(rows)})  # noqa: E731
        assert check(good, good, triton) == ["pallas_hopper", "pallas_triton"]
        assert check(good, good | {"error": 0.03}, triton) == ["pallas_triton"]
        assert check(good, good | {"error": float("nan")}) == []
        assert check(good, good | {"speed_against_xla": 0.9}) == []
        assert check(good, row | {"failure": "RuntimeError: ptxas"}) == []
        assert check() == accelerator.measured({"failure": "not finished after 60 s"}) == []

    @pytest.mark.slow
    def test_the_measurement_runs(self, tmp_path):
        path = tmp_path / "cpu.json"
        assert accelerator.main(["--quick", "--json", str(path)]) == 0
        record = json.loads(path.read_text())
        assert record["generation"] == "cpu" and record["measured"] == []
        assert set(record["parts"]) == {"check", "attention", "train tiny 128"}
        assert all(part["results"] for part in record["parts"].values())


class TestSharded:
    def test_equals_the_plain_op(self):
        mesh = jax.make_mesh(
            (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        ids = np.tile(LAYOUTS["many"], (4, 1))
        q, k, v, d_out = arrays_of(4, 150, 4, 8, "float32")
        bounds = make_bounds(ids, 16)
        f = op.sharded(mesh, rows="data", heads="tensor")
        place = lambda x: jax.device_put(  # noqa: E731
            x, NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
        )

        @jax.jit
        def run(q, k, v, d_out):
            out, pull = jax.vjp(lambda q, k, v: f(q, k, v, bounds, scale=0.37), q, k, v)
            return (out, *pull(d_out))

        lowered = run.lower(*(place(x) for x in (q, k, v, d_out))).compile()
        assert "all-" not in lowered.as_text()  # nothing is exchanged
        got = run(*(place(x) for x in (q, k, v, d_out)))
        want = both_passes(q, k, v, d_out, bounds, name="xla", scale=0.37)
        for ours, plain in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-6)

    def test_refusals(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with pytest.raises(ValueError, match="heads: expected mesh axes of .*got 'tensor'"):
            op.sharded(mesh, rows="data", heads="tensor")
        x = jnp.zeros((6, 16, 2, 8))
        bounds = make_bounds(np.ones((6, 16), np.int32))
        with pytest.raises(ValueError, match="rows: expected a multiple of 8, got 6"):
            op.sharded(mesh, rows="data")(x, x, x, bounds, scale=1.0)


CONTEXT_LAYOUTS = [
    packed(160, (1, 160)),
    packed(160, (1, 30), (2, 60), (3, 1), (4, 49), (5, 20)),  # across the edges of the parts
    packed(160, (0, 30), (1, 50), (2, 40), (0, 40)),  # a part may hold nothing but padding
]


class TestContextParallel:
    """Each device holds a part of the tokens: against the formulas on complete rows."""

    @staticmethod
    def run(ids, window, parts, name="xla"):
        mesh = jax.make_mesh((parts,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,),
                             devices=jax.devices()[:parts])  # fmt: skip
        bounds = make_bounds(ids, window)
        plain = functools.partial(op.attention, implementation=name)
        f = functools.partial(op.context_parallel(plain, "sequence"), scale=0.37)
        part = PartitionSpec(None, "sequence")

        @jax.jit
        def both(q, k, v, d_out):
            split = jax.shard_map(
                f, mesh=mesh, in_specs=(part, part, part, PartitionSpec()), out_specs=part,
                check_vma=False,
            )  # fmt: skip
            out, pull = jax.vjp(lambda q, k, v: split(q, k, v, bounds), q, k, v)
            return (out, *pull(d_out))

        arrays = arrays_of(*ids.shape, 2, 8, "float32")
        return both, arrays, exact(*arrays, ids, window, 0.37)

    @pytest.mark.parametrize("name, parts", [("xla", 2), ("reference", 4), ("xla", 8)])
    @pytest.mark.parametrize("window", [0, 1, 16, 30, None])
    def test_equals_complete_rows(self, name, parts, window):
        """With a window of 30, eight parts of 20 tokens gather the row."""
        both, arrays, want = self.run(np.concatenate(CONTEXT_LAYOUTS), window, parts, name)
        for one, reference in zip(both(*arrays), want, strict=True):
            np.testing.assert_allclose(one, reference, atol=1e-5)

    def test_rows_longer_than_the_tiles(self):
        ids = packed(1200, (1, 500), (0, 20), (2, 280), (3, 400))
        both, arrays, want = self.run(ids, None, 2)
        for one, reference in zip(both(*arrays), want, strict=True):
            np.testing.assert_allclose(one, reference, atol=1e-5)

    def test_what_is_communicated(self):
        """Only halos in a local layer; in a global one keys, values and their gradients."""
        ids = CONTEXT_LAYOUTS[0]
        both, arrays, _ = self.run(ids, 16, 2)
        local = both.lower(*arrays).as_text()
        assert "collective_permute" in local and "all_gather" not in local
        both, arrays, _ = self.run(ids, None, 2)
        wide = both.lower(*arrays).as_text()
        assert "collective_permute" not in wide
        assert "all_gather" in wide and "reduce_scatter" in wide and "all_reduce" not in wide

    def test_parts_that_make_up_no_row(self):
        ids = CONTEXT_LAYOUTS[0]
        both, (q, k, v, d_out), _ = self.run(ids[:, :150], 16, 2)
        with pytest.raises(ValueError, match="expected 1/2 of rows of 150 tokens .*got 80"):
            both(*arrays_of(1, 160, 2, 8, "float32"))

    def test_a_kernel_that_needs_complete_rows_refuses(self):
        bounds = op.Bounds(*np.zeros((4, 2, 64), np.int32)[:2], None, False, *np.zeros((2, 2, 128)))
        q = jax.ShapeDtypeStruct((2, 64, 12, 64), jnp.bfloat16)
        device = types.SimpleNamespace(
            platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0"
        )
        assert "mesh.sequence" in op.refusal("pallas_hopper", q, bounds, device)


def test_a_policy_saves_the_results_of_the_forward_by_name():
    """The forward runs once if a policy saves both of its results, and again if it saves one."""
    bounds = make_bounds(np.ones((1, 8), np.int32))

    def forward(q, k, v, bounds, scale):
        h = jnp.tanh(q + k + v)
        return h, h[..., 0]

    def backward(q, k, v, out, lse, bounds, d_out, scale):
        return (d_out * out * lse[..., None],) * 3

    def forwards(policy):
        run = functools.partial(with_vjp(forward, backward), bounds=bounds, scale=1.0)
        run = jax.shard_map(
            run,
            mesh=jax.make_mesh((1,), ("data",)),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        layer = jax.checkpoint(lambda x: run(x, 2 * x, 3 * x), policy=policy)
        gradient = jax.jit(jax.grad(lambda x: jnp.sin(layer(x)).sum()))
        return gradient.lower(jnp.ones((1, 8, 2, 4))).as_text().count("stablehlo.tanh")

    policies = jax.checkpoint_policies
    assert forwards(policies.save_only_these_names(OUT, LSE)) == 1
    assert forwards(policies.save_only_these_names(OUT)) == 2
    assert forwards(policies.nothing_saveable) == 2


def test_segment_ids_must_rise():
    with pytest.raises(ValueError, match="rise along a row, row 0 has 1 after 2 at token 3"):
        make_bounds(np.array([[1, 2, 0, 1]]))


def test_the_self_check_runs_and_offers_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(self_check, "HEADS", 2)
    monkeypatch.setattr(self_check, "HEAD_DIM", 8)
    path = tmp_path / "out.json"
    assert self_check.main(["--json", str(path), "--length", "300"]) == 0
    record = json.loads(path.read_text())
    assert {r["implementation"] for r in record["results"]} == {"xla"}
    assert all(r["error"] < 2e-5 for r in record["results"])
    printed = capsys.readouterr().out
    assert "pallas_tpu: expected" in printed and "implementation=None runs xla" in printed
