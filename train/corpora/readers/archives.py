"""Streams the members of .tar and .tar.gz files; nothing is written to disk.

Links, special files, names that lead out of the archive and large members are refused; the size of
headers and the ratio of expansion are bounded. (tarfile's data filter is for extraction: it accepts
hard links and "C:\\x", and turns "/etc/x" into "etc/x".)
"""

import gzip
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from ..source import Report
from .markup import DAMAGE, Limited, damaged

LARGEST_MEMBER = 1 << 27  # bytes
LARGEST_HEADER = 1 << 20  # bytes of everything between the contents of two members
LARGEST_RATIO = 100  # XML compresses to a fifth or a tenth, gzip at most to a thousandth
RATIO_FROM = 1 << 24  # bytes unpacked before the ratio is checked


class _Unpacked(Limited):
    """The unpacked bytes of an archive; reading fails when they expand beyond LARGEST_RATIO."""

    def __init__(self, path: pathlib.Path, packed: IO[bytes]):
        gzipped = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        super().__init__(gzip.GzipFile(fileobj=packed) if gzipped else packed, str(path))  # type: ignore[arg-type]
        self.packed, self.size = packed, 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.size += len(data)
        if self.size > RATIO_FROM and self.size > LARGEST_RATIO * self.packed.tell():
            raise ValueError(f"{self.name}: expands more than {LARGEST_RATIO} times; not read")
        return data


def members(
    path: pathlib.Path, report: Report, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, bytes) of each plain file whose name is `wanted`, in the archive's order.

    Refused members go to the report. Raises ValueError with one line for an archive that is damaged
    or expands without bound.
    """
    try:
        with path.open("rb") as packed:
            stream = _Unpacked(path, packed)
            with tarfile.open(fileobj=stream.allow(LARGEST_HEADER), mode="r|") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it keeps all)
                    stream.allow(member.size + LARGEST_HEADER)
                    problem = _problem(member)
                    if problem:
                        # Without the name, which the author of the archive chose.
                        report.drop(problem, f"{path.name}: member at byte {member.offset}")
                    elif member.isreg() and wanted(member.name):
                        file = tar.extractfile(member)
                        yield member.name, file.read() if file else b""
            while stream.allow(1 << 21).read(1 << 20):
                pass  # to the end, where a .gz has its checksum
    except DAMAGE:
        raise damaged(path) from None
    except tarfile.TarError:
        raise ValueError(
            f"{path}: expected a complete .tar or .tar.gz; download it again"
        ) from None


def _problem(member: tarfile.TarInfo) -> str:
    """Why a member is refused; "" if it is not."""
    name = pathlib.PurePosixPath(member.name.replace("\\", "/"))
    if member.isdir():
        return ""
    if member.issym() or member.islnk():
        return "archive: a link"
    if not member.isreg() or member.issparse():
        return "archive: not a plain file"
    if name.is_absolute() or ".." in name.parts or ":" in name.as_posix().split("/")[0]:
        return "archive: a path out of the folder"
    if not 0 <= member.size <= LARGEST_MEMBER:
        return "archive: a file too large"
    return ""
