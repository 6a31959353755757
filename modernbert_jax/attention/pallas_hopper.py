"""Bounded attention for sm90 (H100, H200) in Mosaic GPU: TMA, wgmma, specialized warpgroups.

The three kernels share one design. A block of threads owns `groups` x 64 positions. Its last
warpgroup only copies the tiles within the bounds through TMA into a ring of shared memory, and the
others compute. Both loops run from the first to the last tile in bounds, so tiles out of bounds are
neither computed nor fetched. The schedule is FlashAttention-3's (arXiv:2407.08608) without its
ping-pong.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from modernbert_jax.attention.bounds import Bounds
from modernbert_jax.attention.gpu_tiles import (
    FLOOR,
    LN2,
    LOG2E,
    check_scale,
    is_narrow,
    pad_length,
    padded_length,
    softmax_residuals,
    tiled,
    visit,
)
from modernbert_jax.attention.vjp import Attention, only_where_seen, with_vjp

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")

_ROWS = 64  # positions per warpgroup, the height of a wgmma


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Computing warpgroups, positions streamed per step, and slots of the ring."""

    groups: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        """The number of positions that a block owns."""
        return self.groups * _ROWS


def supports(q_BLHK: jax.Array, bounds: Bounds, device: Any) -> str | None:
    """Returns None if `attention` supports this device and shape, else the reason in one line."""
    del bounds  # any interval is supported
    if device.platform not in ("gpu", "cuda"):
        return f"pallas_hopper: expected an NVIDIA GPU, got {device.platform}"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"pallas_hopper: expected compute capability 9.0 (H100, H200), got {capability}"
    return _refusal(q_BLHK)


def _checked(q_BLHK):
    if (reason := _refusal(q_BLHK)) is not None:
        raise ValueError(reason)
    return q_BLHK


def _refusal(q_BLHK) -> str | None:
    if q_BLHK.dtype.name not in DTYPES:
        return (
            f"pallas_hopper: expected {' or '.join(DTYPES)} (wgmma has no float32), "
            f"got {q_BLHK.dtype.name}"
        )
    if q_BLHK.shape[-1] not in HEAD_DIMS:
        return f"pallas_hopper: expected a head dim of 64 or 128, got {q_BLHK.shape[-1]}"
    return None


def forward_tiles(window: int | None, head_dim: int) -> Tiles:
    """Tiles of the forward and the dq kernel.

    A narrow window uses few keys of a wide tile, and waits more than it computes: with one
    computing group two blocks fit on a multiprocessor, so that one computes while the other waits.
    """
    if is_narrow(window):
        return Tiles(groups=1, columns=64, stages=3)
    return Tiles(groups=2, columns=128 if head_dim == 64 else 64, stages=3)


def dkv_tiles(window: int | None, head_dim: int) -> Tiles:
    """Tiles of the dk/dv kernel, which is limited by registers: it has two accumulators."""
    if head_dim == 128:
        return Tiles(groups=1, columns=64, stages=3)
    return Tiles(groups=2, columns=64 if is_narrow(window) else 128, stages=3)


def forward(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    bounds: Bounds,
    scale: float,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BLHK in q's dtype, lse_BHL in float32, -inf without keys)."""
    check_scale(scale)
    B, L, H, K = _checked(q_BLHK).shape
    tiles = forward_tiles(bounds.window, K)
    length = padded_length(L, tiles.rows, tiles.columns)
    mask = tiled(bounds, length, tiles.rows, tiles.columns)
    ranges_BT4 = mask.ranges_BT4
    if not is_narrow(bounds.window):  # the kernel computes a first tile before its loop
        ranges_BT4 = ranges_BT4.at[..., 3].max(ranges_BT4[..., 0] + 1)
    arrays = (q_BLHK, *only_where_seen(k_BMHK, v_BMHK))
    q, k, v = (pad_length(x, length) for x in arrays)
    out, lse = _launch(
        functools.partial(_forward_kernel, _Plan(tiles, bounds.window, scale, bool(interpret))),
        out_type=(_like(q), jax.ShapeDtypeStruct((B, H, length), jnp.float32)),
        scratch_types=dict(
            q_smem=_matrix(tiles.groups, _ROWS, q),
            lse_smem=_vector(tiles.groups, _ROWS),
            edges_smem=plgpu.SMEM((2, tiles.groups, _ROWS), jnp.int32),
            own_ready=plgpu.Barrier(num_arrivals=3, num_barriers=tiles.groups),
            rings=[_Ring.of(tiles, [_matrix(tiles.stages, tiles.columns, q)])] * 2,
        ),
        tiles=tiles,
        window=bounds.window,
        grid={"tile": length // tiles.rows, "head": H, "row": B},
        interpret=interpret,
    )(ranges_BT4, mask.lo_BL, mask.hi_BL, q, k, v)
    return out[:, :L], lse[:, :, :L]


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
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq, dk, dv): one kernel loops over tiles of queries, one over tiles of keys."""
    L, K = _checked(q_BLHK).shape[1::2]
    tiles_dq, tiles_dkv = forward_tiles(bounds.window, K), dkv_tiles(bounds.window, K)
    sizes = tiles_dq.rows, tiles_dq.columns, tiles_dkv.rows, tiles_dkv.columns
    length = padded_length(L, *sizes)
    d_out, lse, delta = softmax_residuals(out_BLHK, d_out_BLHK, lse_BHL, length)
    q, k, v = (pad_length(x, length) for x in (q_BLHK, k_BMHK, v_BMHK))
    dq = _dq(tiles_dq, bounds, scale, interpret, q, d_out, lse, delta, k, v)
    dk, dv = _dkv(tiles_dkv, bounds, scale, interpret, k, v, q, d_out, lse, delta)
    return dq[:, :L], dk[:, :L], dv[:, :L]


def _dq(tiles: Tiles, bounds: Bounds, scale, interpret, q, d_out, lse, delta, k, v):
    B, length, H, _ = q.shape
    mask = tiled(bounds, length, tiles.rows, tiles.columns)
    return _launch(
        functools.partial(_dq_kernel, _Plan(tiles, bounds.window, scale, bool(interpret))),
        out_type=_like(q),
        scratch_types=dict(
            own_smem=[_matrix(tiles.groups, _ROWS, q)] * 2,
            row_smem=[_vector(tiles.groups, _ROWS)] * 2,
            edges_smem=plgpu.SMEM((2, tiles.groups, _ROWS), jnp.int32),
            own_ready=plgpu.Barrier(num_arrivals=6, num_barriers=tiles.groups),
            rings=[_Ring.of(tiles, [_matrix(tiles.stages, tiles.columns, q)])] * 2,
        ),
        tiles=tiles,
        window=bounds.window,
        grid={"tile": length // tiles.rows, "head": H, "row": B},
        interpret=interpret,
    )(mask.ranges_BT4, mask.lo_BL, mask.hi_BL, q, d_out, lse, delta, k, v)


def _dkv(tiles: Tiles, bounds: Bounds, scale, interpret, k, v, q, d_out, lse, delta):
    B, length, H, _ = k.shape
    mask = tiled(bounds, length, tiles.rows, tiles.columns)
    streamed = [
        _matrix(tiles.stages, tiles.columns, q),
        _vector(tiles.stages, tiles.columns),
    ]
    return _launch(
        functools.partial(_dkv_kernel, _Plan(tiles, bounds.window, scale, bool(interpret))),
        out_type=(_like(k), _like(v)),
        scratch_types=dict(
            own_smem=[_matrix(tiles.groups, _ROWS, q)] * 2,
            edges_smem=plgpu.SMEM((2, tiles.groups, _ROWS), jnp.int32),
            own_ready=plgpu.Barrier(num_arrivals=4, num_barriers=tiles.groups),
            rings=[_Ring.of(tiles, streamed)] * 2,
        ),
        tiles=tiles,
        window=bounds.window,
        grid={"tile": length // tiles.rows, "head": H, "row": B},
        interpret=interpret,
    )(mask.ranges_BT4, mask.lo_BL, mask.hi_BL, k, v, q, d_out, lse, delta)


attention: Attention = with_vjp(forward, backward)


def _forward_kernel(
    plan,
    ranges_ref,
    lo_ref,
    hi_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    *,
    q_smem,
    lse_smem,
    edges_smem,
    own_ready,
    rings,
):
    block = _Block.here(plan, ranges_ref)
    k_ring, v_ring = rings

    @pl.when(block.copies)
    def _copy():
        _produce(block, [([k_ref], k_ring), ([v_ref], v_ring)])

    @pl.when(block.computes)
    def _compute():
        own_q = q_smem.at[block.group]
        own = [(q_ref, own_q)]
        edges = _load_own(block, own, lo_ref, hi_ref, edges_smem, own_ready)

        def softmax(s_RC, column, top_R, sum_R, masked):
            if masked:
                s_RC = jnp.where(_seen(s_RC, edges, column, block), s_RC, -jnp.inf)
            # The maximum is kept scaled and in base 2, for exp2 of one multiply-add an element.
            new_R = jnp.maximum(top_R, jnp.max(s_RC, axis=1) * (plan.scale * LOG2E))
            shrink_R = jnp.exp2(top_R - new_R)
            p_RC = jnp.exp2(s_RC * (plan.scale * LOG2E) - _across(new_R, s_RC.shape))
            sum_R = sum_R * shrink_R + jnp.sum(p_RC, axis=1)
            return p_RC.astype(q_ref.dtype), shrink_R, new_R, sum_R

        def scores(column):
            (k_CK,) = k_ring.wait(block.slot(column))
            (s_RC,) = _products((own_q, k_CK.T))
            k_ring.release(block.slot(column))
            return s_RC

        def add(column, acc_RK, p_RC):
            (v_CK,) = v_ring.wait(block.slot(column))
            (acc_RK,) = _accumulate(plan, (acc_RK, p_RC, v_CK))
            v_ring.release(block.slot(column))
            return acc_RK

        def in_turn(column, carry, masked):
            acc_RK, *carry = carry
            p_RC, shrink_R, *carry = softmax(scores(column), column, *carry, masked=masked)
            return add(column, acc_RK * _across(shrink_R, acc_RK.shape), p_RC), *carry

        def overlapped(column, carry, masked):
            # The tensor cores multiply the previous tile's probabilities with v meanwhile.
            acc_RK, before_RC, *carry = carry
            (k_CK,) = k_ring.wait(block.slot(column))
            (v_CK,) = v_ring.wait(block.slot(column - 1))

            def meanwhile(s_RC):
                k_ring.release(block.slot(column))
                return softmax(s_RC, column, *carry, masked=masked)

            (p_RC, shrink_R, *carry), acc_RK = _overlapped(
                plan, (own_q, k_CK.T), meanwhile, (acc_RK, before_RC, v_CK)
            )
            v_ring.release(block.slot(column - 1))
            return acc_RK * _across(shrink_R, acc_RK.shape), p_RC, *carry

        acc_RK = jnp.zeros(own_q.shape, jnp.float32)
        carry = jnp.full((_ROWS,), FLOOR, jnp.float32), jnp.zeros((_ROWS,), jnp.float32)
        if is_narrow(plan.window):  # the second block on the multiprocessor overlaps with this one
            acc_RK, top_R, sum_R = visit(block.ranges, plan.window, in_turn, (acc_RK, *carry))
        else:
            first, *_, end = block.ranges
            p_RC, _, *carry = softmax(scores(first), first, *carry, masked=True)
            rest = [jnp.maximum(i, first + 1) for i in block.ranges]
            start = acc_RK, p_RC, *carry
            acc_RK, p_RC, top_R, sum_R = visit(rest, plan.window, overlapped, start)
            acc_RK = add(end - 1, acc_RK, p_RC)
        some_R = sum_R != 0  # NaN is some, too
        sum_R = jnp.where(some_R, sum_R, 1.0)
        own_lse = lse_smem.at[block.group]
        own_q[...] = (acc_RK * _across(1.0 / sum_R, acc_RK.shape)).astype(q_ref.dtype)
        own_lse[...] = jnp.where(some_R, top_R * LN2 + jnp.log(sum_R), -jnp.inf)
        _store_own(block, [(own_q, out_ref), (own_lse, lse_ref)])


def _dq_kernel(
    plan,
    ranges_ref,
    lo_ref,
    hi_ref,
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    k_ref,
    v_ref,
    dq_ref,
    *,
    own_smem,
    row_smem,
    edges_smem,
    own_ready,
    rings,
):
    block = _Block.here(plan, ranges_ref)
    k_ring, v_ring = rings

    @pl.when(block.copies)
    def _copy():
        _produce(block, [([k_ref], k_ring), ([v_ref], v_ring)])

    @pl.when(block.computes)
    def _compute():
        own_q, own_d_out = (ref.at[block.group] for ref in own_smem)
        own_lse, own_delta = (ref.at[block.group] for ref in row_smem)
        own = [(q_ref, own_q), (d_out_ref, own_d_out), (lse_ref, own_lse), (delta_ref, own_delta)]
        edges = _load_own(block, own, lo_ref, hi_ref, edges_smem, own_ready)
        lse_R, delta_R = own_lse[...], own_delta[...]

        def step(column, dq_RK, masked):
            slot = block.slot(column)
            (k_CK,) = k_ring.wait(slot)
            (v_CK,) = v_ring.wait(slot)
            s_RC, dp_RC = _products((own_q, k_CK.T), (own_d_out, v_CK.T))
            v_ring.release(slot)
            p_RC = jnp.exp2(s_RC * (plan.scale * LOG2E) - _across(lse_R, s_RC.shape))
            ds_RC = p_RC * (dp_RC - _across(delta_R, p_RC.shape))
            if masked:
                ds_RC = jnp.where(_seen(s_RC, edges, column, block), ds_RC, 0.0)
            (dq_RK,) = _accumulate(plan, (dq_RK, ds_RC.astype(q_ref.dtype), k_CK))
            k_ring.release(slot)
            return dq_RK

        zeros = jnp.zeros(own_q.shape, jnp.float32)
        dq_RK = visit(block.ranges, plan.window, step, zeros)
        own_q[...] = (dq_RK * plan.scale).astype(q_ref.dtype)
        _store_own(block, [(own_q, dq_ref)])


def _dkv_kernel(
    plan,
    ranges_ref,
    lo_ref,
    hi_ref,
    k_ref,
    v_ref,
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    own_smem,
    edges_smem,
    own_ready,
    rings,
):
    # Rows are keys here and columns queries; the bounds of a key are the queries that see it.
    block = _Block.here(plan, ranges_ref)
    q_ring, d_out_ring = rings

    @pl.when(block.copies)
    def _copy():
        _produce(block, [([q_ref, lse_ref], q_ring), ([d_out_ref, delta_ref], d_out_ring)])

    @pl.when(block.computes)
    def _compute():
        own_k, own_v = (ref.at[block.group] for ref in own_smem)
        own = [(k_ref, own_k), (v_ref, own_v)]
        edges = _load_own(block, own, lo_ref, hi_ref, edges_smem, own_ready)

        def step(column, carry, masked):
            dk_RK, dv_RK = carry
            slot = block.slot(column)
            q_CK, lse_C = q_ring.wait(slot)
            d_out_CK, delta_C = d_out_ring.wait(slot)
            s_RC, dp_RC = _products((own_k, q_CK.T), (own_v, d_out_CK.T))
            p_RC = jnp.exp2(s_RC * (plan.scale * LOG2E) - _down(lse_C[...], s_RC.shape))
            ds_RC = p_RC * (dp_RC - _down(delta_C[...], p_RC.shape))
            if masked:
                seen_RC = _seen(s_RC, edges, column, block)
                p_RC, ds_RC = jnp.where(seen_RC, p_RC, 0.0), jnp.where(seen_RC, ds_RC, 0.0)
            plgpu.commit_smem()  # lse and delta were read by plain loads: order them before TMA
            dv_RK, dk_RK = _accumulate(
                plan,
                (dv_RK, p_RC.astype(k_ref.dtype), d_out_CK),
                (dk_RK, ds_RC.astype(k_ref.dtype), q_CK),
            )
            d_out_ring.release(slot)
            q_ring.release(slot)
            return dk_RK, dv_RK

        zeros = jnp.zeros(own_k.shape, jnp.float32)
        dk_RK, dv_RK = visit(block.ranges, plan.window, step, (zeros, zeros))
        own_k[...] = (dk_RK * plan.scale).astype(k_ref.dtype)
        own_v[...] = dv_RK.astype(k_ref.dtype)
        _store_own(block, [(own_k, dk_ref), (own_v, dv_ref)])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static parameters of a kernel."""

    tiles: Tiles
    window: int | None
    scale: float
    interpreted: bool


@dataclasses.dataclass(frozen=True)
class _Block:
    """The position of a block of threads and the column tiles it visits (`Tiled.ranges_BT4`)."""

    plan: _Plan
    row: jax.Array
    head: jax.Array
    tile: jax.Array
    group: jax.Array
    ranges: tuple[jax.Array, ...]

    @classmethod
    def here(cls, plan, ranges_ref):
        row, head, tile, group = (lax.axis_index(n) for n in ("row", "head", "tile", "group"))
        ranges = tuple(ranges_ref[row, tile, i] for i in range(4))
        return cls(plan, row, head, tile, group, ranges)

    @property
    def computes(self):
        return self.group < self.plan.tiles.groups

    @property
    def copies(self):
        return self.group == self.plan.tiles.groups

    def slot(self, column):
        return lax.rem(column - self.ranges[0], jnp.int32(self.plan.tiles.stages))

    def at(self, ref, start, size):
        """Positions of this block's head in a [B, L, H, K] or a [B, H, L] array."""
        here = pl.ds(start, size)
        return (
            ref.at[self.row, here, self.head]
            if ref.ndim == 4
            else ref.at[self.row, self.head, here]
        )

    def own(self, ref):
        return self.at(ref, self.own_start, _ROWS)

    @property
    def own_start(self):
        """The first position of this warpgroup."""
        return self.tile * self.plan.tiles.rows + self.group * _ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ring:
    """Slots of shared memory, each with one barrier for "filled" and one for "free"."""

    buffers: list
    filled: Any
    free: Any

    @classmethod
    def of(cls, tiles: Tiles, buffers: list):
        filled = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=tiles.stages)
        free = plgpu.Barrier(num_arrivals=tiles.groups, num_barriers=tiles.stages)
        return cls(buffers, filled, free)

    def wait(self, slot):
        """Waits until the slot is filled and returns its buffers."""
        plgpu.barrier_wait(self.filled.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, slot):
        plgpu.barrier_arrive(self.free.at[slot])


def _produce(block, sources):
    """The copying warpgroup: fills a slot once every computing warpgroup has released it."""
    tiles = block.plan.tiles
    if tiles.groups > 1:
        plgpu.set_max_registers(24, action="decrease")

    def fill(column, _):
        slot = block.slot(column)
        for refs, ring in sources:

            @pl.when(column - block.ranges[0] >= tiles.stages)
            def _wait(ring=ring):
                plgpu.barrier_wait(ring.free.at[slot])

            for ref, buffer in zip(refs, ring.buffers, strict=True):
                source = block.at(ref, column * tiles.columns, tiles.columns)
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], ring.filled.at[slot])

    lax.fori_loop(block.ranges[0], block.ranges[3], fill, None)


def _load_own(block, pairs, lo_ref, hi_ref, edges_smem, ready):
    """Copies a computing warpgroup's rows to shared memory; returns their bounds (lo, hi)."""
    if block.plan.tiles.groups > 1:
        plgpu.set_max_registers(240, action="increase")
    ready = ready.at[block.group]
    edges = [edges_smem.at[i, block.group] for i in range(2)]
    here = pl.ds(block.own_start, _ROWS)
    for ref, smem in zip((lo_ref, hi_ref), edges, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[block.row, here], smem, ready)
    for ref, smem in pairs:
        plgpu.copy_gmem_to_smem(block.own(ref), smem, ready)
    plgpu.barrier_wait(ready)
    return [smem[...] for smem in edges]


def _store_own(block, pairs):
    plgpu.commit_smem()
    for smem, ref in pairs:
        plgpu.copy_smem_to_gmem(smem, block.own(ref))
    plgpu.wait_smem_to_gmem(0)


def _products(*pairs):
    """Computes a @ b of each pair with b in shared memory, accumulated in float32.

    The tensor cores get all products before the first is waited for.
    """

    def multiply(*sums):
        for sum_ref, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(sum_ref, a, b)
        return tuple(sum_ref[...] for sum_ref in sums)

    sums = [plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(multiply, *sums)


def _accumulate(plan, *terms) -> Any:
    """Computes sum + a @ b of each (sum, a, b) with `a` in registers; the tensor cores add.

    They get all products before the first is waited for.
    """
    if plan.interpreted:
        # JAX's interpreter knows wgmma on shared memory only.
        ends = tuple(
            sum_RK + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            for sum_RK, a, b in terms
        )
        plgpu.commit_smem()  # wgmma would have read b through the proxy that TMA writes through
        return ends

    def multiply(sums):
        for sum_ref, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(sum_ref, a, b)

    start = tuple(plgpu.WGMMAAccumulatorRef.init(sum_RK) for sum_RK, _, _ in terms)
    return pl.run_state(multiply)(start)


def _overlapped(plan, product, meanwhile, term) -> Any:
    """Returns (meanwhile(a @ b), sum + c @ d) for product (a, b) and term (sum, c, d).

    The tensor cores get both products, and `meanwhile` is computed once the first is done.
    """
    if plan.interpreted:
        return meanwhile(*_products(product)), *_accumulate(plan, term)
    (a, b), (sum_RK, c, d) = product, term
    product_RC = jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), jnp.float32)

    def run(refs):
        sum_ref, found_refs = refs

        def with_product(product_ref):
            plgpu.wgmma(product_ref, a, b)
            plgpu.wgmma(sum_ref, c, d)
            return meanwhile(plgpu.wgmma_accumulator_load(product_ref, wait_n=1))

        accumulator = plgpu.WGMMAAccumulatorRef(product_RC.shape, jnp.float32)
        found = pl.run_scoped(with_product, accumulator)
        for ref, x in zip(found_refs, found, strict=True):
            ref[...] = x

    # Values leave `run` through references, which need a start.
    zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(meanwhile, product_RC)]
    start: Any = plgpu.WGMMAAccumulatorRef.init(sum_RK), zeros
    sum_RK, found = pl.run_state(run)(start)
    return found, sum_RK


def _seen(s_RC, edges, column, block):
    """Whether the column is within the bounds of the row."""
    lo_R, hi_R = edges
    column_RC = lax.broadcasted_iota(jnp.int32, s_RC.shape, 1) + column * block.plan.tiles.columns
    return (_across(lo_R, s_RC.shape) <= column_RC) & (column_RC < _across(hi_R, s_RC.shape))


def _across(x_R, shape):
    return lax.broadcast_in_dim(x_R, shape, [0])


def _down(x_C, shape):
    return lax.broadcast_in_dim(x_C, shape, [1])


def _matrix(slots: int, rows: int, like):
    """`slots` matrices in shared memory, in the layout that TMA writes and wgmma reads."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((slots, rows, like.shape[-1]), like.dtype, transforms=transforms)


def _vector(slots: int, rows: int):
    return plgpu.SMEM((slots, rows), jnp.float32)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _launch(kernel, *, tiles: Tiles, window: int | None, grid: dict[str, int], **arguments):
    # Mosaic GPU launches along the last axis first. Blocks that run together should be tiles of few
    # heads in a global layer, which all read the keys and values of their head: these stay in the
    # L2 cache. A local layer reads only nearby ones, and all heads of a token are adjacent.
    names = ("tile", "head", "row") if is_narrow(window) else ("row", "head", "tile")
    # The default semantics differ between versions: written out.
    params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )
    return plgpu.kernel(
        kernel,
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        num_threads=tiles.groups + 1,
        thread_name="group",
        compiler_params=params,
        **arguments,
    )
