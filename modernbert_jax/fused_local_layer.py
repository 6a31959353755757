"""A local layer as one TPU kernel (Pallas, Mosaic), which reads x once and writes it once.

The layer's weights stay in VMEM, 10 MB of a base layer, while the grid walks over tiles of tokens,
of all rows one after the other. Only x comes and goes: 6 KB a token, where separate operations move
about 35. The backward kernel computes everything again from x, keeps the attention weights of a
tile in VMEM, and adds up the gradients of all weights there, in float32.

Bounds are counted from the first token of the first row, so that rows need no treatment of their
own: no query sees a key of another row. Keys and values of the 64 tokens on either side of a tile
(the halo) are computed with it. Their gradients are complete only after the next tile: each step of
the backward grid finishes the tokens from 64 before its tile to 64 before its end, carries the rest
in VMEM, and copies dx to HBM by itself.

Two heads of 64 lie side by side in a block of 128 lanes; the queries of both are stacked, with
zeros in the lanes of the other head, so that one product gives the scores of both. Scores are
transposed, keys by queries, as in attention.pallas_tpu.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec as P

from modernbert_jax.attention import Bounds
from modernbert_jax.attention.pallas_tpu import GENERATIONS
from modernbert_jax.dropout import hash_of_row, kept, seeds

# JAX's device_kind of chips with one core and 128 MiB of VMEM; a chip's second core would idle.
_KINDS = ("TPU v5 lite", "TPU v6 lite")
_LANES = 128
_HEAD_DIM = 64
_HALO = 64  # tokens on either side of a tile, and the widest window
_UNIT = 128  # queries of one softmax
_SPAN = _UNIT + 2 * _HALO  # their keys
_TILES = (512, 256)
_ROWS = 256  # tokens of one product
_COLUMNS = 256  # columns of one product, the width of a matrix unit
_FLOOR = -1e30  # finite, so that queries without keys never produce NaN
_C = _HEAD_DIM**-0.5 / math.log(2.0)  # of the scores, for exp2
_MIB = 2**20
_F32, _BF16 = jnp.float32, jnp.bfloat16


class _Weights(NamedTuple):
    """The weights of a layer as matrices, or their gradients; the norms' are [1, D]."""

    attn_norm: Any
    Wqkv: Any  # [D, 3D]
    attn_Wo: Any  # [D, D]
    mlp_norm: Any
    Wi: Any  # [D, 2F]
    mlp_Wo: Any  # [F, D]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The sizes of one call; static, hence hashable."""

    tokens: int  # of all rows
    length: int  # of one row
    tile: int
    D: int
    F: int
    eps: float
    rate: float  # of the dropout after attention
    vmem_bytes: int
    interpret: Any = False

    @property
    def tiles(self) -> int:
        return self.tokens // self.tile

    @property
    def extended(self) -> int:
        return self.tile + 2 * _HALO

    @property
    def pairs(self) -> int:
        return self.D // _LANES

    @property
    def weight_shapes(self) -> _Weights:
        D, F = self.D, self.F
        return _Weights((1, D), (D, 3 * D), (D, D), (1, D), (D, 2 * F), (F, D))


class FusedLocalLayers:
    """An attention function with which local layers run as one TPU kernel each.

    Pass it as the `attention=` of a model. attention: the function of the other layers, and of maps
    (output_attentions). mesh, rows: rows are split over these mesh axes; no other axis may be
    larger than 1. Inside `jax.shard_map` over some of the axes, rows are split over the others.
    interpret: passed to `pl.pallas_call`. Raises ValueError for a mesh with other axes, and when a
    layer is traced that the kernel does not support (`refusal` returns why).
    """

    def __init__(
        self,
        attention: Callable[..., jax.Array],
        mesh: Mesh | None = None,
        rows: str | tuple[str, ...] = (),
        *,
        interpret: Any = False,
    ):
        self.attention, self.mesh, self.interpret = attention, mesh, interpret
        self.rows = (rows,) if isinstance(rows, str) else tuple(rows)
        if hasattr(attention, "heads_in_a_block"):  # for the global layers, see `packed_heads`
            self.heads_in_a_block = attention.heads_in_a_block
        for axis, size in {} if mesh is None else dict(mesh.shape).items():
            if size > 1 and axis not in self.rows:
                raise ValueError(
                    f"fused_local_layers: expected a mesh that splits rows only ({self.rows}), got "
                    f"{axis}={size}"
                )

    def __call__(self, q_BLHK, k_BMHK, v_BMHK, bounds: Bounds, *, scale: float, rope=None):
        return self.attention(q_BLHK, k_BMHK, v_BMHK, bounds, scale=scale, rope=rope)

    def layer(self, layer: Any, x_BLD: jax.Array, rope, bounds: Bounds, dropout_key) -> jax.Array:
        """Computes `layer(x_BLD, ...)`, an EncoderLayer with a window.

        dropout_key: the key of the dropout after attention, or one for each row, or None.
        """
        config, mesh = layer.attn.config, self.mesh
        manual = jax.sharding.get_abstract_mesh().manual_axes
        rows = tuple(axis for axis in self.rows if axis not in manual)
        shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rows)
        B, L, D = x_BLD.shape
        if B % shards:
            raise ValueError(f"rows: expected a multiple of {shards}, got {B}")
        kind = _device_kind(self.mesh, self.interpret)
        reason = refusal(config, bounds, (B // shards, L), kind, training=dropout_key is not None)
        if reason is not None or not layer.has_attn_norm:
            raise ValueError(reason or "fused_local_layers: expected layer 0 to be global")
        rate = 0.0 if dropout_key is None else config.attention_out_dropout
        plan = _plan(config, (B // shards, L), GENERATIONS[kind].vmem_bytes)
        assert plan is not None
        plan = dataclasses.replace(plan, rate=rate, interpret=self.interpret)
        cos, sin = (jnp.broadcast_to(t, (B, L, _HEAD_DIM // 2)) for t in rope)
        table_BLR = jnp.concatenate([cos, sin, cos, sin], axis=-1)

        def run(weights, x_BLD, table_BLR, words, lo_BL, hi_BL):
            first_B1 = jnp.arange(x_BLD.shape[0], dtype=jnp.int32)[:, None] * L
            edges = jnp.stack([(lo_BL + first_B1).reshape(-1), (hi_BL + first_B1).reshape(-1)])
            x, table = x_BLD.reshape(-1, D), table_BLR.reshape(-1, _LANES)
            y: Any = _layer(plan, x, weights, edges, table, words)
            return y.reshape(x_BLD.shape)

        if mesh is not None:
            by_row = P(rows)
            run = jax.shard_map(
                run,
                mesh=None if manual else mesh,
                axis_names=set(mesh.axis_names) - set(manual),
                in_specs=(P(), by_row, by_row, by_row, by_row, by_row),
                out_specs=by_row,
                check_vma=False,
            )
        words = _dropout_words(dropout_key, B, L)
        return run(_matrices(layer, plan), x_BLD, table_BLR, words, bounds.lo_BL, bounds.hi_BL)


def refusal(
    config: Any, bounds: Bounds, shape: tuple[int, int], device_kind: str, *, training: bool
) -> str | None:
    """Returns None if the kernels support local layers of `config`, else the reason in one line.

    shape: the rows and tokens [B, L] of one device. device_kind: JAX's name. training: whether
    dropout is on.
    """
    name = "fused_local_layers"
    if device_kind not in _KINDS:
        return f"{name}: expected one of {', '.join(_KINDS)}, got {device_kind!r}"
    expected = {
        "dtype": "bfloat16",
        "head_dim": _HEAD_DIM,
        "hidden_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
    }
    if training:
        expected |= {"attention_dropout": 0.0, "mlp_dropout": 0.0}
    for key, value in expected.items():
        if (got := getattr(config, key)) != value:
            return f"{name}: expected {key}={value!r}, got {got!r}"
    for key, unit in (("hidden_size", _COLUMNS), ("intermediate_size", _LANES)):
        if getattr(config, key) % unit:
            return f"{name}: expected a multiple of {unit} for {key}, got {getattr(config, key)}"
    if bounds.window is None or not 0 <= bounds.window <= _HALO:
        return f"{name}: expected a window of at most {_HALO}, got {bounds.window}"
    if bounds.key_lo_BM is not None:
        return f"{name}: expected complete rows, got a part of them (mesh.sequence)"
    B, L = shape
    if L % _TILES[-1] or B * L < 2 * _TILES[-1]:
        return (
            f"{name}: expected rows of a multiple of {_TILES[-1]} tokens, at least "
            f"{2 * _TILES[-1]} in all, got {B} of {L}"
        )
    vmem_bytes = GENERATIONS[device_kind].vmem_bytes
    if _plan(config, shape, vmem_bytes) is None:
        return f"{name}: expected a layer whose gradients fit {vmem_bytes // _MIB} MiB of VMEM"
    return None


def _plan(config: Any, shape: tuple[int, int], vmem_bytes: int) -> _Plan | None:
    """Returns the plan with the largest tile that VMEM holds, without dropout."""
    B, L = shape
    D, F = config.hidden_size, config.intermediate_size
    for tile in _TILES:
        plan = _Plan(B * L, L, tile, D, F, config.norm_eps, 0.0, vmem_bytes)
        if L % tile == 0 and B * L >= 2 * tile and _backward_bytes(plan) <= vmem_bytes * 3 // 4:
            return plan
    return None


def _backward_bytes(plan: _Plan) -> int:
    """The VMEM that the backward kernel names; the compiler needs more for its temporaries."""
    weights = sum(math.prod(shape) for shape in plan.weight_shapes)
    scratch = [s for s in _scratch(plan, _F32) if hasattr(s, "shape")]
    named = sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)
    blocks = 2 * (2 * plan.tile + 2 * _HALO) * plan.D * 4
    return 6 * weights + named + blocks


def _device_kind(mesh: Mesh | None, interpret: Any) -> str:
    if interpret:
        return "TPU v6 lite"
    if mesh is not None:
        return mesh.devices.flat[0].device_kind
    abstract = jax.sharding.get_abstract_mesh().abstract_device  # of a mesh being traced for
    return jax.devices()[0].device_kind if abstract is None else abstract.device_kind


def _matrices(layer: Any, plan: _Plan) -> _Weights:
    parts: Any = (
        layer.attn_norm, layer.attn.Wqkv, layer.attn.Wo, layer.mlp_norm, layer.mlp.Wi, layer.mlp.Wo
    )  # fmt: skip
    arrays = [p.full_weight() if hasattr(p, "full_weight") else p.weight[...] for p in parts]
    pairs = zip(arrays, plan.weight_shapes, strict=True)
    return _Weights(*(array.reshape(shape) for array, shape in pairs))


def _dropout_words(key: jax.Array | None, rows: int, length: int) -> jax.Array:
    """Returns [B, 3]: the number of a row's first token within its key, then the key's seeds."""
    if key is None:
        return jnp.zeros((rows, 3), jnp.uint32)
    first = jnp.zeros(rows, jnp.uint32)
    if not key.ndim:  # one key for all rows
        first = jnp.arange(rows, dtype=jnp.uint32) * length
    both = (jnp.broadcast_to(x, (rows,)) for x in seeds(jax.random.key_data(key)))
    return jnp.stack([first, *both], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(plan: _Plan, x, weights: _Weights, edges, table, words):
    """Returns y [N, D]. x: [N, D]. edges: [2, N], over all rows. table: [N, 128]. words: [B, 3]."""
    return _forward(plan, x, _cast(weights), edges, table, words)


def _save(plan: _Plan, x, weights, edges, table, words):
    return _layer(plan, x, weights, edges, table, words), (x, weights, edges, table, words)


def _pull(plan: _Plan, saved, dy):
    x, weights, edges, table, words = saved
    dx, d_weights = _backward(plan, x, dy, _cast(weights), edges, table, words)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return dx, d_weights, None, None, None


_layer.defvjp(_save, _pull)


def _cast(weights: _Weights) -> _Weights:
    return _Weights(*(w.astype(_F32 if w.shape[0] == 1 else _BF16) for w in weights))


# Calls


def _resident(shape):
    return pl.BlockSpec(shape, lambda i, *_: (0, 0), pipeline_mode=pl.Buffered(1))


def _with_halos(plan: _Plan, width: int):
    """The block of a tile and those of the 64 tokens before and after it.

    At the ends of the array the halo is that of the tile itself: nobody sees it.
    """
    per, last = plan.tile // _HALO, plan.tokens // _HALO - 1
    return (
        pl.BlockSpec((_HALO, width), lambda i, *_: (jnp.maximum(i * per - 1, 0), 0)),
        pl.BlockSpec((plan.tile, width), lambda i, *_: (i, 0)),
        pl.BlockSpec((_HALO, width), lambda i, *_: (jnp.minimum((i + 1) * per, last), 0)),
    )


def _call(plan: _Plan, kernel, name: str, tiles, scratch, out_specs, out_shape, products: float):
    """tiles: the arrays besides x that are read tile by tile. products: of all tokens and weights,
    in units of the forward pass."""
    matrices = sum(math.prod(s) for s in plan.weight_shapes)
    x_bytes = plan.tokens * plan.D * 4
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(plan.tiles,),
        in_specs=[
            _with_halos(plan, plan.D),
            *[pl.BlockSpec((plan.tile, plan.D), lambda i, *_: (i, 0)) for _ in tiles],
            pl.BlockSpec((2, plan.tile), lambda i, *_: (0, i)),
            _with_halos(plan, _LANES),
            _Weights(*map(_resident, plan.weight_shapes)),
        ],
        out_specs=out_specs,
        scratch_shapes=[scratch],
    )
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid_spec=specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=plan.vmem_bytes * 15 // 16
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(products * 2 * plan.tokens * (matrices + 2 * _SPAN * plan.D)),
            transcendentals=plan.tokens * (plan.D // _HEAD_DIM * _SPAN + plan.F),
            bytes_accessed=int(x_bytes * (2 + len(tiles)) + 2 * products * matrices),
        ),
        name=name,
        interpret=plan.interpret,
    )


def _forward(plan: _Plan, x, weights: _Weights, edges, table, words):
    out = pl.BlockSpec((plan.tile, plan.D), lambda i, *_: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    scratch = _forward_scratch(plan)
    call = _call(plan, _forward_kernel, "local_layer_forward", (), scratch, out, shape, 1)
    return call(words, (x, x, x), edges, (table, table, table), weights)


def _backward(plan: _Plan, x, dy, weights: _Weights, edges, table, words):
    """Returns dx and the gradients of the weights, in float32."""
    shapes = plan.weight_shapes
    out_specs = (pl.BlockSpec(memory_space=pl.ANY), _Weights(*map(_resident, shapes)))
    out_shape = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        _Weights(*(jax.ShapeDtypeStruct(shape, _F32) for shape in shapes)),
    )
    scratch = _scratch(plan, x.dtype)
    call = _call(
        plan, _backward_kernel, "local_layer_backward", (dy,), scratch, out_specs, out_shape, 3
    )
    return call(words, (x, x, x), dy, edges, (table, table, table), weights)


class _Scratch(NamedTuple):
    """VMEM of both kernels. "extended" is the tile with its halos; gradients begin a halo early."""

    table: Any  # cos and sin, extended
    h: Any  # attn_norm(x), extended
    q: Any
    k: Any  # extended
    v: Any  # extended
    o: Any  # attention's output
    x2: Any  # x after attention
    h2: Any  # mlp_norm(x2)
    m: Any  # what mlp_Wo multiplies
    # Of the backward kernel.
    x: Any = None
    p: Any = None  # attention weights, [pairs of heads, units, keys, queries of both heads]
    dy: Any = None
    d_glu: Any = None
    dx2: Any = None
    da: Any = None  # the gradient of attn_Wo's output
    do: Any = None
    dk: Any = None  # sums, extended
    dv: Any = None  # sums, extended
    dqkv: Any = None
    dx: Any = None
    copied: Any = None


def _forward_scratch(plan: _Plan) -> _Scratch:
    T, E, D = plan.tile, plan.extended, plan.D
    V = pltpu.VMEM
    return _Scratch(
        V((E, 2 * _LANES), _F32), V((E, D), _BF16), V((T, D), _BF16), V((E, D), _BF16),
        V((E, D), _BF16), V((T, D), _BF16), V((T, D), _F32), V((T, D), _BF16),
        V((T, plan.F), _BF16),
    )  # fmt: skip


def _scratch(plan: _Plan, dtype) -> _Scratch:
    T, E, D = plan.tile, plan.extended, plan.D
    V, early = pltpu.VMEM, plan.tile + _HALO
    return _forward_scratch(plan)._replace(
        x=V((early, D), _F32),
        p=V((plan.pairs, T // _UNIT, _SPAN, 2 * _UNIT), _BF16),
        dy=V((T, D), _BF16),
        d_glu=V((T, 2 * plan.F), _BF16),
        dx2=V((early, D), _F32),
        da=V((T, D), _BF16),
        do=V((T, D), _BF16),
        dk=V((E, D), _F32),
        dv=V((E, D), _F32),
        dqkv=V((early, 3 * D), _BF16),
        dx=V((early, D), dtype),
        copied=pltpu.SemaphoreType.DMA,
    )


# Arithmetic


def _dot(a, b, contract_b: int = 0):
    return jax.lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), preferred_element_type=_F32)


def _rounded(a, b, contract_b: int = 0):
    """A product as XLA returns it, in bfloat16, for arithmetic in float32."""
    return _dot(a, b, contract_b).astype(_BF16).astype(_F32)


def _loop(count: int, body) -> None:
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: (body(i), 0)[1], 0)


def _at(i, size: int, start: int = 0):
    """Rows or columns start + i * size and the following."""
    first = start + i * size
    return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, _HALO), size)


def _lanes(i, start: int = 0):
    first = start + i * _LANES
    return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, _LANES), _LANES)


def _chunk(plan: _Plan) -> int:
    """Columns of Wi that are computed at once."""
    return next(c for c in (3 * _LANES, 2 * _LANES, _LANES) if plan.F % c == 0)


def _normalized(x, eps: float):
    """Returns x with mean 0 and variance 1 along the lanes, and the factor."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * factor, factor


def _norm(plan: _Plan, x, weight):
    return (_normalized(x.astype(_F32), plan.eps)[0] * weight[...]).astype(_BF16)


def _norm_backward(plan: _Plan, x, d_out, weight):
    """Returns the gradients of x and of the weight."""
    normal, factor = _normalized(x, plan.eps)
    d = d_out * weight[...]
    along = jnp.mean(d * normal, axis=-1, keepdims=True)
    dx = factor * (d - jnp.mean(d, axis=-1, keepdims=True) - normal * along)
    return dx, jnp.sum(d_out * normal, axis=0, keepdims=True)


def _lane_of_head():
    return jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) % _HEAD_DIM


def _rotated(x, table, sign: int = 1):
    """RoPE of two heads, x [n, 128] bfloat16, with [cos | signed sin]; sign=-1 is its transpose."""
    x, half = x.astype(_F32), _HEAD_DIM // 2
    swapped = jnp.where(
        _lane_of_head() < half, pltpu.roll(x, _LANES - half, 1), pltpu.roll(x, half, 1)
    )
    return (x * table[:, :_LANES] + sign * swapped * table[:, _LANES:]).astype(_BF16)


def _stacked(x):
    """[2n, 128] from the two heads of x [n, 128], each with zeros in the lanes of the other."""
    head = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1) // _HEAD_DIM
    return jnp.concatenate([jnp.where(head == n, x, jnp.zeros_like(x)) for n in (0, 1)], axis=0)


def _by_head(values, weights):
    """[queries, 128] from values [keys, 128] and the transposed weights of two heads."""
    vT = values.T
    first = _dot(vT[:_HEAD_DIM], weights[:, :_UNIT])
    return jnp.concatenate([first, _dot(vT[_HEAD_DIM:], weights[:, _UNIT:])], axis=0).T


def _staggered(plan: _Plan, *stages) -> None:
    """Runs stages[1](n, *stages[0](n)) and so on for all units n, each stage one unit behind.

    The compiler's scheduler stays near program order: this way the products of one unit overlap
    with the exponentials of its predecessor.
    """
    count = plan.tile // _UNIT
    values: list[Any] = [()] * count
    for time in range(count + len(stages) - 1):
        for lag, stage in enumerate(stages):
            if 0 <= time - lag < count:
                values[time - lag] = stage(time - lag, *values[time - lag])


def _kept(plan: _Plan, words, i, rows):
    """Which elements of these rows of tile i dropout keeps, [n, D]."""
    per_row = plan.length // plan.tile
    row = i // per_row
    first, *seeds = (words[row, n] for n in range(3))
    first = first + ((i % per_row) * plan.tile + rows.start).astype(jnp.uint32)
    index = first + jax.lax.broadcasted_iota(jnp.uint32, (rows.size, _LANES), 0)
    hashes = jnp.concatenate([hash_of_row(index, seeds)] * plan.pairs, axis=1)
    return kept(hashes, jax.lax.broadcasted_iota(jnp.uint32, hashes.shape, 1), plan.rate)


def _dropped(plan: _Plan, words, i, rows, x):
    """Inverted dropout of x, bfloat16 values in float32; dropout's division is by a bfloat16."""
    if not plan.rate:
        return x
    scale = 1.0 / float(np.asarray(1.0 - plan.rate, _BF16))
    return jnp.where(_kept(plan, words, i, rows), (x * scale).astype(_BF16).astype(_F32), 0.0)


# Stages of both kernels


def _project(plan: _Plan, x, table, w: _Weights, s: _Scratch) -> None:
    """h, q, k and v."""
    E, T = plan.extended, plan.tile
    before, tile, after = (slice(0, _HALO), slice(_HALO, _HALO + T), slice(_HALO + T, E))
    first_half = _lane_of_head() < _HEAD_DIM // 2
    for part, x_part, t_part in zip((before, tile, after), x, table, strict=True):
        t = t_part[...]
        swapped = pltpu.roll(t, _HEAD_DIM // 2, 1)
        s.table[part, :_LANES] = jnp.where(first_half, t, swapped)
        s.table[part, _LANES:] = jnp.where(first_half, -swapped, t)
        if part is not tile:
            s.h[part] = _norm(plan, x_part[...], w.attn_norm)

    def norm(i):
        s.h[_at(i, _ROWS, _HALO)] = _norm(plan, x[1][_at(i, _ROWS)], w.attn_norm)

    _loop(T // _ROWS, norm)

    def columns(j):
        for part, (rows, out) in enumerate(((tile, s.q), (slice(0, E), s.k), (slice(0, E), s.v))):
            y = _dot(s.h[rows], w.Wqkv[:, _at(j, _COLUMNS, part * plan.D)]).astype(_BF16)
            for n in range(_COLUMNS // _LANES):
                z = y[:, n * _LANES : (n + 1) * _LANES]
                z = _rotated(z, s.table[rows]) if out is not s.v else _finite(z)
                out[:, _lanes(j * (_COLUMNS // _LANES) + n)] = z

    _loop(plan.D // _COLUMNS, columns)


def _finite(v):
    """Zeros for NaN: a weight of 0 must hide the values of other documents. Keys stay NaN."""
    return jnp.where(v == v, v, jnp.zeros_like(v))


def _attend(plan: _Plan, edges, s: _Scratch) -> None:
    """o, and the attention weights for the backward pass."""
    first_key = pl.program_id(0) * plan.tile - _HALO

    def pair(g):
        lanes = _lanes(g)

        def scores(n):
            queries, keys = _at(n, _UNIT), pl.ds(n * _UNIT, _SPAN)
            y = _dot(s.k[keys, lanes], _stacked(s.q[queries, lanes]), 1)
            key = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) + (first_key + n * _UNIT)
            lo, hi = (
                jnp.concatenate([edges[row : row + 1, queries]] * 2, axis=1) for row in (0, 1)
            )
            return (jnp.where((lo <= key) & (key < hi), y, -jnp.inf),)

        def softmax(n, y):
            top = jnp.maximum(jnp.max(y, axis=0, keepdims=True), _FLOOR)
            p = jnp.exp2(y * _C - top * _C)
            total = jnp.sum(p, axis=0, keepdims=True)
            p = (p * jnp.where(total == 0, 0.0, 1.0 / total)).astype(_BF16)
            if s.p is not None:
                s.p[g, n] = p
            return (p,)

        def average(n, p):
            values = s.v[pl.ds(n * _UNIT, _SPAN), lanes]
            s.o[_at(n, _UNIT), lanes] = _by_head(values, p).astype(_BF16)

        _staggered(plan, scores, softmax, average)

    _loop(plan.pairs, pair)


def _add_attention(plan: _Plan, words, x, w: _Weights, s: _Scratch) -> None:
    """x2 and h2."""
    tile = pl.program_id(0)

    def body(i):
        rows = _at(i, _ROWS)
        a = _dropped(plan, words, tile, rows, _rounded(s.o[rows], w.attn_Wo[...]))
        x2 = x[rows].astype(_F32) + a
        s.x2[rows] = x2
        s.h2[rows] = _norm(plan, x2, w.mlp_norm)

    _loop(plan.tile // _ROWS, body)


def _gelu(gate):
    """Returns the exact GELU in bfloat16 and the normal distribution's function."""
    normal = 0.5 * (1.0 + jax.lax.erf(gate * 0.5**0.5))
    return (gate * normal).astype(_BF16), normal


def _forward_kernel(words, x, edges, table, w: _Weights, y, s: _Scratch, *, plan: _Plan):
    _project(plan, x, table, w, s)
    _attend(plan, edges, s)
    _add_attention(plan, words, x[1], w, s)
    C, F = _chunk(plan), plan.F

    def mlp(i):
        rows = _at(i, _ROWS)
        for c in range(0, F, C):
            gate = _rounded(s.h2[rows], w.Wi[:, c : c + C])
            up = _dot(s.h2[rows], w.Wi[:, F + c : F + c + C]).astype(_BF16)
            s.m[rows, c : c + C] = _gelu(gate)[0] * up
        y[rows] = (s.x2[rows] + _rounded(s.m[rows], w.mlp_Wo[...])).astype(y.dtype)

    _loop(plan.tile // _ROWS, mlp)


# Stages of the backward kernel


def _backward_kernel(
    words, x, dy, edges, table, w: _Weights, dx, d: _Weights, s: _Scratch, *, plan: _Plan
):
    T = plan.tile
    i = pl.program_id(0)
    _carry(plan, d, s)
    s.x[:_HALO] = x[0][...].astype(_F32)
    s.x[_HALO:] = x[1][...].astype(_F32)
    _project(plan, x, table, w, s)
    _attend(plan, edges, s)
    _add_attention(plan, words, x[1], w, s)
    _mlp_backward(plan, words, dy, w, d, s)
    tile = slice(0, T)
    _add_product(d.mlp_Wo, s.m, s.dy, tile)
    _add_product(d.Wi, s.h2, s.d_glu, tile)
    _add_product(d.attn_Wo, s.o, s.da, tile)
    _attend_backward(plan, s)
    pl.when(i > 0)(lambda: _each_copy(plan, dx, s, i - 1, "wait"))
    _finish(plan, tile, w, d, s)
    _each_copy(plan, dx, s, i, "start")

    @pl.when(i == plan.tiles - 1)
    def _():
        _finish(plan, slice(T, T + _HALO), w, d, s)
        tail = _copy(plan, dx, s, i, slice(T, T + _HALO))
        tail.start()
        _each_copy(plan, dx, s, i, "wait")
        tail.wait()


def _carry(plan: _Plan, d: _Weights, s: _Scratch) -> None:
    """Clears the sums, or moves to the front what the previous step left unfinished."""
    T = plan.tile
    first = pl.program_id(0) == 0

    @pl.when(first)
    def _():
        for ref in (*d, s.dk, s.dv):
            ref[...] = jnp.zeros_like(ref)
        s.dqkv[:_HALO] = jnp.zeros((_HALO, 3 * plan.D), _BF16)
        s.dx2[:_HALO] = jnp.zeros((_HALO, plan.D), _F32)

    @pl.when(~first)
    def _():
        for ref in (s.dk, s.dv):
            ref[: 2 * _HALO] = ref[T : T + 2 * _HALO]
            ref[2 * _HALO :] = jnp.zeros((T, plan.D), _F32)
        s.dqkv[:_HALO] = s.dqkv[T : T + _HALO]
        s.dx2[:_HALO] = s.dx2[T : T + _HALO]


def _copy(plan: _Plan, dx, s: _Scratch, i, rows: slice):
    """The copy of these rows of the gradient that step i has finished."""
    size = rows.stop - rows.start
    to = pl.ds(pl.multiple_of(i * plan.tile + rows.start - _HALO, _HALO), size)
    return pltpu.make_async_copy(s.dx.at[pl.ds(rows.start, size)], dx.at[to], s.copied)


def _each_copy(plan: _Plan, dx, s: _Scratch, i, action: str) -> None:
    """Starts or awaits the copies of step i; the first step has nothing before its tile."""
    getattr(_copy(plan, dx, s, i, slice(_HALO, plan.tile)), action)()
    pl.when(i > 0)(lambda: getattr(_copy(plan, dx, s, i, slice(0, _HALO)), action)())


def _mlp_backward(plan: _Plan, words, dy, w: _Weights, d: _Weights, s: _Scratch) -> None:
    """m, dy, d_glu, dx2, da and do, and the norm's gradient."""
    C, F = _chunk(plan), plan.F
    tile = pl.program_id(0)

    def body(i):
        rows = _at(i, _ROWS)
        s.dy[rows] = dy[rows].astype(_BF16)
        for c in range(0, F, C):
            gates, ups = slice(c, c + C), slice(F + c, F + c + C)
            gate = _rounded(s.h2[rows], w.Wi[:, gates])
            up = _dot(s.h2[rows], w.Wi[:, ups]).astype(_BF16)
            act, normal = _gelu(gate)
            s.m[rows, gates] = act * up
            dm = _dot(s.dy[rows], w.mlp_Wo[gates], 1).astype(_BF16)
            slope = normal + gate * jnp.exp(-0.5 * gate * gate) * (2 * math.pi) ** -0.5
            s.d_glu[rows, gates] = ((dm * up).astype(_F32) * slope).astype(_BF16)
            s.d_glu[rows, ups] = dm * act
        dh2 = _rounded(s.d_glu[rows], w.Wi[...], 1)
        dx2, d_norm = _norm_backward(plan, s.x2[rows], dh2, w.mlp_norm)
        d.mlp_norm[...] += d_norm
        dx2 = dx2 + dy[rows].astype(_F32)
        s.dx2[_at(i, _ROWS, _HALO)] = dx2
        da = _dropped(plan, words, tile, rows, dx2.astype(_BF16).astype(_F32)).astype(_BF16)
        s.da[rows] = da
        s.do[rows] = _dot(da, w.attn_Wo[...], 1).astype(_BF16)

    _loop(plan.tile // _ROWS, body)


def _add_product(out, a, b, rows: slice) -> None:
    """out += a^T b, summed over these rows of both."""
    aT = a[rows].T

    def columns(j):
        out[:, _at(j, _COLUMNS)] += _dot(aT, b[rows, _at(j, _COLUMNS)])

    _loop(out.shape[1] // _COLUMNS, columns)


def _attend_backward(plan: _Plan, s: _Scratch) -> None:
    """dq, and what the tile's queries add to dk and dv."""

    def pair(g):
        lanes = _lanes(g)

        def products(n):
            do = _stacked(s.do[_at(n, _UNIT), lanes])
            return _dot(s.v[pl.ds(n * _UNIT, _SPAN), lanes], do, 1), do

        def weights(n, dp, do):
            p = s.p[g, n].astype(_F32)
            pdp = p * dp
            return (pdp - p * jnp.sum(pdp, axis=0, keepdims=True)).astype(_BF16), do

        def add(n, ds, do):
            queries, keys = _at(n, _UNIT), pl.ds(n * _UNIT, _SPAN)
            s.dv[keys, lanes] += _dot(s.p[g, n], do)
            s.dk[keys, lanes] += _dot(ds, _stacked(s.q[queries, lanes]))
            dq = (_by_head(s.k[keys, lanes], ds) * _HEAD_DIM**-0.5).astype(_BF16)
            queries = _at(n, _UNIT, _HALO)
            s.dqkv[queries, lanes] = _rotated(dq, s.table[queries], -1)

        _staggered(plan, products, weights, add)

    _loop(plan.pairs, pair)


def _finish(plan: _Plan, rows: slice, w: _Weights, d: _Weights, s: _Scratch) -> None:
    """dx, and the gradients of Wqkv and the norm, for rows to which no later query adds."""

    def pair(g):
        dk = (s.dk[rows, _lanes(g)] * _HEAD_DIM**-0.5).astype(_BF16)
        s.dqkv[rows, _lanes(g, plan.D)] = _rotated(dk, s.table[rows], -1)
        s.dqkv[rows, _lanes(g, 2 * plan.D)] = s.dv[rows, _lanes(g)].astype(_BF16)

    _loop(plan.pairs, pair)
    _add_product(d.Wqkv, s.h, s.dqkv, rows)
    size = rows.stop - rows.start
    step = min(size, _ROWS)

    def body(i):
        part = _at(i, step, rows.start)
        dh = _rounded(s.dqkv[part], w.Wqkv[...], 1)
        dx, d_norm = _norm_backward(plan, s.x[part], dh, w.attn_norm)
        d.attn_norm[...] += d_norm
        s.dx[part] = (dx + s.dx2[part]).astype(s.dx.dtype)

    _loop(size // step, body)
