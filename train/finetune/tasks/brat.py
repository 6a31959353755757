"""brat's standoff annotations: .ann lines to spans, spans to one BIO tag a word.

A BIO tag holds one entity a word. Of two spans that share a word, the one that starts later (the
inner one) is kept, on equal starts the one that stands later in the file; the reference prefers it
too, but leaves the rest of the other as fragments that look like entities. Here the other is left
out, and counted.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Sequence

WORDS = re.compile(r"\w+|[^\w\s]")  # letters and digits, or one sign
BLANK_WORDS = re.compile(r"\S+")  # between blanks

DISCONTINUOUS = "discontinuous spans"
MALFORMED = "malformed annotations"
BEYOND = "spans beyond the text"
NO_WORD = "spans that hold no whole word"
OVERLAPPING = "spans that share a word with a later one"


@dataclasses.dataclass(frozen=True)
class Span:
    """text[start:end] is of this type, end excluded, in characters. text: as the .ann has it."""

    type: str
    start: int
    end: int
    text: str = ""


def read_text(path: pathlib.Path) -> str:
    """The file as it is, line ends included: brat counts each character."""
    raw = path.read_bytes()
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path}: not text (neither UTF-8 nor cp1252); save it as UTF-8 text")


def read_spans(path: pathlib.Path, skipped: Counter[str]) -> list[Span]:
    """The text-bound annotations (T lines) of an .ann file, in its order.

    Discontinuous ones ("0 4;9 12") and malformed ones are left out and counted.
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
    """A .txt file and the spans of the .ann file beside it; spans beyond the text are counted.

    Offsets of a file with CRLF may count both characters or one, as it was when it was annotated:
    the reading is taken under which more spans have the text that their annotation repeats.
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
    """(file, text, spans) of every .txt below a folder that has an .ann, sorted by path.

    Those without one are counted. Raises FileNotFoundError where there is no such pair.
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
    """(words, their BIO tags). A span has the words wholly in it, or (whole=False) all it touches.

    Spans without a word, and those that share one with a later span, are left out and counted.
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
