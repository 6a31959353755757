"""python -m train corpora: what the corpora are, and which of them are at hand."""

import json
import pathlib
import textwrap

from ..source import Source
from ..sources import sources
from .mixture import aligned


def catalogue(source: str = "", out: str = "") -> str:
    """A table of all corpora: access, license, size; what is on disk, what is prepared.

    Args:
        source: folder of folders by name, as downloaded; empty: nothing is looked for.
        out: where `prepare --corpus all` put them; empty: nothing is looked for.
    """
    head = ["name", "access", "license", "expected documents", "tokens"]
    head += ["files"] * bool(source) + ["documents", "tokens"] * bool(out)
    rows = [head]
    for entry in sources():
        license = textwrap.shorten(entry.license, 44, placeholder=" ...")
        row = [entry.name, entry.access, license, *_size(entry.documents, entry.tokens)]
        if source:
            row.append(_files(entry, pathlib.Path(source) / entry.name))
        if out:
            row += _prepared(pathlib.Path(out) / entry.name)
        rows.append(row)
    return aligned(rows, left=3)


def _size(documents: int, tokens: int) -> list[str]:
    return [f"{number:,}" if number else "-" for number in (documents, tokens)]


def _files(entry: Source, folder: pathlib.Path) -> str:
    if entry.kind == "generic":
        return "-"
    try:
        return f"{len(entry.parts(folder)):,}" if folder.is_dir() else "missing"
    except (FileNotFoundError, ValueError):
        return "not as expected"


def _prepared(out: pathlib.Path) -> list[str]:
    path = out / "tokens" / "manifest.json"
    if not path.is_file():
        return ["-", "-"]
    facts = json.loads(path.read_text())
    return _size(facts["documents"], sum(facts[split]["tokens"] for split in ("train", "eval")))
