"""The cycles of the TPU attention kernels on a batch of documents.

XLA does not know what a Pallas kernel costs: it repeats the estimate that the kernel gives it. The
cycles here are bundles, issue cycles of the schedule that libtpu makes of a kernel, of which
`kernels.json` has those of each part: `python -m tests.benchmarks.kernel_table` writes the file.
What a call runs of each part follows from the documents. Stalls are not in a schedule.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_jax import ModernBertConfig, attention

TABLE = Path(__file__).with_name("kernels.json")
SOURCE = Path(attention.__file__).with_name("pallas_tpu.py")
LANES = 128


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bundles of a kernel's parts, for one block of 128 lanes of heads.

    queries, keys: tokens in a tile. step: what each step of the grid runs. tile: once for a tile of
    queries. row: once for a sequence of `row_tokens`. visits: a tile of keys for a tile of queries;
    of a global layer without and with the mask.
    """

    queries: int
    keys: int
    step: int
    tile: int
    row: int
    row_tokens: int
    visits: tuple[int, ...]


def source_digest() -> str:
    """Identifies the kernels that the table describes."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def costs(device_kind: str, kernel: str) -> Costs:
    """Raises ValueError in one line for a kernel that is not in the table, or not as it is now."""
    if _table()["digest"] != source_digest():
        raise ValueError(
            f"{TABLE.name} describes other kernels than {SOURCE.name}; renew it with "
            "`python -m tests.benchmarks.kernel_table`"
        )
    found = _table()["devices"].get(device_kind, {}).get(kernel)
    if found is None:
        raise ValueError(f"{TABLE.name} has no kernel {kernel} for {device_kind}")
    return Costs(**{**found, "visits": tuple(found["visits"])})


# Bundles a token of modernbert_jax.fused_local_layer's kernels for a base layer, in tiles of 512.
LOCAL_LAYER = {
    "TPU v5 lite": {"local_layer_forward": 100.3, "local_layer_backward": 275.1},
    "TPU v6 lite": {"local_layer_forward": 46.9, "local_layer_backward": 124.6},
}


def local_layer_cycles(
    device_kind: str, kernel: str, model: ModernBertConfig, tokens: int
) -> float:
    """Returns the cycles of one call; raises ValueError in one line for other sizes than base."""
    found = LOCAL_LAYER.get(device_kind, {}).get(kernel)
    if found is None or (model.hidden_size, model.intermediate_size) != (768, 1152):
        raise ValueError(f"the cycles of {kernel} are known only for base on v5e and v6e")
    return found * tokens


def call_cycles(costs: Costs, segment_ids_BL: np.ndarray, rows: int, blocks: int) -> float:
    """Returns the cycles of one call on `rows` sequences: the mean over those in segment_ids_BL.

    blocks: of 128 lanes of heads. A global layer walks as many steps for each tile of queries as
    the longest walk of its call needs.
    """
    length = segment_ids_BL.shape[1]
    tiles = -(-length // costs.queries)
    steps_B, visits_B2 = np.ones(len(segment_ids_BL)), np.full((len(segment_ids_BL), 1), tiles)
    if len(costs.visits) > 1:
        steps_B, visits_B2 = _walks(costs, segment_ids_BL)
    calls = [steps_B[at : at + rows].max() for at in range(0, len(steps_B), rows)]
    per_row = tiles * (np.mean(calls) * costs.step + costs.tile)
    per_row += costs.row * length / costs.row_tokens
    per_row += (visits_B2 @ np.asarray(costs.visits)).mean()
    return float(rows * blocks * per_row)


def _walks(costs: Costs, segment_ids_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a global layer: the steps of a sequence's longest walk, and its visits without and with
    the mask."""
    B, length = segment_ids_BL.shape
    last = np.ones((B, length), bool)  # of its segment
    last[:, :-1] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    position = np.arange(length)
    end = np.minimum.accumulate(np.where(last, position + 1, length)[:, ::-1], axis=1)[:, ::-1]
    first = np.roll(last, 1, axis=1)
    start = np.maximum.accumulate(np.where(first, position, 0), axis=1)
    starts = range(0, length, costs.queries)
    lo, inner_lo = (f.reduceat(start, starts, axis=1) for f in (np.minimum, np.maximum))
    hi, inner_hi = (f.reduceat(end, starts, axis=1) for f in (np.maximum, np.minimum))
    key = np.arange(0, length, costs.keys)
    visited = (key + costs.keys > lo[..., None]) & (key < hi[..., None])
    whole = (inner_lo[..., None] <= key) & (key + costs.keys <= inner_hi[..., None]) & visited
    steps = visited.sum(axis=2).max(axis=1)
    counts = [(part).sum(axis=(1, 2)) for part in (whole, visited & ~whole)]
    return steps, np.stack(counts, axis=1)


def packed_documents(rows: int, length: int, mean: int, lengths: str, seed: int = 0) -> np.ndarray:
    """Returns segment ids [rows, length] of full sequences; the last document of each is cut.

    lengths: "equal", all of `mean` tokens, or "lognormal", with this mean and sigma 1.
    """
    rng = np.random.default_rng(seed)
    ids_BL = np.zeros((rows, length), np.int32)
    for row in ids_BL:
        at, segment = 0, 1
        while at < length:
            n = mean
            if lengths == "lognormal":
                n = max(1, round(rng.lognormal(np.log(mean) - 0.5, 1.0)))
            row[at : at + n] = segment
            at, segment = at + n, segment + 1
    return ids_BL
