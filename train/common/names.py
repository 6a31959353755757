"""Shows names that were read from a file, of columns and labels, in messages and results.

A table without a header begins with data, a label column may hold a sentence, and both may be
clinical. A name is shown only if it looks like one, and otherwise as its position and length.
"""

import re
from collections.abc import Collection, Sequence

# Letters of the Latin script: a sentence in another script may have no spaces.
_IDENTIFIER = re.compile(r"[A-Za-zÀ-ɏ_][A-Za-zÀ-ɏ0-9_.-]{0,31}")
_WORD = re.compile(r"[^\W_]+")
# A cell of a row of data: long, several lines, four words, or without a letter at its start.
_DATA = re.compile(r".{65}|.*\n|\s*\S+\s+\S+\s+\S+\s+\S|\s*(?![^\W\d])\S", re.S)
# A word of a phrase, or three characters of a script that puts no spaces between words.
_PHRASE_WORD = re.compile(r"[\u2e80-\U0010ffff]{1,3}|\w+")
_PHRASE = re.compile(r"[\w ./&+:()'-]{1,48}")


def listed(columns: Sequence[str]) -> str:
    """Lists the columns of a table, or the keys of an object, for an error."""
    if not columns:
        return "it is empty"
    start = "its first record does not look like a header: it" if _is_data(columns) else "it"
    more = f" and {len(columns) - 40} more" if len(columns) > 40 else ""
    return f"{start} has {', '.join(shown_columns(columns)[:40])}{more}"


def shown_columns(columns: Sequence[str]) -> list[str]:
    """Each column of a table as a message shows it: its name in quotes, or position and length.

    If one of them looks like data, no name is shown.
    """
    data = _is_data(columns)
    return [
        repr(name)
        if not data and _is_identifier(name)
        else f"column {number} ({len(name)} characters)"
        for number, name in enumerate(columns, start=1)
    ]


def _is_data(columns: Sequence[str]) -> bool:
    return any(_DATA.match(name) for name in columns)


def _is_identifier(name: str) -> bool:
    """At most 32 letters, digits and _ - . in at most four words; no date and no long number."""
    return bool(_IDENTIFIER.fullmatch(name)) and (
        len(_WORD.findall(name)) <= 4 and not re.search(r"\d{5}", name)
    )


def shown_labels(
    labels: Sequence[str], *, tags: bool = False, rare: Collection[str] = ()
) -> tuple[str, ...]:
    """Each label as results show it: an identifier or a short phrase, or position and length.

    tags: the labels are tags, such as B-TYPE, whose type is judged. rare: labels that are shown
    only if they are one word, since a phrase that does not occur again may be a person's name.
    """
    parts = [(name[:2], name[2:]) if tags and name[1:2] == "-" else ("", name) for name in labels]
    numbers: dict[str, int] = {}
    for _, name in parts:
        numbers.setdefault(name, len(numbers) + 1)
    return tuple(
        prefix
        + (
            name
            if _is_phrase(name) and not (name in rare and len(name.split()) > 1)
            else f"label {numbers[name]} ({len(name)} characters)"
        )
        for prefix, name in parts
    )


def _is_phrase(name: str) -> bool:
    return bool(_PHRASE.fullmatch(name)) and len(_PHRASE_WORD.findall(name)) <= 5
