"""TPU kernels (Pallas, Mosaic): a forward and one fused backward that visit only tiles in bounds.

Layout: q, k and v are read as [B, L, H*K] in blocks of 128 lanes, which hold 128 // K heads each.
This needs no transpose and no padded lanes (an odd head count is padded with a head of zeros).
Zeros in q (and d_out) separate a head from its neighbors in the block: for the matrix unit, a
contraction over 128 lanes takes no longer than one over 64. Scores are transposed, keys by queries,
so that everything that belongs to a query (bounds, maximum, sum, log-sum-exp) lies along the lanes,
as it does in HBM.

Global layers loop over tiles of keys with an online softmax; two scalars per query tile give the
first and the last tile. A step past the last tile refers to the block that is already in VMEM, so
it fetches nothing, and its arithmetic is skipped; the grid is as long as the longest loop of the
call. The mask is applied only in tiles that some query does not see completely. Local layers fetch
the one span of keys that a query tile can see (from an element offset) and need no online softmax.
The backward pass loops in the same way and accumulates dk and dv in VMEM, where one row of a block
of heads fits; it computes the scores once for all three gradients.

A length that no tile size divides is padded with zeros, which lie outside all bounds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from modernbert_jax.attention.bounds import Bounds, tile_bounds
from modernbert_jax.attention.vjp import Attention, with_vjp

_LANES = 128
_LN_2 = math.log(2.0)
# The start of the running maximum; it is finite so that queries without keys never produce NaN.
_FLOOR = -1e30
# Wider windows use the loop over tiles of global layers.
_WIDEST_BAND = 256
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes in tokens: what one grid step fetches, and the units in which it is processed.

    A local layer fetches `queries + 2 * window` keys and ignores `keys` and `unit_keys`.
    """

    queries: int
    unit_queries: int
    keys: int = 0
    unit_keys: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """Differences between TPU generations: VMEM per core, and the tiles of each pass and kind."""

    vmem_bytes: int
    forward_global: Tiles = Tiles(1024, 512, 512, 512)
    forward_local: Tiles = Tiles(1024, 128)
    backward_global: Tiles = Tiles(1024, 256, 512, 512)
    backward_local: Tiles = Tiles(1024, 128)


# By JAX's device_kind.
GENERATIONS = {
    "TPU v5 lite": Generation(128 * _MIB, forward_global=Tiles(1024, 256, 512, 512)),
    "TPU v5": Generation(64 * _MIB),
    "TPU v6 lite": Generation(128 * _MIB),
    "TPU7x": Generation(64 * _MIB),
}


def supports(q_BLHK: jax.Array, bounds: Bounds, device_kind: str) -> str | None:
    """Returns None if the kernels support these shapes on this device, else the reason in one line.

    `device_kind` is JAX's name, as in `jax.devices()[0].device_kind`.
    """
    if device_kind not in GENERATIONS:
        return f"pallas_tpu: expected one of {', '.join(GENERATIONS)}, got {device_kind!r}"
    if q_BLHK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"pallas_tpu: expected float32 or bfloat16, got {q_BLHK.dtype}"
    if q_BLHK.shape[3] not in (32, 64, 128):
        return f"pallas_tpu: expected a head dim of 32, 64 or 128, got {q_BLHK.shape[3]}"
    generation = GENERATIONS[device_kind]
    plan = _plan(q_BLHK, bounds, generation.backward_global, generation.backward_local)
    # dk and dv of a row: the float32 sums, and two buffers of each output.
    needs = 2 * plan.padded * _LANES * (4 + 2 * q_BLHK.dtype.itemsize)
    room = generation.vmem_bytes // 2
    if needs > room:
        return (
            f"pallas_tpu: expected dk and dv of one row to take at most {room} bytes of VMEM, "
            f"got {needs} (L={q_BLHK.shape[1]})"
        )
    return None


def forward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    scale: float,
    *,
    generation: Generation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BLHK in q's dtype and lse_BHL in float32 (natural log, -inf without keys).

    generation: by default that of the current device. interpret: passed to `pl.pallas_call`.
    """
    generation = generation or _present()
    plan = _plan(q_BLHK, bounds, generation.forward_global, generation.forward_local)
    T, G = plan.tiles, plan.per_block
    f32 = jnp.float32
    scratch = []
    if not plan.local:
        scratch = [
            pltpu.VMEM((G, T.queries, _LANES), q_BLHK.dtype),
            pltpu.VMEM((_LANES, T.queries), f32),
            pltpu.VMEM((G, T.queries), f32),
            pltpu.VMEM((G, T.queries), f32),
        ]
    out, lse = _pallas_call(
        _forward_local if plan.local else _forward_global,
        "forward",
        plan,
        bounds,
        scale,
        in_specs=[_query_spec(plan), *_key_specs(plan), _stats_spec(plan, 2, blocked=False)],
        out_specs=[_query_spec(plan), _stats_spec(plan, G)],
        out_shape=[
            jax.ShapeDtypeStruct((plan.rows, plan.padded, plan.blocks * _LANES), q_BLHK.dtype),
            jax.ShapeDtypeStruct((plan.rows, plan.blocks, G, plan.padded), f32),
        ],
        scratch_shapes=scratch,
        vmem_bytes=generation.vmem_bytes,
        interpret=interpret,
    )(_pack(plan, q_BLHK), _pack(plan, k_BMHK), _pack(plan, v_BMHK), _edges(plan, bounds))
    lse_BHL = lse.reshape(plan.rows, plan.blocks * G, plan.padded)
    return _unpack(plan, out), lse_BHL[:, : plan.heads, : plan.length]


def backward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    out_BLHK: jax.Array,
    lse_BHL: jax.Array,
    bounds: Bounds,
    d_out_BLHK: jax.Array,
    scale: float,
    *,
    generation: Generation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk and dv in the shapes and dtypes of q, k and v, from one kernel."""
    generation = generation or _present()
    plan = _plan(q_BLHK, bounds, generation.backward_global, generation.backward_local)
    T, G = plan.tiles, plan.per_block
    f32 = jnp.float32
    row_spec = pl.BlockSpec((1, plan.padded, _LANES), lambda b, g, i, t, *_: (b, 0, g))
    row_scratch = pltpu.VMEM((plan.padded, _LANES), f32)
    heads_scratch = pltpu.VMEM((G, T.queries, _LANES), q_BLHK.dtype)
    scratch = [row_scratch, row_scratch]
    if not plan.local:
        scratch += [heads_scratch, heads_scratch, pltpu.VMEM((_LANES, T.queries), f32)]
    row = jax.ShapeDtypeStruct((plan.rows, plan.padded, plan.blocks * _LANES), q_BLHK.dtype)
    delta_BHL = jnp.einsum(
        "BLHK,BLHK->BHL", d_out_BLHK.astype(f32), out_BLHK.astype(f32), precision="highest"
    )
    grads = _pallas_call(
        _backward_local if plan.local else _backward_global,
        "backward",
        plan,
        bounds,
        scale,
        in_specs=[
            _query_spec(plan),
            *_key_specs(plan),
            _query_spec(plan),
            _stats_spec(plan, 2, blocked=False),
            _stats_spec(plan, 2 * G),
        ],
        out_specs=[_query_spec(plan), row_spec, row_spec],
        out_shape=[row, row, row],
        scratch_shapes=scratch,
        vmem_bytes=generation.vmem_bytes,
        interpret=interpret,
    )(
        _pack(plan, q_BLHK),
        _pack(plan, k_BMHK),
        _pack(plan, v_BMHK),
        _pack(plan, d_out_BLHK),
        _edges(plan, bounds),
        _pack_stats(plan, lse_BHL, delta_BHL),
    )
    dq, dk, dv = (_unpack(plan, x) for x in grads)
    return dq, dk, dv


attention: Attention = with_vjp(forward, backward)


def _present() -> Generation:
    """The generation of the mesh that is being traced for, else of the default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    kind = abstract.device_kind if abstract is not None else jax.devices()[0].device_kind
    return GENERATIONS.get(kind, GENERATIONS["TPU v6 lite"])


# Sizes and arrays


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The sizes of one call. If `local`, `tiles.keys` and `tiles.unit_keys` are spans."""

    rows: int
    length: int
    padded: int
    heads: int
    head_dim: int
    local: bool
    reach: int  # keys fetched on either side of a tile of queries, local only
    tiles: Tiles

    @property
    def per_block(self) -> int:
        return _LANES // self.head_dim

    @property
    def blocks(self) -> int:
        return -(-self.heads // self.per_block)

    @property
    def query_tiles(self) -> int:
        return self.padded // self.tiles.queries


def _plan(q_BLHK, bounds: Bounds, for_global: Tiles, for_local: Tiles) -> _Plan:
    B, L, H, K = q_BLHK.shape
    window = bounds.window or 0
    local = 0 < window <= _WIDEST_BAND
    tiles = for_local if local else for_global
    # As many tiles as the length needs, all of one size: 1100 tokens are 2 x 640, not 2 x 1024.
    count = -(-L // tiles.queries)
    queries = _round_up(-(-L // count), _LANES)
    padded = count * queries
    unit_queries = math.gcd(queries, tiles.unit_queries)
    # A half tile of lanes is the finest offset that suits both dtypes' rows.
    reach = _round_up(window, _LANES // 2) if local else 0
    if local:
        keys = min(queries + 2 * reach, padded)
        unit_keys = min(unit_queries + 2 * reach, padded)
    else:
        keys = max(n for n in range(_LANES, tiles.keys + 1, _LANES) if padded % n == 0)
        unit_keys = math.gcd(keys, tiles.unit_keys)
    return _Plan(B, L, padded, H, K, local, reach, Tiles(queries, unit_queries, keys, unit_keys))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pack(plan: _Plan, x_BLHK):
    """Reshapes [B, L, H, K] to [B, padded, blocks * 128]."""
    extra = plan.blocks * plan.per_block - plan.heads
    x_BLHK = jnp.pad(x_BLHK, ((0, 0), (0, plan.padded - plan.length), (0, extra), (0, 0)))
    return x_BLHK.reshape(plan.rows, plan.padded, plan.blocks * _LANES)


def _unpack(plan: _Plan, x):
    x_BLHK = x.reshape(plan.rows, plan.padded, -1, plan.head_dim)
    return x_BLHK[:, : plan.length, : plan.heads]


def _edges(plan: _Plan, bounds: Bounds):
    """Stacks lo and hi as [B, 2, padded]; padded queries see nothing."""
    edges = jnp.stack([bounds.lo_BL, bounds.hi_BL], axis=1)
    return jnp.pad(edges, ((0, 0), (0, 0), (0, plan.padded - plan.length)))


def _pack_stats(plan: _Plan, lse_BHL, delta_BHL):
    """Base-2 log-sum-exp (+inf without keys, so that p is 0) and delta, [B, blocks, 2G, padded]."""
    extra = plan.blocks * plan.per_block - plan.heads
    tail = ((0, 0), (0, extra), (0, plan.padded - plan.length))
    lse_BHL = jnp.pad(lse_BHL, tail, constant_values=-jnp.inf)
    lse_BHL = jnp.where(lse_BHL == -jnp.inf, jnp.inf, lse_BHL / _LN_2)
    stats = [lse_BHL, jnp.pad(delta_BHL, tail)]
    by_block = [x.reshape(plan.rows, plan.blocks, plan.per_block, plan.padded) for x in stats]
    return jnp.concatenate(by_block, axis=2)


def _scalars(plan: _Plan, bounds: Bounds) -> tuple[tuple[jax.Array, ...], Any]:
    """What the index maps and branches read, [B * tiles] each, and the steps that the walk takes.

    Local: the first key of the span, and whether the tile has any. Global: the first tile of keys,
    one past the last, and the interval that every query of the tile sees.
    """
    T = plan.tiles
    first_BT, last_BT = tile_bounds(
        bounds, T.queries, 1 if plan.local else T.keys, plan.query_tiles
    )
    # A tile without keys stays where its predecessor was, and fetches nothing.
    seen_BT = jax.lax.cummax(last_BT, axis=1)
    some_BT = first_BT < last_BT
    if plan.local:
        span_T = jnp.arange(plan.query_tiles, dtype=jnp.int32) * T.queries - plan.reach
        span_BT = jnp.broadcast_to(
            jnp.clip(span_T, 0, plan.padded - T.keys)[None], (plan.rows, plan.query_tiles)
        )
        span_BT = jax.lax.cummax(jnp.where(some_BT, span_BT, 0), axis=1)
        return (span_BT.reshape(-1), some_BT.astype(jnp.int32).reshape(-1)), 1
    edges = _edges(plan, bounds).reshape(plan.rows, 2, plan.query_tiles, T.queries)
    inner_lo_BT, inner_hi_BT = jnp.max(edges[:, 0], axis=-1), jnp.min(edges[:, 1], axis=-1)
    steps = jnp.maximum(jnp.max(last_BT - first_BT), 1)
    first_BT = jnp.where(some_BT, first_BT, seen_BT)
    arrays = (first_BT, jnp.where(some_BT, last_BT, seen_BT), inner_lo_BT, inner_hi_BT)
    return tuple(x.reshape(-1) for x in arrays), steps


# Blocks. The grid is (row, block of heads, tile of queries, step of the walk).


def _query_spec(plan: _Plan):
    return pl.BlockSpec((1, plan.tiles.queries, _LANES), lambda b, g, i, t, *_: (b, i, g))


def _stats_spec(plan: _Plan, n: int, blocked: bool = True):
    if blocked:
        return pl.BlockSpec((1, 1, n, plan.tiles.queries), lambda b, g, i, t, *_: (b, g, 0, i))
    return pl.BlockSpec((1, n, plan.tiles.queries), lambda b, g, i, t, *_: (b, 0, i))


def _key_specs(plan: _Plan):
    n = plan.query_tiles

    def span(b, g, i, t, first, *_):
        return b, pl.multiple_of(first[b * n + i], _LANES // 2), g * _LANES

    def tile(b, g, i, t, first, last, *_):
        j = b * n + i
        return b, jnp.maximum(jnp.minimum(first[j] + t, last[j] - 1), 0), g

    if plan.local:
        shape = (pl.Element(1), pl.Element(plan.tiles.keys), pl.Element(_LANES))
        spec = pl.BlockSpec(shape, span)
    else:
        spec = pl.BlockSpec((1, plan.tiles.keys, _LANES), tile)
    return spec, spec


def _pallas_call(
    kernel,
    name: str,
    plan: _Plan,
    bounds: Bounds,
    scale: float,
    *,
    in_specs,
    out_specs,
    out_shape,
    scratch_shapes,
    vmem_bytes: int,
    interpret,
):
    scalars, steps = _scalars(plan, bounds)
    call = pl.pallas_call(
        functools.partial(kernel, plan=plan, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.rows, plan.blocks, plan.query_tiles, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes * 3 // 4,
        ),
        name=f"bounded_{name}_{'local' if plan.local else 'global'}",
        interpret=interpret,
    )
    return functools.partial(call, *scalars)


# Arithmetic. Values inside the kernels: keys along sublanes, queries along lanes.


def _dot(a, b, contract_a: int, contract_b: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _one_head(x, head: int, head_dim: int):
    """Zeros the lanes of the other heads in x [n, 128]."""
    if head_dim == _LANES:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    return jnp.where(lane // head_dim == head, x, jnp.zeros_like(x))


def _scores(k, q, edges, first_key):
    """The transposed q k^T, [keys, queries]; -inf outside `edges` [2, queries] or None."""
    s = _dot(k, q, 1, 1)
    if edges is None:
        return s
    j = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    lo, hi = edges[0:1] - first_key, edges[1:2] - first_key
    return jnp.where((lo <= j) & (j < hi), s, -jnp.inf)


def _units(plan: _Plan):
    """Yields (head of the block, its queries) of each softmax in a tile of queries."""
    U = plan.tiles.unit_queries
    starts = range(0, plan.tiles.queries, U)
    return [(head, slice(x, x + U)) for x in starts for head in range(plan.per_block)]


def _staggered(units, *stages):
    """Runs stages[1](unit, stages[0](unit)) and so on, each stage one unit behind the previous one.

    The compiler's scheduler stays near program order: this way the products of one unit overlap
    with the exponentials of its predecessor.
    """
    values: list[Any] = [()] * len(units)
    for time in range(len(units) + len(stages) - 1):
        for lag, stage in enumerate(stages):
            if 0 <= time - lag < len(units):
                values[time - lag] = stage(*units[time - lag], *values[time - lag])
    return values


def _lanes_of(head: int, plan: _Plan):
    return slice(head * plan.head_dim, (head + 1) * plan.head_dim)


def _unit_span(plan: _Plan, i, start: int, first):
    """The offset of a unit's keys in the fetched span and in the row (local layers)."""
    key = i * plan.tiles.queries + start - plan.reach
    key = jnp.clip(key, 0, plan.padded - plan.tiles.unit_keys)
    return pl.multiple_of(key - first, _LANES // 2), pl.multiple_of(key, _LANES // 2)


def _forward_local(first, some, q, k, v, edges, out, lse, *, plan: _Plan, scale: float):
    c = scale / _LN_2
    i = pl.program_id(2)
    n = pl.program_id(0) * plan.query_tiles + i

    @pl.when(some[n] == 0)
    def _():
        out[...] = jnp.zeros_like(out)
        lse[...] = jnp.full_like(lse, -jnp.inf)

    @pl.when(some[n] != 0)
    def _():
        def scores(head, queries):
            at, key = _unit_span(plan, i, queries.start, first[n])
            keys = pl.ds(at, plan.tiles.unit_keys)
            q_head = _one_head(q[0, queries, :], head, plan.head_dim)
            return _scores(k[0, keys, :], q_head, edges[0, :, queries], key), v[0, keys, :]

        def softmax(head, queries, s, vs):
            top = jnp.maximum(jnp.max(s, axis=0, keepdims=True), _FLOOR)
            p = jnp.exp2(s * c - top * c)
            total = jnp.sum(p, axis=0, keepdims=True)
            lse[0, 0, head : head + 1, queries] = _natural(top * c, total)
            return p.astype(v.dtype), vs, jnp.where(total == 0, 0.0, 1.0 / total)

        def average(head, queries, p, vs, share):
            return (_dot(vs.T[_lanes_of(head, plan)], p, 1, 0) * share,)

        units = _units(plan)
        outT = [value[0] for value in _staggered(units, scores, softmax, average)]
        for x in range(0, len(units), plan.per_block):
            block = jnp.concatenate(outT[x : x + plan.per_block], axis=0)
            out[0, units[x][1], :] = block.T.astype(out.dtype)


def _natural(top, total):
    """Computes the log-sum-exp from a base-2 maximum and sum."""
    return jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) * _LN_2)


def _forward_global(
    first, last, inner_lo, inner_hi, q, k, v, edges, out, lse, q_heads, sums, tops, totals,
    *, plan: _Plan, scale: float,
):  # fmt: skip
    c = scale / _LN_2
    step = pl.program_id(3)
    n = pl.program_id(0) * plan.query_tiles + pl.program_id(2)
    tile = first[n] + step

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        tops[...] = jnp.full_like(tops, _FLOOR)
        totals[...] = jnp.zeros_like(totals)
        for head in range(plan.per_block):
            q_heads[head] = _one_head(q[0], head, plan.head_dim)

    def visit(masked: bool):
        def some_keys(u, _):
            at = pl.multiple_of(u * plan.tiles.unit_keys, _LANES)
            keys = pl.ds(at, plan.tiles.unit_keys)
            ks, vT = k[0, keys, :], v[0, keys, :].T

            def scores(head, queries):
                mask = edges[0, :, queries] if masked else None
                first_key = tile * plan.tiles.keys + at
                return (_scores(ks, q_heads[head, queries, :], mask, first_key),)

            def softmax(head, queries, s):
                row = slice(head, head + 1)
                old = tops[row, queries]
                top = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
                p = jnp.exp2(s * c - top * c)
                shrink = jnp.exp2((old - top) * c)
                tops[row, queries] = top
                total = jnp.sum(p, axis=0, keepdims=True)
                totals[row, queries] = totals[row, queries] * shrink + total
                return p.astype(v.dtype), shrink

            def add(head, queries, p, shrink):
                lanes = _lanes_of(head, plan)
                sums[lanes, queries] = sums[lanes, queries] * shrink + _dot(vT[lanes], p, 1, 0)

            _staggered(_units(plan), scores, softmax, add)
            return 0

        _loop(plan.tiles.keys // plan.tiles.unit_keys, some_keys)

    _visit_if_any(plan, n, tile, last, inner_lo, inner_hi, visit)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = totals[...]
        share = jnp.where(total == 0, 0.0, 1.0 / total)
        for head in range(plan.per_block):
            lanes = _lanes_of(head, plan)
            sums[lanes] = sums[lanes] * share[head : head + 1]
        out[0] = sums[...].T.astype(out.dtype)
        lse[0, 0] = _natural(tops[...] * c, total)


def _loop(count: int, body):
    if count == 1:
        body(0, 0)
    else:
        jax.lax.fori_loop(0, count, body, 0)


def _visit_if_any(plan: _Plan, n, tile, last, inner_lo, inner_hi, visit):
    key = tile * plan.tiles.keys
    whole = (inner_lo[n] <= key) & (key + plan.tiles.keys <= inner_hi[n])
    pl.when((tile < last[n]) & whole)(lambda: visit(masked=False))
    pl.when((tile < last[n]) & ~whole)(lambda: visit(masked=True))


def _products(ks, vs, q_head, d_out_head, edges, first_key):
    return _scores(ks, q_head, edges, first_key), _dot(vs, d_out_head, 1, 1)


def _weights(plan: _Plan, head: int, s, dp, stats, scale: float, dtype):
    """Returns p and the gradient of the scores, before the scale that dq and dk still need."""
    p = jnp.exp2(s * (scale / _LN_2) - stats[head : head + 1])
    delta = stats[plan.per_block + head : plan.per_block + head + 1]
    return p.astype(dtype), (p * (dp - delta)).astype(dtype)


def _start_row(dk_sum, dv_sum):
    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)


def _finish_row(dk, dv, dk_sum, dv_sum, scale):
    last_tile = pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(last_tile & (pl.program_id(3) == pl.num_programs(3) - 1))
    def _():
        dk[0] = (dk_sum[...] * scale).astype(dk.dtype)
        dv[0] = dv_sum[...].astype(dv.dtype)


def _backward_local(
    first, some, q, k, v, d_out, edges, stats, dq, dk, dv, dk_sum, dv_sum,
    *, plan: _Plan, scale: float,
):  # fmt: skip
    i = pl.program_id(2)
    n = pl.program_id(0) * plan.query_tiles + i
    _start_row(dk_sum, dv_sum)

    @pl.when(some[n] == 0)
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when(some[n] != 0)
    def _():
        def products(head, queries):
            at, key = _unit_span(plan, i, queries.start, first[n])
            keys = pl.ds(at, plan.tiles.unit_keys)
            ks, vs = k[0, keys, :], v[0, keys, :]
            q_head = _one_head(q[0, queries, :], head, plan.head_dim)
            d_out_head = _one_head(d_out[0, queries, :], head, plan.head_dim)
            s_dp = _products(ks, vs, q_head, d_out_head, edges[0, :, queries], key)
            return *s_dp, ks, q_head, d_out_head, key

        def weights(head, queries, s, dp, *rest):
            stats_ = stats[0, 0, :, queries]
            return *_weights(plan, head, s, dp, stats_, scale, k.dtype), *rest

        def add(head, queries, p, ds, ks, q_head, d_out_head, key):
            rows = pl.ds(key, plan.tiles.unit_keys)
            dv_sum[rows, :] += _dot(p, d_out_head, 1, 0)
            dk_sum[rows, :] += _dot(ds, q_head, 1, 0)
            return (_dot(ks.T[_lanes_of(head, plan)], ds, 1, 0),)

        units = _units(plan)
        dqT = [value[0] for value in _staggered(units, products, weights, add)]
        for x in range(0, len(units), plan.per_block):
            block = jnp.concatenate(dqT[x : x + plan.per_block], axis=0) * scale
            dq[0, units[x][1], :] = block.T.astype(dq.dtype)

    _finish_row(dk, dv, dk_sum, dv_sum, scale)


def _backward_global(
    first, last, inner_lo, inner_hi, q, k, v, d_out, edges, stats, dq, dk, dv,
    dk_sum, dv_sum, q_heads, d_out_heads, dq_sum,
    *, plan: _Plan, scale: float,
):  # fmt: skip
    step = pl.program_id(3)
    n = pl.program_id(0) * plan.query_tiles + pl.program_id(2)
    tile = first[n] + step
    _start_row(dk_sum, dv_sum)

    @pl.when(step == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for head in range(plan.per_block):
            q_heads[head] = _one_head(q[0], head, plan.head_dim)
            d_out_heads[head] = _one_head(d_out[0], head, plan.head_dim)

    def visit(masked: bool):
        def some_keys(u, _):
            at = pl.multiple_of(u * plan.tiles.unit_keys, _LANES)
            key = pl.multiple_of(tile * plan.tiles.keys + at, _LANES)
            keys, rows = pl.ds(at, plan.tiles.unit_keys), pl.ds(key, plan.tiles.unit_keys)
            ks, vs = k[0, keys, :], v[0, keys, :]
            kT = ks.T

            def products(head, queries):
                mask = edges[0, :, queries] if masked else None
                q_head, d_out_head = q_heads[head, queries, :], d_out_heads[head, queries, :]
                return _products(ks, vs, q_head, d_out_head, mask, key)

            def weights(head, queries, s, dp):
                return _weights(plan, head, s, dp, stats[0, 0, :, queries], scale, k.dtype)

            def add(head, queries, p, ds):
                dv_sum[rows, :] += _dot(p, d_out_heads[head, queries, :], 1, 0)
                dk_sum[rows, :] += _dot(ds, q_heads[head, queries, :], 1, 0)
                lanes = _lanes_of(head, plan)
                dq_sum[lanes, queries] += _dot(kT[lanes], ds, 1, 0)

            _staggered(_units(plan), products, weights, add)
            return 0

        _loop(plan.tiles.keys // plan.tiles.unit_keys, some_keys)

    _visit_if_any(plan, n, tile, last, inner_lo, inner_hi, visit)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[0] = (dq_sum[...] * scale).T.astype(dq.dtype)

    _finish_row(dk, dv, dk_sum, dv_sum, scale)
