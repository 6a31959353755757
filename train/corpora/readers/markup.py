"""Reads untrusted XML safely: lxml streams it, entities are not resolved, DTDs are not loaded.

Nothing outside the file is opened. A file that declares entities, and a record that refers to one,
is refused, since an entity can expand without bound. Memory holds one record of limited size.
"""

import gzip
import hashlib
import io
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)

LARGEST_RECORD = 1 << 26  # bytes of markup
_OPTIONS: dict[str, Any] = {
    "load_dtd": False,
    "no_network": True,
    "resolve_entities": False,
    "huge_tree": False,  # libxml2's limits on depth, text and attributes stay
    "remove_comments": True,
    "remove_pis": True,
}
string = etree.XPath("string()")  # all text in an element, which must hold no entity
ANNOTATIONS = ("{*}annotation", "{*}annotation-xml", "tex-math")  # a formula once more, as TeX
_APART = ("DispFormula", "disp-formula", "break")
# Stands beside a block element or break in the text: a noncharacter, which no text holds.
_BREAK = "\ufdd0"
_BEFORE_PUNCTUATION = re.compile(rf"[\s{_BREAK}]*{_BREAK}[\s{_BREAK}]*(?=[.,;:!?)\]])")


class Entities(ValueError):
    """A document declares or uses entities."""


class Limited(io.RawIOBase):
    """A stream with a limit on the bytes that may be read; `allow` sets it from the position on."""

    def __init__(self, stream: IO[bytes], name: str):
        self.stream, self.name, self.left = stream, name, 0

    def allow(self, size: int) -> "Limited":
        """Allows `size` further bytes."""
        self.left = size
        return self

    def read(self, size: int = -1) -> bytes:
        """Raises ValueError beyond the limit."""
        data = self.stream.read(size if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"{self.name}: a record is larger than any real one; it is not read")
        return data

    def readable(self) -> bool:
        return True


def open_stream(path: pathlib.Path) -> IO[bytes]:
    """Opens a file for its bytes, unpacking .gz."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore


def damaged(path: pathlib.Path) -> ValueError:
    """The error for a .gz or tar that ends early or fails its checksum."""
    return ValueError(f"{path}: damaged or cut off; download the file again")


DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)


def check_md5(path: pathlib.Path) -> None:
    """Compares a file with the .md5 file next to it, if there is one. Raises ValueError."""
    beside = path.with_name(path.name + ".md5")
    if not beside.is_file():
        return
    found = re.search(r"\b[0-9a-f]{32}\b", beside.read_text("ascii", "replace").lower())
    if not found:
        raise ValueError(f"{beside}: expected a line `MD5(name)= hex`, found none")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "md5").hexdigest()
    if actual != found[0]:
        raise ValueError(f"{path}: expected md5 {found[0]}, got {actual}; download the file again")


def parse(data: bytes, place: str) -> etree._Element:
    """Parses a document. Raises ValueError, or Entities if it declares or uses entities."""
    try:
        root = etree.fromstring(data, etree.XMLParser(**_OPTIONS))
    except etree.XMLSyntaxError as error:
        raise _broken(error, place) from None
    _refuse_declared(root, place)
    if has_entity(root):
        raise Entities(f"{place}: uses entities, which are not resolved")
    return root


def records(path: pathlib.Path, tags: tuple[str, ...]) -> Iterator[etree._Element]:
    """Yields the elements with these tags below the root, each cleared before the next.

    Raises ValueError with one line for a file that is incomplete or not well-formed XML.
    """
    try:
        with open_stream(path) as stream:
            limited = Limited(stream, str(path)).allow(LARGEST_RECORD)
            events = etree.iterparse(limited, events=("end",), tag=tags, **_OPTIONS)
            for number, (_, element) in enumerate(events):
                if number == 0:
                    _refuse_declared(element, str(path))
                parent = element.getparent()
                if parent is None or parent.getparent() is not None:
                    continue  # not a record: a tag of the same name further down
                yield element
                element.clear()
                while element.getprevious() is not None:
                    del parent[0]
                limited.allow(LARGEST_RECORD)
    except etree.XMLSyntaxError as error:
        raise _broken(error, str(path)) from None
    except DAMAGE:
        raise damaged(path) from None


def _broken(error: etree.XMLSyntaxError, place: str) -> ValueError:
    # Without the parser's message, which can contain text.
    line, column = error.position
    return ValueError(f"{place}: not well-formed XML at line {line}, column {column}")


def _refuse_declared(element: etree._Element, place: str) -> None:
    dtd = element.getroottree().docinfo.internalDTD
    if dtd is not None and next(iter(dtd.iterentities()), None) is not None:
        raise Entities(f"{place}: declares entities, which are not resolved; remove the DOCTYPE")


def has_entity(element: etree._Element) -> bool:
    """Whether it refers to an entity (other than a character such as &lt; or &#955;)."""
    return next(element.iter(etree.Entity), None) is not None


def set_apart(element: etree._Element, tags: Iterable[str]) -> None:
    """Marks both sides of the elements with these tags in it; `one_line` makes spaces of them."""
    for block in element.iter(*tags):
        block.text = _BREAK + (block.text or "")
        block.tail = _BREAK + (block.tail or "")


def one_line(text: str) -> str:
    """Turns each run of white space and marks into a space; none before punctuation at a mark."""
    if _BREAK in text:
        text = _BEFORE_PUNCTUATION.sub("", text).replace(_BREAK, " ")
    return " ".join(text.split())


def text_of(element: etree._Element | None) -> str:
    """All text in it, without markup, with each run of white space as one space.

    Displayed formulas and breaks separate words. Annotations of formulas are removed from the tree.
    """
    if element is None:
        return ""
    etree.strip_elements(element, *ANNOTATIONS, with_tail=False)
    set_apart(element, _APART)
    return one_line(string(element))
