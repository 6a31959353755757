"""Members of .tar and .tar.gz files, streamed: nothing is ever written to disk.

So that a hostile archive can do no harm, members that are no plain files, or whose names lead out
of the archive, are refused; sizes, headers and the ratio of expansion are bounded.
"""

import gzip
import io
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from ..source import Report
from .markup import DAMAGE, Limited, damaged

LARGEST_MEMBER = 1 << 27  # bytes
LARGEST_HEADER = 1 << 20  # bytes: of all that stands between two members
# XML shrinks to a fifth or a tenth; what gzip can do at most is a thousandth.
LARGEST_RATIO = 100
RATIO_FROM = 1 << 24  # bytes unpacked, before which no ratio is asked for
_BLOCK = 1 << 20


class _Ratio(io.RawIOBase):
    """An unpacked stream that ends with an error where it grows beyond all measure."""

    def __init__(self, path: pathlib.Path, packed: IO[bytes], unpacked: IO[bytes]):
        self.path, self.packed, self.unpacked, self.size = path, packed, unpacked, 0

    def read(self, size: int = -1) -> bytes:
        data = self.unpacked.read(size)
        self.size += len(data)
        if self.size > RATIO_FROM and self.size > LARGEST_RATIO * self.packed.tell():
            raise ValueError(f"{self.path}: expands more than {LARGEST_RATIO} times; not read")
        return data

    def readable(self) -> bool:
        return True


def members(
    path: pathlib.Path, report: Report, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each plain file whose name is `wanted`, in the archive's order.

    What is refused goes to the report. Raises ValueError with one line for an archive that is not
    whole, or expands without bound.
    """
    try:
        with path.open("rb") as packed:
            gzipped = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            unpacked = gzip.GzipFile(fileobj=packed) if gzipped else packed
            stream = Limited(_Ratio(path, packed, unpacked), str(path))  # type: ignore[arg-type]
            yield from _members(path, stream, report, wanted)
    except DAMAGE:
        raise damaged(path) from None
    except tarfile.TarError:
        raise ValueError(f"{path}: expected a whole .tar or .tar.gz; get it again") from None


def _members(
    path: pathlib.Path, stream: Limited, report: Report, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream.allow(LARGEST_HEADER), mode="r|") as tar:
        while (member := tar.next()) is not None:
            # It would keep them all.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            problem = _problem(member)
            if problem:
                # Not the name, which is the attacker's.
                report.drop(problem, f"{path.name}: member at byte {member.offset}")
            taken = not problem and member.isreg() and wanted(member.name)
            file = tar.extractfile(member) if member.isreg() else None
            data = bytearray()
            while file is not None and (block := file.read(_BLOCK)):
                if taken:
                    data += block
                stream.allow(2 * _BLOCK)
            if taken:
                yield member.name, bytes(data)
            stream.allow(LARGEST_HEADER)
    # To the end, where a .gz has its checksum.
    while stream.allow(2 * _BLOCK).read(_BLOCK):
        pass


def _problem(member: tarfile.TarInfo) -> str:
    """Why a member is refused, or nothing."""
    if member.isdir():
        return ""
    if member.issym() or member.islnk():
        return "archive: a link"
    if not member.isreg() or member.issparse():
        return "archive: not a plain file"
    name = pathlib.PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        return "archive: a path out of the folder"
    if member.size > LARGEST_MEMBER:
        return "archive: a file too large"
    return ""
