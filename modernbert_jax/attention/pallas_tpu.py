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

q, k and v may come in one array in which the heads of a block lie side by side, 128 lanes of q,
then k, then v, as one projection writes them; their gradients then leave in the same form. With
tables of RoPE, q and k are rotated when they are read, and dq and dk rotated back before they are
written; the tables of a row stay in VMEM for all heads.

Where a mask separates segments in one tile, a NaN must not cross it, although 0 x NaN is NaN:
values that are not finite are replaced by 0, and NaN is put into the scores that belong to them
before these are masked.

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
from modernbert_jax.attention.gpu_tiles import check_scale
from modernbert_jax.attention.rope import Rope
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
    needs, room = _row_bytes(plan, q_BLHK.dtype), generation.vmem_bytes * 5 // 8
    if needs > room:
        return (
            f"pallas_tpu: expected the gradients of one row to take at most {room} bytes of VMEM, "
            f"got {needs} (L={q_BLHK.shape[1]})"
        )
    return None


def heads_in_a_block(head_dim: int) -> int:
    """Returns how many heads lie side by side in one array of q, k and v."""
    return _LANES // head_dim


def forward(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    bounds: Bounds,
    scale: float,
    rope: Rope | None = None,
    *,
    generation: Generation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BLHK in q's dtype and lse_BHL in float32 (natural log, -inf without keys).

    q, k, v: each [B, L, H, K], or q is all three, [B, L, H/J, 3, J, K] with J heads in a block, and
    k and v are None. rope: cosines and sines, float32 [B or 1, L, K/2]. generation: by default that
    of the current device. interpret: passed to `pl.pallas_call`.
    """
    check_scale(scale)
    generation = generation or _present()
    plan = _plan(q, bounds, generation.forward_global, generation.forward_local)
    T, G, f32 = plan.tiles, plan.per_block, jnp.float32
    if plan.local:
        scratch = [_rows(T.queries, q), _rows(T.keys, q), _rows(T.keys, q)]
    else:
        scratch = [
            pltpu.VMEM((G, T.queries, _LANES), q.dtype),
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
        rope,
        in_specs=[*_qkv_specs(plan), _stats_spec(plan, 2, blocked=False)],
        out_specs=[_query_spec(plan), _stats_spec(plan, G)],
        out_shape=[
            jax.ShapeDtypeStruct((plan.rows, plan.padded, plan.blocks * _LANES), q.dtype),
            jax.ShapeDtypeStruct((plan.rows, plan.blocks, G, plan.padded), f32),
        ],
        scratch_shapes=scratch,
        vmem_bytes=generation.vmem_bytes,
        interpret=interpret,
    )(*_pack_qkv(plan, q, k, v), _edges(plan, bounds))
    lse_BHL = lse.reshape(plan.rows, plan.blocks * G, plan.padded)
    return _unpack(plan, out), lse_BHL[:, : plan.heads, : plan.length]


def backward(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    out_BLHK: jax.Array,
    lse_BHL: jax.Array,
    bounds: Bounds,
    d_out_BLHK: jax.Array,
    scale: float,
    rope: Rope | None = None,
    *,
    generation: Generation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns dq, dk and dv in the shapes and dtypes of q, k and v, from one kernel."""
    generation = generation or _present()
    plan = _plan(q, bounds, generation.backward_global, generation.backward_local)
    T, G, f32 = plan.tiles, plan.per_block, jnp.float32
    if plan.local:
        row = pltpu.VMEM((plan.padded, _LANES), f32)
        scratch = [row, row, *[_rows(T.queries, q)] * 3, *[_rows(T.keys, q)] * 3]
    else:
        row = pltpu.VMEM((_LANES, plan.padded), f32)
        heads = pltpu.VMEM((G, T.queries, _LANES), q.dtype)
        turned = pltpu.VMEM((_LANES, T.queries), q.dtype)
        sums = pltpu.VMEM((_LANES, T.queries), f32)
        delta = pltpu.VMEM((G, T.queries), f32)
        scratch = [row, row, heads, heads, turned, turned, sums, delta]
    lanes = plan.parts * _LANES
    row_spec = pl.BlockSpec((1, plan.padded, lanes), lambda b, g, i, t, *_: (b, 0, g))
    grad = jax.ShapeDtypeStruct((plan.rows, plan.padded, plan.blocks * lanes), q.dtype)
    grads = _pallas_call(
        _backward_local if plan.local else _backward_global,
        "backward",
        plan,
        bounds,
        scale,
        rope,
        in_specs=[
            *_qkv_specs(plan),
            _query_spec(plan),
            _query_spec(plan),
            _stats_spec(plan, 2, blocked=False),
            _stats_spec(plan, G),
        ],
        out_specs=[row_spec] if plan.packed else [_query_spec(plan), row_spec, row_spec],
        out_shape=[grad] if plan.packed else [grad] * 3,
        scratch_shapes=scratch,
        vmem_bytes=generation.vmem_bytes,
        interpret=interpret,
    )(
        *_pack_qkv(plan, q, k, v),
        _pack(plan, out_BLHK),
        _pack(plan, d_out_BLHK),
        _edges(plan, bounds),
        _pack_lse(plan, lse_BHL),
    )
    if plan.packed:
        return grads[0][:, : plan.length].reshape(q.shape), None, None
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
    packed: bool  # q, k and v are one array

    @property
    def per_block(self) -> int:
        return _LANES // self.head_dim

    @property
    def parts(self) -> int:
        """The arrays of which a block of heads in q, and in dq, has 128 lanes each."""
        return 3 if self.packed else 1

    @property
    def blocks(self) -> int:
        return -(-self.heads // self.per_block)

    @property
    def query_tiles(self) -> int:
        return self.padded // self.tiles.queries


def _plan(q, bounds: Bounds, for_global: Tiles, for_local: Tiles) -> _Plan:
    B, L, K = *q.shape[:2], q.shape[-1]
    packed = len(q.shape) == 6
    H = q.shape[2] * q.shape[4] if packed else q.shape[2]
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
    tiles = Tiles(queries, unit_queries, keys, unit_keys)
    return _Plan(B, L, padded, H, K, local, reach, tiles, packed)


def _row_bytes(plan: _Plan, dtype) -> int:
    """VMEM for a row of a block of heads, with tables: two buffers of each array, float32 sums."""
    return plan.padded * _LANES * (2 * 2 * 4 + 2 * 3 * jnp.dtype(dtype).itemsize + 2 * 4)


def _rows(n: int, q):
    return pltpu.VMEM((n, _LANES), q.dtype)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pack(plan: _Plan, x_BLHK):
    """Reshapes [B, L, H, K] to [B, padded, blocks * 128]."""
    extra = plan.blocks * plan.per_block - plan.heads
    x_BLHK = jnp.pad(x_BLHK, ((0, 0), (0, plan.padded - plan.length), (0, extra), (0, 0)))
    return x_BLHK.reshape(plan.rows, plan.padded, plan.blocks * _LANES)


def _pack_qkv(plan: _Plan, q, k, v):
    if not plan.packed:
        return _pack(plan, q), _pack(plan, k), _pack(plan, v)
    q = q.reshape(plan.rows, plan.length, -1)
    q = jnp.pad(q, ((0, 0), (0, plan.padded - plan.length), (0, 0)))
    return q, q, q


def _unpack(plan: _Plan, x):
    x_BLHK = x.reshape(plan.rows, plan.padded, -1, plan.head_dim)
    return x_BLHK[:, : plan.length, : plan.heads]


def _edges(plan: _Plan, bounds: Bounds):
    """Stacks lo and hi as [B, 2, padded]; padded queries see nothing."""
    edges = jnp.stack([bounds.lo_BL, bounds.hi_BL], axis=1)
    return jnp.pad(edges, ((0, 0), (0, 0), (0, plan.padded - plan.length)))


def _pack_lse(plan: _Plan, lse_BHL):
    """Base-2 log-sum-exp, [B, blocks, G, padded]: +inf without keys, so that p is 0."""
    extra = plan.blocks * plan.per_block - plan.heads
    tail = ((0, 0), (0, extra), (0, plan.padded - plan.length))
    lse_BHL = jnp.pad(lse_BHL, tail, constant_values=-jnp.inf)
    lse_BHL = jnp.where(lse_BHL == -jnp.inf, jnp.inf, lse_BHL / _LN_2)
    return lse_BHL.reshape(plan.rows, plan.blocks, plan.per_block, plan.padded)


def _tables(plan: _Plan, rope: Rope):
    """The factors of each lane and of its partner in the other half of the head, [B, padded, 256].

    A partner's is minus the sine in the first half, and the sine in the second.
    """
    cos, sin = rope
    lanes = [cos, cos] * plan.per_block + [-sin, sin] * plan.per_block
    table = jnp.concatenate(lanes, axis=-1)
    return jnp.pad(table, ((0, 0), (0, plan.padded - plan.length), (0, 0)))


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


def _query_spec(plan: _Plan, parts: int = 1):
    return pl.BlockSpec((1, plan.tiles.queries, _LANES), lambda b, g, i, t, *_: (b, i, parts * g))


def _stats_spec(plan: _Plan, n: int, blocked: bool = True):
    if blocked:
        return pl.BlockSpec((1, 1, n, plan.tiles.queries), lambda b, g, i, t, *_: (b, g, 0, i))
    return pl.BlockSpec((1, n, plan.tiles.queries), lambda b, g, i, t, *_: (b, 0, i))


def _qkv_specs(plan: _Plan):
    keys, values = (1, 2) if plan.packed else (0, 0)
    return _query_spec(plan, plan.parts), _key_spec(plan, keys), _key_spec(plan, values)


def _key_spec(plan: _Plan, part: int):
    n = plan.query_tiles

    def span(b, g, i, t, first, *_):
        first_key = pl.multiple_of(first[b * n + i], _LANES // 2)
        return b, first_key, (plan.parts * g + part) * _LANES

    def tile(b, g, i, t, first, last, *_):
        j = b * n + i
        key_tile = jnp.maximum(jnp.minimum(first[j] + t, last[j] - 1), 0)
        return b, key_tile, plan.parts * g + part

    if plan.local:
        shape = (pl.Element(1), pl.Element(plan.tiles.keys), pl.Element(_LANES))
        return pl.BlockSpec(shape, span)
    return pl.BlockSpec((1, plan.tiles.keys, _LANES), tile)


def _pallas_call(
    kernel,
    name: str,
    plan: _Plan,
    bounds: Bounds,
    scale: float,
    rope: Rope | None,
    *,
    in_specs,
    out_specs,
    out_shape,
    scratch_shapes,
    vmem_bytes: int,
    interpret,
):
    scalars, steps = _scalars(plan, bounds)
    tables: list[jax.Array] = []
    body = functools.partial(kernel, plan=plan, scale=scale)
    if rope is None:
        kernel_with_table = body
        body = lambda *refs: kernel_with_table(*refs[:n], None, *refs[n:])  # noqa: E731
        n = len(scalars)
    else:
        tables = [_tables(plan, rope)]
        shared = tables[0].shape[0] == 1
        row = lambda b, g, i, t, *_: (0 if shared else b, 0, 0)  # noqa: E731
        in_specs = [pl.BlockSpec((1, plan.padded, 2 * _LANES), row), *in_specs]
    call = pl.pallas_call(
        body,
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
            vmem_limit_bytes=vmem_bytes * 7 // 8,
        ),
        cost_estimate=_cost(plan, name, out_shape),
        name=f"bounded_{name}_{'local' if plan.local else 'global'}",
        interpret=interpret,
    )
    return functools.partial(call, *scalars, *tables)


def _cost(plan: _Plan, name: str, out_shape) -> pl.CostEstimate:
    """What XLA schedules by, as if every row were one segment: the bounds are data."""
    seen = plan.tiles.unit_keys if plan.local else plan.padded
    scores = plan.rows * plan.blocks * plan.per_block * plan.padded * seen
    products, arrays = (2, 4) if name == "forward" else (5, 8)
    lanes = plan.rows * plan.padded * plan.blocks * _LANES
    return pl.CostEstimate(
        flops=2 * products * scores * plan.head_dim,
        transcendentals=scores,
        bytes_accessed=arrays * lanes * out_shape[0].dtype.itemsize,
    )


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


def _turn(x, table, plan: _Plan, back: bool = False):
    """Rotates x [n, 128] by the angles of a table [n, 256], or back; the identity without one."""
    if table is None:
        return x
    at = [jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), axis) for axis in (0, 1)]
    # One term per sum, so that the matrix unit swaps the halves of each head exactly.
    partner = _dot(x, ((at[0] ^ (plan.head_dim // 2)) == at[1]).astype(x.dtype), 1, 0)
    partner = partner * table[:, _LANES:]
    turned = x.astype(jnp.float32) * table[:, :_LANES]
    return (turned - partner if back else turned + partner).astype(x.dtype)


def _table_rows(table, first, n: int):
    return None if table is None else table[0, pl.ds(first, n), :]


def _excess(*arrays):
    """Returns 0 where all of the arrays are finite, and NaN elsewhere, in float32."""
    wide = [x.astype(jnp.float32) for x in arrays]
    return sum(x - x for x in wide)


def _isolated(x, excess):
    """Returns x, for scores that a mask follows, with NaN where `excess` has it; and x with 0."""
    clean = jnp.where(excess == 0, x.astype(jnp.float32), 0.0)
    return (clean + excess).astype(x.dtype), clean.astype(x.dtype)


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


def _prepare_keys(plan: _Plan, first_key, table, k, v, k_out, v_out, k_clean=None):
    """Rotates and isolates the keys and values of a span, some rows at a time (local layers)."""
    rows = _LANES // 2 if plan.tiles.keys % _LANES else _LANES
    for x in range(0, plan.tiles.keys, rows):
        at = slice(x, x + rows)
        k_at, v_at = k[0, at, :], v[0, at, :]
        k_at = _turn(k_at, _table_rows(table, pl.multiple_of(first_key + x, 64), rows), plan)
        poisoned, clean = _isolated(k_at, _excess(k_at, v_at))
        k_out[at, :] = poisoned
        if k_clean is not None:
            k_clean[at, :] = clean
        v_out[at, :] = _isolated(v_at, _excess(v_at))[1]


def _forward_local(
    first, some, table, q, k, v, edges, out, lse, q_turned, k_turned, v_clean,
    *, plan: _Plan, scale: float,
):  # fmt: skip
    c = scale / _LN_2
    i = pl.program_id(2)
    n = pl.program_id(0) * plan.query_tiles + i
    U = plan.tiles.unit_queries

    @pl.when(some[n] == 0)
    def _():
        out[...] = jnp.zeros_like(out)
        lse[...] = jnp.full_like(lse, -jnp.inf)

    @pl.when(some[n] != 0)
    def _():
        for x in range(0, plan.tiles.queries, U):
            table_rows = _table_rows(table, pl.multiple_of(i * plan.tiles.queries + x, _LANES), U)
            q_turned[x : x + U] = _turn(q[0, x : x + U, :], table_rows, plan)
        _prepare_keys(plan, first[n], table, k, v, k_turned, v_clean)

        def scores(head, queries):
            at, key = _unit_span(plan, i, queries.start, first[n])
            keys = pl.ds(at, plan.tiles.unit_keys)
            q_head = _one_head(q_turned[queries, :], head, plan.head_dim)
            return _scores(k_turned[keys, :], q_head, edges[0, :, queries], key), v_clean[keys, :]

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
    first, last, inner_lo, inner_hi, table, q, k, v, edges, out, lse,
    q_heads, sums, tops, totals,
    *, plan: _Plan, scale: float,
):  # fmt: skip
    c = scale / _LN_2
    i, step = pl.program_id(2), pl.program_id(3)
    n = pl.program_id(0) * plan.query_tiles + i
    tile = first[n] + step

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        tops[...] = jnp.full_like(tops, _FLOOR)
        totals[...] = jnp.zeros_like(totals)
        q_turned = _turn(q[0], _query_table(plan, table, i), plan)
        for head in range(plan.per_block):
            q_heads[head] = _one_head(q_turned, head, plan.head_dim)

    def visit(masked: bool):
        def some_keys(u, _):
            at = pl.multiple_of(u * plan.tiles.unit_keys, _LANES)
            first_key = pl.multiple_of(tile * plan.tiles.keys + at, _LANES)
            keys = pl.ds(at, plan.tiles.unit_keys)
            ks, vs = k[0, keys, :], v[0, keys, :]
            ks = _turn(ks, _table_rows(table, first_key, plan.tiles.unit_keys), plan)
            if masked:
                ks = _isolated(ks, _excess(ks, vs))[0]
                vs = _isolated(vs, _excess(vs))[1]
            vT = vs.T

            def scores(head, queries):
                mask = edges[0, :, queries] if masked else None
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


def _query_table(plan: _Plan, table, i):
    return _table_rows(table, pl.multiple_of(i * plan.tiles.queries, _LANES), plan.tiles.queries)


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


def _weights(s, dp, lse, delta, scale: float, dtype):
    """Returns p and the gradient of the scores, before the scale that dq and dk still need."""
    p = jnp.exp2(s * (scale / _LN_2) - lse)
    return p.astype(dtype), (p * (dp - delta)).astype(dtype)


def _delta(plan: _Plan, d_outT, outT):
    """The sum of d_out * out over each head [G, n], from the transposed [128, n]; 0 for NaN."""
    products = d_outT.astype(jnp.float32) * outT.astype(jnp.float32)
    heads = [products[_lanes_of(head, plan)] for head in range(plan.per_block)]
    delta = jnp.concatenate([jnp.sum(x, axis=0, keepdims=True) for x in heads], axis=0)
    return jnp.where(delta - delta == 0, delta, 0.0)


def _log_sum(lse, head: int, queries):
    """One head's log-sum-exp, [1, queries]; 0 for NaN, which the scores hold too."""
    row = lse[0, 0, head : head + 1, queries]
    return jnp.where(row == row, row, 0.0)


def _gradients(plan: _Plan, refs):
    """Views of dq [tile of queries, 128], dk and dv [row, 128] in one or three references."""
    if not plan.packed:
        return [ref.at[0] for ref in refs]
    (all_three,) = refs
    first = pl.multiple_of(pl.program_id(2) * plan.tiles.queries, _LANES)
    rows = [pl.ds(first, plan.tiles.queries), slice(None), slice(None)]
    return [all_three.at[0, at, pl.ds(x * _LANES, _LANES)] for x, at in enumerate(rows)]


def _start_row(dk_sum, dv_sum):
    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)


def _finish_row(plan: _Plan, table, dk, dv, dk_sum, dv_sum, scale):
    last_tile = pl.program_id(2) == pl.num_programs(2) - 1
    n = plan.tiles.queries

    @pl.when(last_tile & (pl.program_id(3) == pl.num_programs(3) - 1))
    def _():
        def some_rows(u, _):
            first = pl.multiple_of(u * n, _LANES)
            rows = pl.ds(first, n)
            read = (lambda x: x[rows, :]) if plan.local else (lambda x: x[:, rows].T)
            turned = (read(dk_sum) * scale).astype(dk.dtype)
            dk[rows, :] = _turn(turned, _table_rows(table, first, n), plan, back=True)
            dv[rows, :] = read(dv_sum).astype(dv.dtype)
            return 0

        _loop(plan.query_tiles, some_rows)


def _backward_local(
    first, some, table, q, k, v, out, d_out, edges, lse, *refs, plan: _Plan, scale: float
):
    *grads, dk_sum, dv_sum, q_turned, q_clean, d_out_clean, k_turned, k_clean, v_clean = refs
    dq, dk, dv = _gradients(plan, grads)
    i = pl.program_id(2)
    n = pl.program_id(0) * plan.query_tiles + i
    U = plan.tiles.unit_queries
    _start_row(dk_sum, dv_sum)

    def table_of(queries):
        first_row = pl.multiple_of(i * plan.tiles.queries + queries.start, _LANES)
        return _table_rows(table, first_row, U)

    @pl.when(some[n] == 0)
    def _():
        dq[...] = jnp.zeros(dq.shape, dq.dtype)

    @pl.when(some[n] != 0)
    def _():
        deltas = {}
        for x in range(0, plan.tiles.queries, U):
            at = slice(x, x + U)
            q_at, out_at, d_out_at = q[0, at, :], out[0, at, :], d_out[0, at, :]
            excess = _excess(q_at, out_at, d_out_at)
            q_at = _turn(q_at, table_of(at), plan)
            q_turned[at, :], q_clean[at, :] = _isolated(q_at, excess)
            d_out_clean[at, :] = _isolated(d_out_at, excess)[1]
            deltas[x] = _delta(plan, d_out_at.T, out_at.T)
        _prepare_keys(plan, first[n], table, k, v, k_turned, v_clean, k_clean)

        def products(head, queries):
            at, key = _unit_span(plan, i, queries.start, first[n])
            keys = pl.ds(at, plan.tiles.unit_keys)
            q_head = _one_head(q_turned[queries, :], head, plan.head_dim)
            d_out_head = _one_head(d_out_clean[queries, :], head, plan.head_dim)
            s_dp = _products(
                k_turned[keys, :], v_clean[keys, :], q_head, d_out_head, edges[0, :, queries], key
            )
            return *s_dp, keys, d_out_head, key

        def weights(head, queries, s, dp, *rest):
            delta = deltas[queries.start][head : head + 1]
            return *_weights(s, dp, _log_sum(lse, head, queries), delta, scale, k.dtype), *rest

        def add(head, queries, p, ds, keys, d_out_head, key):
            rows = pl.ds(key, plan.tiles.unit_keys)
            dv_sum[rows, :] += _dot(p, d_out_head, 1, 0)
            dk_sum[rows, :] += _dot(ds, _one_head(q_clean[queries, :], head, plan.head_dim), 1, 0)
            return (_dot(k_clean[keys, :].T[_lanes_of(head, plan)], ds, 1, 0),)

        units = _units(plan)
        dqT = [value[0] for value in _staggered(units, products, weights, add)]
        for x in range(0, len(units), plan.per_block):
            block = jnp.concatenate(dqT[x : x + plan.per_block], axis=0) * scale
            queries = units[x][1]
            dq[queries, :] = _turn(block.T.astype(dq.dtype), table_of(queries), plan, back=True)

    _finish_row(plan, table, dk, dv, dk_sum, dv_sum, scale)


def _backward_global(
    first, last, inner_lo, inner_hi, table, q, k, v, out, d_out, edges, lse, *refs,
    plan: _Plan, scale: float,
):  # fmt: skip
    *grads, dk_sum, dv_sum, q_heads, d_out_heads, qT, d_outT, dq_sum, delta = refs
    dq, dk, dv = _gradients(plan, grads)
    i, step = pl.program_id(2), pl.program_id(3)
    n = pl.program_id(0) * plan.query_tiles + i
    tile = first[n] + step
    _start_row(dk_sum, dv_sum)

    @pl.when(step == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        delta[...] = _delta(plan, d_out[0].T, out[0].T)
        excess = _excess(q[0], out[0], d_out[0])
        q_turned, q_clean = _isolated(_turn(q[0], _query_table(plan, table, i), plan), excess)
        d_out_clean = _isolated(d_out[0], excess)[1]
        qT[...], d_outT[...] = q_clean.T, d_out_clean.T
        for head in range(plan.per_block):
            q_heads[head] = _one_head(q_turned, head, plan.head_dim)
            d_out_heads[head] = _one_head(d_out_clean, head, plan.head_dim)

    def visit(masked: bool):
        def some_keys(u, _):
            at = pl.multiple_of(u * plan.tiles.unit_keys, _LANES)
            key = pl.multiple_of(tile * plan.tiles.keys + at, _LANES)
            keys, rows = pl.ds(at, plan.tiles.unit_keys), pl.ds(key, plan.tiles.unit_keys)
            ks, vs = k[0, keys, :], v[0, keys, :]
            ks = k_clean = _turn(ks, _table_rows(table, key, plan.tiles.unit_keys), plan)
            if masked:
                ks, k_clean = _isolated(ks, _excess(ks, vs))
                vs = _isolated(vs, _excess(vs))[1]
            kT = k_clean.T

            def products(head, queries):
                mask = edges[0, :, queries] if masked else None
                q_head, d_out_head = q_heads[head, queries, :], d_out_heads[head, queries, :]
                return _products(ks, vs, q_head, d_out_head, mask, key)

            def weights(head, queries, s, dp):
                delta_ = delta[head : head + 1, queries]
                return _weights(s, dp, _log_sum(lse, head, queries), delta_, scale, k.dtype)

            def add(head, queries, p, ds):
                lanes = _lanes_of(head, plan)
                dv_sum[lanes, rows] += _dot(d_outT[lanes, queries], p, 1, 1)
                dk_sum[lanes, rows] += _dot(qT[lanes, queries], ds, 1, 1)
                dq_sum[lanes, queries] += _dot(kT[lanes], ds, 1, 0)

            _staggered(_units(plan), products, weights, add)
            return 0

        _loop(plan.tiles.keys // plan.tiles.unit_keys, some_keys)

    _visit_if_any(plan, n, tile, last, inner_lo, inner_hi, visit)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        turned = (dq_sum[...] * scale).T.astype(dq.dtype)
        dq[...] = _turn(turned, _query_table(plan, table, i), plan, back=True)

    _finish_row(plan, table, dk, dv, dk_sum, dv_sum, scale)
