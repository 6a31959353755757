"""Reads MosaicML's MDS shards of token ids, so that existing corpora need no conversion.

A folder has `index.json` (version 2) and shards. A shard starts, in little-endian uint32, with the
number of samples n and n + 1 offsets into the file; its column names and the samples follow. A
sample is the sizes (uint32) of the columns whose size varies, then the columns. An `ndarray:uint16`
column is a byte `dimensions << 2 | log2(bytes per dimension)`, the dimensions in as few bytes as
hold the largest (1, 2 or 4), and the values.
Source: the dataset format of mosaicml/streaming.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..common.names import shown_columns, shown_labels

COLUMN = "input_ids"
ENCODINGS = {"ndarray:uint16": np.dtype("<u2"), "ndarray:uint32": np.dtype("<u4")}
# Bytes that store a length, and the lengths that need them; our lengths are int32.
_WIDTHS = ((1, 1, 2**8 - 1), (2, 2**8, 2**16 - 1), (4, 2**16, 2**31 - 1))


class MdsShards:
    """The samples of one MDS folder. Memory holds only their offsets, 8 bytes each.

    lengths: int32 [chunks], tokens. fingerprint: sha256 of index.json and lengths. Raises
    ValueError with one line for another version, format or encoding, compressed shards, and a
    missing, cut or damaged file. Nothing is unpickled.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        index = (folder / "index.json").read_bytes()
        try:
            self.shards = [_Shard(folder, record) for record in json.loads(index)["shards"]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder / 'index.json'}: expected the index of an MDS folder, got one without "
                f"{error if isinstance(error, KeyError) else 'its fields'}"
            ) from None
        if not self.shards:
            raise ValueError(f"{folder / 'index.json'}: expected shards, got none")
        self.ends = np.cumsum([len(shard.lengths) for shard in self.shards])
        self.lengths = np.concatenate([shard.lengths for shard in self.shards])
        self.fingerprint = hashlib.sha256(index + self.lengths.tobytes()).hexdigest()

    def read(self, chunks: np.ndarray) -> list[np.ndarray]:
        """Returns the ids of these chunks."""
        result = []
        numbers = np.searchsorted(self.ends, chunks, side="right")
        for number, chunk in zip(numbers.tolist(), np.asarray(chunks).tolist(), strict=True):
            shard = self.shards[number]
            result.append(shard.read(chunk - int(self.ends[number]) + len(shard.lengths)))
        return result

    def in_order(self) -> Iterator[np.ndarray]:
        """Yields the ids of all chunks, reading each file once from start to end."""
        for shard in self.shards:
            data = np.memmap(shard.path, np.uint8, "r")
            for i in range(len(shard.lengths)):
                yield shard.decode(i, data[shard.offsets[i] : shard.offsets[i + 1]].tobytes())


class _Shard:
    def __init__(self, folder: pathlib.Path, record: dict[str, Any]):
        if record["version"] != 2 or record["format"] != "mds":
            raise ValueError(
                f"{folder / 'index.json'}: expected format mds, version 2, got "
                f"{record['format']}, version {record['version']}"
            )
        self.path = folder / record["raw_data"]["basename"]
        names, encodings = record["column_names"], record["column_encodings"]
        found = dict(zip(names, encodings, strict=True))
        if found.get(COLUMN) not in ENCODINGS:
            given = zip(shown_columns(names), shown_labels(encodings), strict=True)
            raise ValueError(
                f"{folder / 'index.json'}: expected a column {COLUMN} of {' or '.join(ENCODINGS)}, "
                f"got {', '.join(f'{n} {e}' for n, e in given)}"
            )
        self.dtype = ENCODINGS[found[COLUMN]]
        self.sizes: list[int | None] = record["column_sizes"]  # bytes; None varies
        self.column = names.index(COLUMN)
        self.varying = [i for i, size in enumerate(self.sizes) if not size]
        if not self.path.is_file():
            zipped = " its compressed form only: decompress the" if record.get("zip_data") else ""
            raise ValueError(f"{self.path}: expected this shard, found{zipped or ' no such'} file")
        samples, size = record["samples"], self.path.stat().st_size
        head = np.fromfile(self.path, "<u4", samples + 2)
        self.offsets = head[1:].astype(np.int64)
        if (
            len(head) != samples + 2
            or (np.diff(self.offsets) < 4 * len(self.varying)).any()
            or self.offsets[-1] != size
        ):
            raise self._damaged(f"{samples} samples")
        payload = self._payloads()
        self.lengths = np.zeros(samples, np.int32)
        for width, least, most in _WIDTHS:
            lengths, rest = np.divmod(payload - 1 - width, self.dtype.itemsize)
            fits = (rest == 0) & (least <= lengths) & (lengths <= most)
            self.lengths[fits] = lengths[fits]
        if not self.lengths.all():
            raise self._damaged("arrays of one dimension, not empty")

    def _payloads(self) -> np.ndarray:
        """Bytes of the token column in each sample."""
        if self.varying == [self.column]:  # the usual case, which reads no data
            return np.diff(self.offsets) - 4 - sum(size or 0 for size in self.sizes)
        data = np.memmap(self.path, np.uint8, "r")
        at = self.offsets[:-1] + 4 * self.varying.index(self.column)
        return data[at[:, None] + np.arange(4)].view("<u4")[:, 0].astype(np.int64)

    def read(self, i: int) -> np.ndarray:
        # Opened for each read: a corpus may have more shards than a process may have open files.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offsets[i])
            data = file.read(self.offsets[i + 1] - self.offsets[i])
        return self.decode(i, data)

    def decode(self, i: int, sample: bytes) -> np.ndarray:
        length, head = int(self.lengths[i]), 0
        at = 4 * len(self.varying)
        for size in self.sizes[: self.column]:
            if not size:
                size = int.from_bytes(sample[head : head + 4], "little")
                head += 4
            at += size
        width = next(width for width, _, most in _WIDTHS if length <= most)
        shape = bytes([1 << 2 | width.bit_length() - 1]) + length.to_bytes(width, "little")
        if sample[at : at + 1 + width] != shape:
            raise self._damaged(f"{length} tokens in sample {i}")
        return np.frombuffer(sample, self.dtype, length, at + 1 + width)

    def _damaged(self, expected: str) -> ValueError:
        return ValueError(
            f"{self.path}: expected {expected} according to index.json, found otherwise; the "
            "file is cut or damaged, download it again"
        )
