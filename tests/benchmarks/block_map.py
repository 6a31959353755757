"""The picture in the README: which tiles of a packed row a global and a local layer visit.

python tests/benchmarks/block_map.py OUT.png
"""

import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

from modernbert_jax.attention import make_bounds  # noqa: E402
from modernbert_jax.attention.bounds import tile_bounds  # noqa: E402

LENGTHS = (1900, 420, 1300, 90, 800, 2200, 300, 900)
LENGTH, TILE = 8192, 128


def main(path: str) -> None:
    """Draws both maps side by side."""
    ids = np.zeros((1, LENGTH), np.int32)
    ends = np.cumsum(LENGTHS)
    for number, (end, n) in enumerate(zip(ends, LENGTHS, strict=True), start=1):
        ids[0, end - n : end] = number
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for axis, (name, window) in zip(axes, (("global", None), ("local", 64)), strict=True):
        bounds = make_bounds(ids, window)
        lo, hi = (np.asarray(x)[0] for x in tile_bounds(bounds, TILE, TILE))
        tile = np.arange(LENGTH // TILE)
        visited = (lo[:, None] <= tile) & (tile < hi[:, None])
        axis.imshow(visited, cmap=ListedColormap(["#eeeeee", "#2b6cb0"]), interpolation="nearest")
        axis.set(
            title=f"{name} layer: {visited.mean():.1%} of the tiles visited",
            xlabel=f"keys (tiles of {TILE})",
            ylabel=f"queries (tiles of {TILE})",
        )
    figure.suptitle(f"{len(LENGTHS)} sequences packed into a row of {LENGTH} tokens")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
