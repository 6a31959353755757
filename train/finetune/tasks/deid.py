"""DEID: names, dates, locations and other identifying information in nursing notes.

The texts (id.text) and the masked texts (id.res) are aligned, and the text in place of a mask gets
the mask's kind. If masks are adjacent, or the text after a mask is not found, the reference labels
the rest of the record. Here a record that does not align as a whole is skipped, and a mask of an
unknown kind becomes "other" instead of a bare "B"; all of these are counted.
"""

import pathlib
import re
from collections import Counter

from ...corpora.readers.text import read_lines
from .files import find_file, token_data
from .task import Data, Task, published, sklearn_split, three_ways

KINDS = ("age", "date", "location", "name", "other", "phone_nb")
LABELS = ("O", *(f"B-{kind}" for kind in KINDS), *(f"I-{kind}" for kind in KINDS))
HOMEPAGE = "https://physionet.org/content/deidentifiedmedicaltext/1.0/"

RECORD = re.compile(r"START_OF_RECORD=(\S*?\|\|\|\|\S*?)\|\|\|\|(.*?)\|\|\|\|END_OF_RECORD", re.S)
MASK = re.compile(r"\[\*\*(.*?)\*\*\]")
# The first kind with a phrase that a mask contains, as in the reference.
PHRASES = (
    ("name", ("name",)),
    ("other", ("e-mail address", "email address")),
    ("phone_nb", ("telephone/fax", "pager number")),
    ("age", ("age over",)),
    ("location", ("location", "hospital", "street address", "unit number")),
    ("date", ("date range", "month/year")),
    ("other", ("company",)),
)
UNALIGNED = "records whose masks do not align with the text"
UNKNOWN = "masks of no known kind, taken as other"
ADJACENT = "masks that touch and differ in kind, taken as other"

Words = tuple[tuple[str, ...], tuple[str, ...]]


def load(folder: pathlib.Path) -> Data:
    """One example per record of id.text and id.res; split 70/15/15 as scikit-learn does.

    All records are split before any is skipped, so that this moves no other record. Line ends count
    as spaces.
    """
    texts, masked = (
        _records(find_file(folder, (name,), "DEID", HOMEPAGE)) for name in ("id.text", "id.res")
    )
    if [key for key, _ in texts] != [key for key, _ in masked]:
        raise ValueError(
            f"{folder}: expected the same records in id.text and id.res, got {len(texts)} and "
            f"{len(masked)} of other numbers or in another order; get both files again"
        )
    skipped: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    tagged = [
        align(text, mask, skipped, kept) for (_, text), (_, mask) in zip(texts, masked, strict=True)
    ]
    rows = three_ways(len(tagged), sklearn_split)
    return token_data(tagged, rows, skipped, folder, LABELS, kept)


def _records(path: pathlib.Path) -> list[tuple[str, str]]:
    """(patient||||note, text) of each record."""
    content = "".join(read_lines(path))
    records = [(match[1], match[2]) for match in RECORD.finditer(content)]
    if not records or len(records) != content.count("START_OF_RECORD="):
        raise ValueError(
            f"{path}: expected records from START_OF_RECORD=patient||||note|||| to "
            f"||||END_OF_RECORD, got {len(records)} complete ones of "
            f"{content.count('START_OF_RECORD=')}"
        )
    return records


def kind_of(mask: str) -> str | None:
    """The kind of text that a mask with this content replaces, None if it is unknown."""
    content = mask.strip().lower()
    for kind, phrases in PHRASES:
        if any(phrase in content for phrase in phrases):
            return kind
    if not content:
        return "other"
    return "date" if re.fullmatch(r"\d+([-/]\d+){0,2}", content) else None


def align(text: str, masked: str, skipped: Counter[str], kept: Counter[str]) -> Words | None:
    """(words, tags) of a text, from its masked version; None if the two do not align.

    Words end at whitespace and at the ends of masks: "Dr.[**Name**]," has three. If only a space
    separates two masks, the first gets one word, as in the reference.
    """
    text, masked = _flat(text), _flat(masked)
    first, *rest = MASK.split(masked)
    # (kinds of the masks, text after them): adjacent masks are one gap.
    gaps: list[tuple[list[str], str]] = []
    kinds: list[str] = []
    unknown = 0
    for mask, plain in zip(rest[::2], rest[1::2], strict=True):
        kind = kind_of(mask)
        unknown += kind is None
        kinds.append(kind or "other")
        if plain:
            gaps.append((kinds, plain))
            kinds = []
    if kinds:
        gaps.append((kinds, ""))
    hidden = _hidden(text, first, [plain for _, plain in gaps])
    if hidden is None:
        skipped[UNALIGNED] += 1
        return None
    kept.update({UNKNOWN: unknown} if unknown else {})
    words, tags = first.split(), ["O"] * len(first.split())
    for (kinds, plain), secret in zip(gaps, hidden, strict=True):
        found = secret.split()
        words += found + plain.split()
        tags += _tags(kinds, len(found), kept) + ["O"] * len(plain.split())
    return tuple(words), tuple(tags)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _hidden(text: str, first: str, plains: list[str]) -> list[str] | None:
    """The text in the gap before each plain text: never empty, and the shortest from the left on.

    Using the first occurrence of each plain text never prevents a later match, so if this fails
    there is no alignment. The last plain text ends the text.
    """
    if not plains:
        return [] if text == first else None
    if not text.startswith(first):
        return None
    hidden, at = [], len(first)
    for plain in plains[:-1]:
        found = text.find(plain, at + 1)
        if found < 0:
            return None
        hidden.append(text[at:found])
        at = found + len(plain)
    end = len(text) - len(plains[-1])
    if end <= at or not text.endswith(plains[-1]):
        return None
    return [*hidden, text[at:end]]


def _tags(kinds: list[str], n: int, kept: Counter[str]) -> list[str]:
    """Tags of n words in place of adjacent masks: one entity, or one word per mask of its kind."""
    if len(set(kinds)) == 1:
        return [f"{'I' if i else 'B'}-{kinds[0]}" for i in range(n)]
    if len(kinds) == n:
        return [f"B-{kind}" for kind in kinds]
    kept[ADJACENT] += len(kinds)
    return [f"{'I' if i else 'B'}-other" for i in range(n)]


TASK = Task(
    name="deid",
    title="DEID: identifying information in nursing notes",
    kind="tokens",
    metric="f1",
    homepage=HOMEPAGE,
    load=load,
    published=published(82.7, 83.8, 78.3, 82.1, 74.2, 74.3, 81.1, 82.3, 71.2, 44.4),
)
