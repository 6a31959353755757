"""python -m train corpora: lists the corpora and which of them are available locally."""

import pathlib
import textwrap

from ...common.records import read_object
from ...common.settings import check_set
from ..source import Source
from ..sources import sources
from .mixture import aligned


def catalogue(source: str | None = None, out: str | None = None) -> str:
    """Tabulates all corpora: access, license, size, the files on disk and what is prepared.

    Args:
        source: folder of downloads, each in a folder with the corpus's name; None: not checked.
        out: output folder of `prepare --corpus all`; None: not checked.
    """
    check_set(source=source, out=out)
    head = ["name", "access", "license", "expected documents", "tokens"]
    head += ["files"] * (source is not None) + ["documents", "tokens"] * (out is not None)
    rows = [head]
    for entry in sources():
        license = textwrap.shorten(entry.license, 44, placeholder=" ...")
        row = [entry.name, entry.access, license, *_size(entry.documents, entry.tokens)]
        if source is not None:
            row.append(_files(entry, pathlib.Path(source) / entry.name))
        if out is not None:
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
    facts = read_object(path, "documents", "train", "eval")
    return _size(facts["documents"], sum(facts[split]["tokens"] for split in ("train", "eval")))
