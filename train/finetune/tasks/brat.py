"""brat's standoff annotations: .ann lines to spans, spans to one BIO tag per word.

With BIO tags a word belongs to one entity. Of two spans that share a word, the one that starts
later (the inner one) is kept, or the one later in the file if they start together. The reference
prefers it too, but leaves fragments of the other that look like entities. Here the other is skipped
and counted.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Sequence

WORDS = re.compile(r"\w+|[^\w\s]")  # letters and digits, or one other character
BLANK_WORDS = re.compile(r"\S+")  # separated by whitespace

DISCONTINUOUS = "discontinuous spans"
MALFORMED = "malformed annotations"
BEYOND = "spans beyond the text"
NO_WORD = "spans that hold no whole word"
OVERLAPPING = "spans that share a word with a later one"


@dataclasses.dataclass(frozen=True)
class Span:
    """text[start:end], in characters, has this type. text: as repeated in the .ann file."""

    type: str
    start: int
    end: int
    text: str = ""


def read_text(path: pathlib.Path) -> str:
    """The file unchanged, with its line ends: brat counts every character."""
    raw = path.read_bytes()
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path}: not text (neither UTF-8 nor cp1252); save it as UTF-8 text")


def read_spans(path: pathlib.Path, skipped: Counter[str]) -> list[Span]:
    """The text-bound annotations (T lines) of an .ann file, in order.

    Discontinuous ("0 4;9 12") and malformed ones are skipped and counted.
    """
    spans = []
    for line in re.split(r"\r\n|\r|\n", read_text(path)):
        if not line.startswith("T"):
            continue  # relations, events, attributes, notes, and the empty last line
        fields = line.split("\t", 2)
        match = re.fullmatch(r"(\S+) (\d+) (\d+)", fields[1].strip()) if len(fields) > 1 else None
        if match and int(match[2]) < int(match[3]):
            text = fields[2] if len(fields) > 2 else ""
            spans.append(Span(match[1], int(match[2]), int(match[3]), text))
        elif len(fields) > 1 and ";" in fields[1]:
            skipped[DISCONTINUOUS] += 1
        else:
            skipped[MALFORMED] += 1
    return spans


def read_document(text_file: pathlib.Path, skipped: Counter[str]) -> tuple[str, list[Span]]:
    """The text and the spans of a .txt file and its .ann file; counts spans beyond the text.

    The offsets in a file with CRLF line ends may count one or two characters for each, depending on
    the file that was annotated. The reading in which more spans match their annotated text is used.
    """
    spans = read_spans(text_file.with_suffix(".ann"), skipped)
    text = read_text(text_file)
    readings = [text, text.replace("\r\n", "\n")] if "\r\n" in text else [text]

    def agreeing(reading: str) -> int:
        return sum(reading[s.start : s.end].split() == s.text.split() for s in spans)

    text = max(readings, key=agreeing)
    inside = [span for span in spans if span.end <= len(text)]
    if len(inside) < len(spans):
        skipped[BEYOND] += len(spans) - len(inside)
    return text, inside


def documents(
    folder: pathlib.Path, skipped: Counter[str]
) -> list[tuple[pathlib.Path, str, list[Span]]]:
    """(file, text, spans) of every .txt file with an .ann file below a folder, sorted by path.

    Counts texts without annotations. Raises FileNotFoundError if there is no pair.
    """
    files = sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).as_posix())
    pairs = [file for file in files if file.with_suffix(".ann").exists()]
    if not pairs:
        raise FileNotFoundError(f"expected pairs of .txt and .ann files below {folder}, found none")
    if len(pairs) < len(files):
        skipped["texts without annotations"] += len(files) - len(pairs)
    return [(file, *read_document(file, skipped)) for file in pairs]


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
