"""brat's standoff annotations: .ann lines to spans, spans to one BIO tag per word.

With BIO tags a word belongs to one entity. Of two spans that share a word, the one that starts
later (the inner one) is kept, or the one later in the file if they start together. The reference
prefers it too, but leaves fragments of the other that look like entities. Here the other is skipped
and counted.

Tools count offsets in different units, and nothing in the files names the unit; `locate` finds it
from the text that an .ann file repeats for each span. A span that has another text at its offsets
is skipped and counted.
"""

import dataclasses
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ...corpora.readers.text import BOMS
from ...corpora.source import files_below, name_of

WORDS = re.compile(r"\w+|[^\w\s]")  # letters and digits, or one other character
BLANK_WORDS = re.compile(r"\S+")  # separated by whitespace
BOM = "\ufeff"

DISCONTINUOUS = "discontinuous spans"
MALFORMED = "malformed annotations"
BEYOND = "spans beyond the text"
DIFFERENT = "spans with another text at their offsets"
NO_WORD = "spans that hold no whole word"
OVERLAPPING = "spans that share a word with a later one"


@dataclasses.dataclass(frozen=True)
class Span:
    """text[start:end], in characters, has this type.

    text: as repeated in the .ann file. gaps: what is between the fragments of a discontinuous span.
    """

    type: str
    start: int
    end: int
    text: str = ""
    gaps: tuple[tuple[int, int], ...] = ()

    def covered(self, text: str) -> str:
        """The fragments of this span in a text, with a space between them, as in an .ann file."""
        ends = (self.start, *itertools.chain.from_iterable(self.gaps), self.end)
        return " ".join(text[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True))


def in_order(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """The files with a suffix below a folder, links followed, sorted by relative path."""
    found = files_below(folder) if folder.is_dir() else ()
    chosen = [path for path in found if path.suffix == suffix]
    return sorted(chosen, key=lambda path: path.relative_to(folder).as_posix())


def read_text(path: pathlib.Path) -> str:
    """The file unchanged, with its BOM and its line ends: brat counts every character.

    A line that is not UTF-8 is read as cp1252; UTF-16 needs a BOM. Raises ValueError with the file
    and the line.
    """
    raw = path.read_bytes()
    encoding = next((name for bom, name in BOMS if raw.startswith(bom)), "utf-8")
    wrong = "save it as UTF-8 text"
    if encoding == "utf-16":
        try:
            return BOM + raw.decode(encoding)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not text (broken UTF-16); {wrong}") from None
    lines = []
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        if b"\0" in line:
            raise ValueError(f"{path}, line {number}: not text (NUL bytes); {wrong}")
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            try:
                lines.append(line.decode("cp1252"))
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path}, line {number}: not text (neither UTF-8 nor cp1252); {wrong}"
                ) from None
    return "".join(lines)


def read_spans(
    path: pathlib.Path, skipped: Counter[str], *, discontinuous: bool = False
) -> list[Span]:
    """The text-bound annotations (T lines) of an .ann file, in order.

    Malformed ones are skipped and counted, and so are discontinuous ones ("0 4;9 12") unless they
    are requested.
    """
    spans = []
    for line in re.split(r"\r\n|\r|\n", read_text(path).removeprefix(BOM)):
        if not line.startswith("T"):
            continue  # relations, events, attributes, notes, and the empty last line
        _, head, text = (*line.split("\t", 2), "", "")[:3]
        match = re.fullmatch(r"(\S+) (\d+ \d+(?:;\d+ \d+)*)", head.strip())
        ends = [int(offset) for offset in re.split("[ ;]", match[2])] if match else []
        if not match or any(a >= b for a, b in zip(ends[::2], ends[1::2], strict=True)):
            skipped[MALFORMED] += 1
        elif len(ends) > 2 and not (discontinuous and ends == sorted(ends)):
            skipped[DISCONTINUOUS] += 1
        else:
            gaps = tuple(zip(ends[1:-1:2], ends[2:-1:2], strict=True))
            spans.append(Span(match[1], ends[0], ends[-1], text, gaps))
    return spans


def locate(text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
    """(text without its BOM, spans with offsets in characters of it), whatever the file counts.

    A BOM and each CRLF line end may count as one character more or less, and a character beyond
    U+FFFF (an emoji) as two, which are its UTF-16 units. The reading in which most spans have their
    annotated text is used; of several, the one in which a BOM counts nothing and all else one.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    plain = text.removeprefix(BOM)
    bom = len(text) - len(plain)
    choices = (
        (np.arange(len(codes)) < bom, (0, 1)),
        ((codes == ord("\r")) & (np.append(codes[1:], 0) == ord("\n")), (1, 0)),
        (codes > 0xFFFF, (1, 2)),
    )
    best: tuple[int, list[Span]] = (-1, [])
    for widths in itertools.product(*(w if at.any() else w[:1] for at, w in choices)):
        counted = np.ones(len(codes), np.int64)
        for (at, _), width in zip(choices, widths, strict=True):
            counted[at] = width
        starts = np.append(0, np.cumsum(counted))
        found = [_moved(span, starts, bom) for span in spans]
        agree = sum(span.covered(plain).split() == span.text.split() for span in found)
        if agree > best[0]:
            best = agree, found
    return plain, best[1]


def _moved(span: Span, starts: np.ndarray, bom: int) -> Span:
    """The span in characters. starts: the offset at which each character starts, and the end."""

    # A character that counts nothing is left out where a span starts or ends at it.
    def begin(offset: int) -> int:
        return max(int(np.searchsorted(starts, offset, "right")) - 1 - bom, 0)

    def end(offset: int) -> int:
        return max(int(np.searchsorted(starts, offset, "left")) - bom, 0)

    gaps = tuple((end(a), begin(b)) for a, b in span.gaps)
    return dataclasses.replace(span, start=begin(span.start), end=end(span.end), gaps=gaps)


def agreeing(text: str, spans: Sequence[Span], skipped: Counter[str]) -> list[Span]:
    """The located spans that have their annotated text, if any, in this text; counts the others."""
    kept = []
    for span in spans:
        if span.end > len(text):
            skipped[BEYOND] += 1
        elif span.text and span.covered(text).split() != span.text.split():
            skipped[DIFFERENT] += 1
        else:
            kept.append(span)
    return kept


def name_files(found: Counter[str], skipped: Counter[str]) -> None:
    """Counts the spans with another text, {file: number}, under a reason that names three files."""
    files = list(+found)
    if files:
        more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
        skipped[f"{DIFFERENT}, in {', '.join(files[:3])}{more}"] += found.total()


def read_document(
    text_file: pathlib.Path, skipped: Counter[str], *, join: bool = False
) -> tuple[str, list[Span]]:
    """The text, without a BOM, and the spans of a .txt file and its .ann file; see `agreeing`.

    join: a discontinuous span with only whitespace between its fragments, which is how brat writes
    a span over a line end, is one span; the others are skipped and counted.
    """
    spans = read_spans(text_file.with_suffix(".ann"), skipped, discontinuous=join)
    text, spans = locate(read_text(text_file), spans)
    whole = [span for span in spans if not any(text[a:b].strip() for a, b in span.gaps)]
    skipped.update({DISCONTINUOUS: len(spans) - len(whole)} if len(whole) < len(spans) else {})
    return text, agreeing(text, whole, skipped)


def documents(
    folder: pathlib.Path, skipped: Counter[str], *, join: bool = False
) -> list[tuple[pathlib.Path, str, list[Span]]]:
    """(file, text, spans) of every .txt file with an .ann file below a folder, sorted by path.

    Counts texts without annotations, and the reverse; join as in `read_document`. Raises
    FileNotFoundError if there is no pair.
    """
    files = in_order(folder, ".txt")
    pairs = [file for file in files if file.with_suffix(".ann").exists()]
    if not pairs:
        raise FileNotFoundError(f"expected pairs of .txt and .ann files below {folder}, found none")
    if len(pairs) < len(files):
        skipped["texts without annotations"] += len(files) - len(pairs)
    if alone := sum(not file.with_suffix(".txt").exists() for file in in_order(folder, ".ann")):
        skipped["annotations without a text"] += alone
    found, different = [], Counter[str]()
    for file in pairs:
        found.append((file, *read_document(file, skipped, join=join)))
        different[name_of(file.relative_to(folder))] = skipped.pop(DIFFERENT, 0)
    name_files(different, skipped)
    return found


def tag(
    text: str,
    spans: Sequence[Span],
    words: re.Pattern[str],
    skipped: Counter[str],
    *,
    whole: bool = True,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words, their BIO tags). A span has the words entirely in it; whole=False: all it touches.

    Spans without a word, and those that share a word with a later span, are skipped and counted.
    """
    found = list(words.finditer(text))
    tags = ["O"] * len(found)
    for span in reversed(sorted(spans, key=lambda span: span.start)):
        inside = [
            i
            for i, word in enumerate(found)
            if (
                span.start <= word.start() and word.end() <= span.end
                if whole
                else span.start < word.end() and word.start() < span.end
            )
        ]
        if not inside:
            skipped[NO_WORD] += 1
        elif any(tags[i] != "O" for i in inside):
            skipped[OVERLAPPING] += 1
        else:
            for i in inside:
                tags[i] = f"{'B' if i == inside[0] else 'I'}-{span.type}"
    return tuple(word.group() for word in found), tuple(tags)
