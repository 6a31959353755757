"""DEID: names, dates, places and more that identify a person, in nursing notes.

The texts (id.text) and the masked texts (id.res) are aligned, and what stands where a mask is has
the mask's kind. Where masks stand side by side, or the text behind a mask is not found, the
reference labels the rest of the record. Here a record must align as a whole, or is left out, and a
mask of no known kind is "other", not a bare "B"; all of these are counted.
"""

import pathlib
import re
from collections import Counter

from ...corpora.readers.text import read_lines
from .files import find_file, token_data
from .task import Data, Task, sklearn_split, three_ways

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
    """An example a record of id.text and id.res; 70/15/15 by scikit-learn's split.

    The split is of all records, so that one left out moves no other. Line ends count as blanks.
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
    tagged = [
        align(text, mask, skipped) for (_, text), (_, mask) in zip(texts, masked, strict=True)
    ]
    rows = three_ways(len(tagged), sklearn_split)
    return token_data(tagged, rows, skipped, folder, LABELS)


def _records(path: pathlib.Path) -> list[tuple[str, str]]:
    """(patient||||note, text) of each record."""
    content = "".join(read_lines(path))
    records = [(match[1], match[2]) for match in RECORD.finditer(content)]
    if not records or len(records) != content.count("START_OF_RECORD="):
        raise ValueError(
            f"{path}: expected records from START_OF_RECORD=patient||||note|||| to "
            f"||||END_OF_RECORD, got {len(records)} whole ones of "
            f"{content.count('START_OF_RECORD=')}"
        )
    return records


def kind_of(mask: str) -> str | None:
    """The kind of what a mask's content stands for, None where it is unknown."""
    content = mask.strip().lower()
    for kind, phrases in PHRASES:
        if any(phrase in content for phrase in phrases):
            return kind
    if not content:
        return "other"
    return "date" if re.fullmatch(r"\d+([-/]\d+){0,2}", content) else None


def align(text: str, masked: str, skipped: Counter[str]) -> Words | None:
    """(words, tags) of a text with the help of its masked twin; None where they do not align.

    Words stand between blanks, and at the ends of masks: "Dr.[**Name**]," has three.
    Where only a blank parts two masks, the first gets one word, as in the reference.
    """
    text, masked = _flat(text), _flat(masked)
    first, *rest = MASK.split(masked)
    # (kinds, what follows): masks that touch are one gap.
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
    skipped.update({UNKNOWN: unknown} if unknown else {})
    words, tags = first.split(), ["O"] * len(first.split())
    for (kinds, plain), secret in zip(gaps, hidden, strict=True):
        found = secret.split()
        words += found + plain.split()
        tags += _tags(kinds, len(found), skipped) + ["O"] * len(plain.split())
    return tuple(words), tuple(tags)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _hidden(text: str, first: str, plains: list[str]) -> list[str] | None:
    """What the gaps before each plain text hide: the shortest, from the left; never nothing.

    Taking each plain text where it first occurs never bars a later one, so if this fails, there is
    no alignment. The last one ends the text.
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


def _tags(kinds: list[str], n: int, skipped: Counter[str]) -> list[str]:
    """Tags of n words under masks that touch: one entity, a word a mask where the kinds differ."""
    if len(set(kinds)) == 1:
        return [f"{'I' if i else 'B'}-{kinds[0]}" for i in range(n)]
    if len(kinds) == n:
        return [f"B-{kind}" for kind in kinds]
    skipped[ADJACENT] += len(kinds)
    return [f"{'I' if i else 'B'}-other" for i in range(n)]


TASK = Task(
    name="deid",
    title="DEID: what identifies a person, in nursing notes",
    kind="tokens",
    metric="f1",
    homepage=HOMEPAGE,
    load=load,
    published={
        "BioClinical ModernBERT base": 82.7,
        "BioClinical ModernBERT large": 83.8,
        "ModernBERT base": 78.3,
        "ModernBERT large": 82.1,
        "Bio_ClinicalBERT": 74.2,
        "BioBERT": 74.3,
        "BioMed-RoBERTa": 81.1,
        "Clinical-Longformer": 82.3,
        "Clinical-BigBird": 71.2,
        "Clinical ModernBERT": 44.4,
    },
)
