"""Makes the MDS folders beside it with the reference's writer.

    python tests/goldens/mds/make_mds.py

Needs mosaicml-streaming (made with 0.13.0); the tests read the folders without it.
"""

import pathlib

import numpy as np
from streaming import MDSWriter

HERE = pathlib.Path(__file__).parent
LENGTHS = (1, 2, 255, 256, 257, 3, 700, 40)


def ids(piece: int) -> np.ndarray:
    """The ids of a piece, by a formula that the test repeats."""
    return ((np.arange(LENGTHS[piece]) * 977 + piece * 31) % 50368).astype(np.uint16)


def main() -> None:
    """Two folders: the reference's one column, in several shards; and one with other columns."""
    with MDSWriter(
        out=str(HERE / "ids"), columns={"input_ids": "ndarray:uint16"}, size_limit=1500
    ) as writer:
        for piece in range(len(LENGTHS)):
            writer.write({"input_ids": ids(piece)})
    columns = {"group": "str", "id": "str", "input_ids": "ndarray:uint16", "len": "int"}
    with MDSWriter(out=str(HERE / "columns"), columns=columns) as writer:
        for piece in range(len(LENGTHS)):
            row = {"group": "y" * (9 - piece), "id": "x" * piece, "input_ids": ids(piece)}
            writer.write(row | {"len": LENGTHS[piece]})


if __name__ == "__main__":
    main()
