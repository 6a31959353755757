"""What libtpu schedules for our kernels and for JAX's splash attention: NOT a measurement.

No TPU is needed or used. libtpu compiles both for an absent chip and writes down the final
instruction bundles; this script counts them. A bundle is one issue cycle if nothing stalls; waiting
for memory, which a schedule does not show, comes on top, in both.

    python tests/benchmarks/tpu_static.py --json tests/benchmarks/results/tpu_static_v6e.json

One call is [1, length, heads, 64] in bfloat16. Its bundles are
steps x what every grid step runs + visited tiles x the arithmetic + what runs once a tile of
queries or once a row (initialise, write out). Splash skips by its static mask only, so segments
cost it the whole row. Its tiles are the best of the lists below, forward and backward each for
itself; the sum over partial dq that its fused backward leaves to XLA is not counted.
"""

import argparse
import atexit
import dataclasses
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

DUMP = tempfile.mkdtemp(prefix="tpu_static_")
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: E402
    splash_attention_kernel as splash,
    splash_attention_mask as splash_mask,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from modernbert_jax.attention import make_bounds, pallas_tpu  # noqa: E402

HEAD_DIM = 64
WINDOW = 64
# Of splash: queries, keys, keys of one softmax; whether dq is computed with dk and dv; whether k
# and v are held transposed in VMEM. Others that were tried and were worse: 512x512, 512x2048,
# 2048x2048 and 1024x1024 by 1024 (global), fused (local), q transposed too.
SPLASH_FORWARD = {
    "local": [(n, n, n, False, True) for n in (128, 256, 512)],
    "global": [(1024, n, 512, False, True) for n in (1024, 2048, 4096)],
}
SPLASH_BACKWARD = {
    "local": [(n, n, n, False, True) for n in (128, 256, 512)],
    "global": [
        (1024, 1024, 512, False, False),
        (1024, 1024, 512, True, False),
        (1024, 1024, 512, True, True),
        (1024, 2048, 512, True, False),
    ],
}
GOALS = {"local": 0.5, "global, 8 x 1024": 0.25, "global, lognormal": 0.45, "global, unpacked": 1.0}


# The dump


@dataclasses.dataclass
class Region:
    """Bundles that a branch can skip."""

    start: int
    end: int
    mxu: int
    spills: int
    stores: int
    iterated: int  # bundles of a loop inside
    mxu_capacity: int

    @property
    def bundles(self) -> int:
        return self.end - self.start


@dataclasses.dataclass
class Schedule:
    """A kernel's grid loop: what every step runs, and, in order, what a step may skip."""

    step: int
    regions: list[Region]

    def visits(self, n: int) -> list[Region]:
        """The n regions with most products; RoPE needs some before and after them."""
        most = sorted(self.regions, key=lambda region: region.mxu)[-n:]
        return [region for region in self.regions if region in most]

    def edges(self, n: int) -> list[Region]:
        """What is no visit, if n are."""
        return [region for region in self.regions if region not in self.visits(n)]


def read_schedule(final_bundles: Path) -> Schedule:
    """From `*-final_bundles.txt` and its table of unit use, which lie side by side."""
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", final_bundles.name)
    (use,) = final_bundles.parent.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
    head, rows = use.read_text().split("== UTILIZATION:\n")
    names = head.splitlines()[1].replace(" ", "").split(",")
    mxu_capacity = int(head.splitlines()[2].split()[names.index("MXU")])
    table = np.array([[int(n) for n in row.split()] for row in rows.splitlines() if row.strip()])
    column = {name: table[:, names.index(name)] for name in ("MXU", "VSTORE", "VSTORE:SPILL")}

    branches, labels, loops = {}, {}, []
    for line in final_bundles.read_text().splitlines():
        at = re.match(r"\s*(0x[0-9a-f]+|0)\s+(LB|PF|LH|PB|LE|CT)?\s*:", line)
        if not at:
            continue
        address = int(at[1], 16)
        if at[2] == "LB":
            loops.append(address)
        labels |= {
            int(label): address for label in re.findall(r"Start/End empty region (\d+)", line)
        }
        for label in re.findall(r"sbr\.rel \(!?%p\w+\) target = \$region(\d+)", line):
            branches[address] = int(label)
    # A branch to a label ahead may skip a region (four delay slots follow it); others close loops.
    ahead = [(a + 5, labels[label]) for a, label in branches.items() if label in labels]
    backs = sorted(a for a, label in branches.items() if label not in labels)
    loop_start, loop_end = loops[0], backs[-1]
    inner = list(zip(loops[1:], backs[:-1], strict=True))

    def region(start: int, end: int) -> Region:
        sums = {name: int(values[start:end].sum()) for name, values in column.items()}
        inside = sum(b - a for a, b in inner if start <= a and b <= end)
        stores, spills = sums["VSTORE"], sums["VSTORE:SPILL"]
        return Region(start, end, sums["MXU"], spills, stores, inside, mxu_capacity)

    found = [region(a, b) for a, b in sorted(ahead) if loop_start < a and b <= loop_end]
    # Branches around a copy's descriptor alone count to the step. A region around the arithmetic
    # and others is the guard of the whole step, and is always passed through.
    found = [r for r in found if r.mxu or r.stores > 8]

    def holds(outer: Region, r: Region) -> bool:
        return outer is not r and outer.start <= r.start and r.end <= outer.end

    found = [r for r in found if not any(holds(r, o) and o.mxu for o in found)]
    found = [r for r in found if not any(holds(o, r) for o in found)]
    return Schedule(loop_end - loop_start - sum(r.bundles for r in found), found)


def compile_and_read(mesh: Mesh, function, *arguments) -> dict[str, Schedule]:
    """The schedules of all kernels in `function`, by the kernel's name."""
    before = set(Path(DUMP).iterdir())
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(*a, sharding=sharding) for a in arguments]
    with jax.set_mesh(mesh):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    schedules = {}
    for path in set(Path(DUMP).iterdir()) - before:
        # "jvp_NAME_.1", "transpose_jvp_NAME__.1" or plain "NAME.1"
        name = re.search(r"((?:bounded|splash)_\w+?)_*\.\d+-\d+-final_bundles\.txt$", path.name)
        if name:
            schedules[name[1]] = read_schedule(path)
    for path in set(Path(DUMP).iterdir()) - before:
        path.unlink()  # tens of megabytes each
    return schedules


# Whole calls


@dataclasses.dataclass
class Call:
    """A kernel on one shape and layout."""

    kernel: str
    tile: str
    visit_bundles: list[int]  # without and with the mask where there are two
    mxu_share: float
    spills: int
    visits: float
    bundles: float


def mxu_share(region: Region) -> float:
    return region.mxu / (region.mxu_capacity * region.bundles)


def parts(name: str, schedule: Schedule, plan) -> tuple[int, int, list[int]]:
    """Bundles of our forward or backward, once a tile of queries, once a row, and of each visit."""
    kinds = 1 if plan.local else 2
    loops = 1 if plan.local else plan.tiles.keys // plan.tiles.unit_keys
    regions, around = schedule.visits(kinds), schedule.edges(kinds)
    assert loops == 1 or all(region.iterated for region in regions), schedule
    visits = [region.bundles + (loops - 1) * region.iterated for region in regions]
    if name == "forward":
        return sum(edge.bundles for edge in around), 0, visits
    # The backward clears dk and dv once a row, its longest run of stores, and writes them last, in
    # a loop over parts of a row that are as long as a tile of queries.
    *around, write = around
    clear = max(around, key=lambda edge: edge.stores)
    row = clear.bundles + write.bundles + (plan.query_tiles - 1) * write.iterated
    return sum(edge.bundles for edge in around if edge is not clear), row, visits


def our_call(name: str, schedule: Schedule, plan, segment_ids_BL, window) -> Call:
    """Mean over the rows of `segment_ids_BL`, in calls of one row.

    The grid of a call is as long as the longest walk among its rows: `train/plan/kernels.py`
    counts calls of several rows.
    """
    rows = segment_ids_BL.shape[0]
    scalars, steps = pallas_tpu._scalars(
        dataclasses.replace(plan, rows=rows), make_bounds(jnp.asarray(segment_ids_BL), window)
    )
    first, last = (np.asarray(x).reshape(rows, -1) for x in scalars[:2])
    if plan.local:
        visits_of = [last.sum()]
    else:
        lo, hi = (np.asarray(x).reshape(rows, -1)[..., None] for x in scalars[2:])
        tile = np.arange(plan.padded // plan.tiles.keys)
        visited = (first[..., None] <= tile) & (tile < last[..., None])
        whole = (lo <= tile * plan.tiles.keys) & ((tile + 1) * plan.tiles.keys <= hi)
        steps = (last - first).max(axis=1).mean()
        visits_of = [(visited & whole).sum(), (visited & ~whole).sum()]
    once_a_tile, once_a_row, costs = parts(name, schedule, plan)
    tiles = plan.query_tiles
    visits = [plan.blocks * v / rows for v in visits_of]
    bundles = plan.blocks * (tiles * steps * schedule.step + tiles * once_a_tile + once_a_row)
    bundles += sum(v * c for v, c in zip(visits, costs, strict=True))
    T = plan.tiles
    regions = schedule.visits(len(costs))
    region = regions[0]
    return Call(
        f"ours, {name}",
        f"{T.queries}x{T.keys} by {T.unit_queries}x{T.unit_keys}",
        costs,
        mxu_share(region),
        max(r.spills for r in regions),
        sum(visits),
        float(bundles),
    )


def splash_call(name: str, schedule: Schedule, tile, mask_info, heads: int, length: int) -> Call:
    (region,) = schedule.visits(1)
    if mask_info.block_mask is None:
        steps = visits = heads * (length // tile[0]) * (length // tile[1])
    else:
        mask = np.asarray(mask_info.block_mask)
        steps, visits = (heads // mask.shape[0] * n for n in (mask.size, (mask != 0).sum()))
    tiles = heads * length // (tile[1] if "dkv" in name else tile[0])
    bundles = steps * schedule.step + visits * region.bundles
    bundles += tiles * sum(edge.bundles for edge in schedule.edges(1))
    share = mxu_share(region)
    label = "x".join(str(n) for n in tile[:2]) + f" by {tile[2]}" + (" kT vT" if tile[4] else "")
    return Call(name, label, [region.bundles], share, region.spills, float(visits), float(bundles))


def both_passes(mesh: Mesh, heads: int, length: int, window: int | None):
    """Returns our schedules as training runs them: RoPE, and q, k and v in one array, the first."""
    J = pallas_tpu.heads_in_a_block(HEAD_DIM)
    qkv = ((1, length, heads // J, 3, J, HEAD_DIM), jnp.bfloat16)
    d_out = ((1, length, heads, HEAD_DIM), jnp.bfloat16)
    table = ((1, length, HEAD_DIM // 2), jnp.float32)

    def step(qkv, d_out, cos, sin, ids):
        bounds, rope = make_bounds(ids, window), (cos, sin)

        def run(qkv):
            return pallas_tpu.attention(qkv, None, None, bounds, scale=HEAD_DIM**-0.5, rope=rope)

        out, pull = jax.vjp(run, qkv)
        return out, pull(d_out)

    ids = ((1, length), jnp.int32)
    found = compile_and_read(mesh, step, qkv, d_out, table, table, ids)
    return jax.ShapeDtypeStruct(*qkv), found


def ours(mesh: Mesh, heads: int, length: int, window: int | None, layouts) -> dict[str, list[Call]]:
    """[forward, backward] by layout."""
    generation = pallas_tpu.GENERATIONS[mesh.devices.flat[0].device_kind]
    q, found = both_passes(mesh, heads, length, window)
    bounds = make_bounds(jnp.ones((1, length), jnp.int32), window)
    kind = "global" if window is None else "local"
    calls = {layout: [] for layout in layouts}
    for name in ("forward", "backward"):
        sizes = [getattr(generation, f"{name}_{k}") for k in ("global", "local")]
        plan = pallas_tpu._plan(q, bounds, *sizes)
        schedule = found[f"bounded_{name}_{kind}"]
        for layout, ids_BL in layouts.items():
            calls[layout].append(our_call(name, schedule, plan, ids_BL, window))
    return calls


def splash_at_its_best(mesh: Mesh, kind: str, heads: int, length: int) -> tuple[list[Call], list]:
    """The best forward and the best backward (one call, or dq and dkv), and all that were tried."""
    shape = (length, length)
    one = splash_mask.LocalMask(shape, (WINDOW, WINDOW), 0)
    one = one if kind == "local" else splash_mask.FullMask(shape)
    mask = splash_mask.MultiHeadMask([one] * heads)
    qkv = ((heads, length, HEAD_DIM), jnp.bfloat16)
    ids = ((length,), jnp.int32)

    def kernel(q, k, c, fused, transposed):
        layout = splash.QKVLayout.SEQ_MINOR if transposed else splash.QKVLayout.HEAD_DIM_MINOR
        sizes = splash.BlockSizes(
            block_q=q, block_kv=k, block_kv_compute=c,
            block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=c,
            block_q_dq=None if fused else q, block_kv_dq=None if fused else k,
            use_fused_bwd_kernel=fused, k_layout=layout, v_layout=layout,
        )  # fmt: skip
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    tried = []
    for tile in SPLASH_FORWARD[kind]:
        run = kernel(*tile)

        def forward(q, k, v, ids, run=run):
            return run(q, k, v, splash.SegmentIds(ids, ids))

        ((_, schedule),) = compile_and_read(mesh, forward, qkv, qkv, qkv, ids).items()
        info = run.fwd_mask_info
        tried.append([splash_call("splash, forward", schedule, tile, info, heads, length)])
    backwards = []
    for tile in SPLASH_BACKWARD[kind]:
        run = kernel(*tile)

        def both(q, k, v, ids, d_out, run=run):
            segments = splash.SegmentIds(ids, ids)
            out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segments), q, k, v)
            return out, pull(d_out)

        calls = []
        for name, schedule in compile_and_read(mesh, both, qkv, qkv, qkv, ids, qkv).items():
            part = re.search(r"_(dq|dkv)_", name)
            if part:
                info = getattr(run, f"{part[1]}_mask_info")
                label = f"splash, {'dq+dkv' if tile[3] else part[1]}"
                calls.append(splash_call(label, schedule, tile, info, heads, length))
        backwards.append(sorted(calls, key=lambda call: call.kernel))
    total = lambda calls: sum(call.bundles for call in calls)  # noqa: E731
    best = [*min(tried, key=total), *min(backwards, key=total)]
    return best, [call for calls in (*tried, *backwards) for call in calls]


# The report


def lognormal_rows(rows: int, length: int, mean: float, seed: int) -> np.ndarray:
    """Rows filled with lengths drawn one after the other; the last of a row is cut."""
    rng = np.random.default_rng(seed)
    ids_BL = np.zeros((rows, length), np.int32)
    for row in ids_BL:
        at, segment = 0, 1
        while at < length:
            n = max(1, round(rng.lognormal(np.log(mean) - 0.5, 1.0)))
            row[at : at + n] = segment
            at, segment = at + n, segment + 1
    return ids_BL


def squared_lengths(ids_BL: np.ndarray) -> float:
    """The sum of squared segment lengths of a row, as a share of L squared; mean over the rows."""
    squares = [sum(np.bincount(row[row > 0]).astype(float) ** 2) for row in ids_BL]
    return float(np.mean(squares)) / ids_BL.shape[1] ** 2


def line(call: Call) -> str:
    visit = "/".join(str(n) for n in call.visit_bundles)
    return (
        f"  {call.kernel:<16} {call.tile:<24} {visit:>11} {call.mxu_share:>5.0%} {call.spills:>7}"
        f" {call.visits:>9.1f} {call.bundles / 1e3:>10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v6e:2x2", help="as libtpu names it")
    parser.add_argument("--length", type=int, default=8192, help="tokens a row")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--ours-only", action="store_true", help="skip splash (minutes)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    L = args.length
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = Mesh(np.array(devices[:1]), ("device",))

    one = np.ones((1, L), np.int32)
    packed = {
        "global, 8 x 1024": np.arange(L)[None] // (L // 8) + 1,
        "global, lognormal": lognormal_rows(64, L, L / 8, seed=0),
        "global, unpacked": one,
    }
    calls = ours(mesh, args.heads, L, WINDOW, {"local": one})
    calls |= ours(mesh, args.heads, L, None, packed)
    splash_calls, tried = {}, []
    if not args.ours_only:
        for kind in ("local", "global"):
            splash_calls[kind], every = splash_at_its_best(mesh, kind, args.heads, L)
            tried += every

    print("A compiler's schedule, not a measurement: nothing ran, waiting for memory is not in it.")
    print(f"{devices[0].device_kind}, [1, {L}, {args.heads}, {HEAD_DIM}] bfloat16, jax", end=" ")
    print(f"{jax.__version__}; a visit is one tile of keys for one tile of queries: of one head in")
    print(f"splash, of {128 // HEAD_DIM} heads in ours (without/with mask).\n")
    print(f"  {'kernel':<16} {'tile':<24} {'bundles':>11} {'MXU':>5} {'spills':>7}", end="")
    print(f" {'visits':>9} {'kbundles':>10}\n  {'':<41} {'a visit':>11} {'':>23} {'a call':>10}")
    results = []
    for layout, mine in calls.items():
        share = squared_lengths(one if layout == "local" else packed[layout])
        theirs = splash_calls.get(layout.split(",")[0], [])
        print(f"{layout} (squared lengths {share:.3f} of L^2)")
        for call in (*mine, *theirs):
            print(line(call))
        entry = {"layout": layout, "squared_lengths": share, "goal": GOALS[layout]}
        entry["ours"] = [dataclasses.asdict(call) for call in mine]
        if theirs:
            pairs = {"forward": (mine[:1], theirs[:1]), "backward": (mine[1:], theirs[1:])}
            pairs["both"] = (mine, theirs)
            ratios = {
                name: sum(c.bundles for c in a) / sum(c.bundles for c in b)
                for name, (a, b) in pairs.items()
            }
            text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"  ours / splash: {text}; goal at most {GOALS[layout]}\n")
            entry["ratio"] = ratios
            entry["splash"] = [dataclasses.asdict(call) for call in theirs]
        results.append(entry)
    if args.json:
        report = {
            "what": "a compiler's static schedule, not a measurement",
            "command": "python tests/benchmarks/tpu_static.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "device_kind": devices[0].device_kind,
            "platform_version": getattr(devices[0].client, "platform_version", ""),
            "jax": jax.__version__,
            "shape": [1, L, args.heads, HEAD_DIM],
            "results": results,
            "splash_tried": [dataclasses.asdict(call) for call in tried],
        }
        args.json.write_text(json.dumps(report, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
