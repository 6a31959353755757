"""python -m train mixture: what a run is made of, in tokens, source by source.

BioClinical ModernBERT: phase 1 is three epochs of everything, phase 2 three epochs of the clinical
corpora. Prepared folders give the numbers; `python -m train mixture` without any takes those of the
model card, as a plan.
"""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Sequence

from ..sources import sources


@dataclasses.dataclass(frozen=True)
class Part:
    """A corpus in a mixture. tokens: of one epoch of its train split. epochs: in each phase."""

    name: str
    kind: str  # clinical, biomedical or generic
    documents: int
    tokens: int
    epochs: tuple[int, ...]
    folder: str = ""


def budget(parts: Sequence[Part], phase: int) -> int:
    """Tokens of a phase."""
    return sum(part.epochs[phase] * part.tokens for part in parts)


def flags(parts: Sequence[Part], phase: int) -> str:
    """The flags of `pretrain` for a phase: a corpus that is named twice counts twice an epoch."""
    used = [part for part in parts if part.epochs[phase] and part.folder]
    common = math.gcd(*(part.epochs[phase] for part in used)) or 1
    folders = [part.folder for part in used for _ in range(part.epochs[phase] // common)]
    return (
        f"--phases.{phase}.tokens {budget(parts, phase)} --phases.{phase}.corpus "
        f"{' '.join(folders)}"
    )


def mixture(
    prepared: tuple[str, ...] = (),
    epochs: int = 3,
    repeat: tuple[str, ...] = (),
    png: str = "",
) -> str:
    """A table of documents, tokens and shares of each source, and the flags that train on it.

    Args:
        prepared: folders that `prepare` made, or a folder of them (--corpus all); none: the plan.
        epochs: of everything in phase 1, of the clinical corpora in phase 2.
        repeat: other epochs of a source, NAME=PHASE 1,PHASE 2, such as medqa=3,6.
        png: file for the same as a picture.
    """
    parts = [_prepared(folder) for name in prepared for folder in _folders(pathlib.Path(name))]
    if not prepared:
        parts = _planned()
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"prepared: expected each source once, got {', '.join(names)}")
    parts = _with_epochs(parts, epochs, repeat)
    if png:
        pathlib.Path(png).write_bytes(picture(parts))
    lines = [table(parts)]
    if prepared:
        lines += [flags(parts, phase) for phase in (0, 1) if budget(parts, phase)]
    return "\n".join(lines)


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    whole = [f for f in found if (f / "tokens" / "manifest.json").is_file()]
    if not whole:
        raise FileNotFoundError(
            f"prepared {folder}: expected a folder that `python -m train prepare` made, or a "
            "folder of them, found none"
        )
    return whole


def _prepared(folder: pathlib.Path) -> Part:
    facts = json.loads((folder / "tokens" / "manifest.json").read_text())
    name = facts["source"] if facts["kind"] != "generic" else folder.name
    tokens = facts["train"]["tokens"]
    return Part(name, facts["kind"], facts["documents"], tokens, (), str(folder))


def _planned() -> list[Part]:
    clinical = [source for source in sources() if source.kind == "clinical"]
    return [
        # Both together, as the reference's training configuration has it; no card tells them apart.
        Part("pubmed + pmc", "biomedical", 0, 50_735_000_000, ()),
        *(
            Part(source.name, "clinical", source.documents, source.tokens, ())
            for source in clinical
        ),
    ]


def _with_epochs(parts: list[Part], epochs: int, repeat: tuple[str, ...]) -> list[Part]:
    given = {}
    for entry in repeat:
        name, _, numbers = entry.partition("=")
        values = numbers.split(",")
        if name not in {part.name for part in parts} or len(values) != 2 or not all(
            value.isdecimal() for value in values
        ):  # fmt: skip
            raise ValueError(
                f"repeat {entry}: expected NAME=PHASE 1,PHASE 2 of one of "
                f"{', '.join(part.name for part in parts)}"
            )
        given[name] = (int(values[0]), int(values[1]))
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    usual = {"biomedical": (epochs, 0)}
    return [
        dataclasses.replace(
            part, epochs=given.get(part.name, usual.get(part.kind, (epochs, epochs)))
        )
        for part in parts
    ]


def table(parts: Sequence[Part]) -> str:
    """Documents, tokens of an epoch, and for each phase the epochs, tokens and share."""
    head = ["source", "kind", "documents", "tokens"]
    for phase in (1, 2):
        head += [f"phase {phase}", "tokens", "share"]
    rows = [head]
    for part in sorted(parts, key=lambda part: -part.tokens):
        documents = f"{part.documents:,}" if part.documents else "-"
        row = [part.name, part.kind, documents, f"{part.tokens:,}"]
        for phase in (0, 1):
            tokens = part.epochs[phase] * part.tokens
            share = tokens / max(budget(parts, phase), 1)
            row += [f"{part.epochs[phase]} x", f"{tokens:,}", f"{100 * share:.3g}%"]
        rows.append(row)
    documents, tokens = sum(p.documents for p in parts), sum(p.tokens for p in parts)
    total = ["total", "", f"{documents:,}", f"{tokens:,}"]
    for phase in (0, 1):
        total += ["", f"{budget(parts, phase):,}", "100%" if budget(parts, phase) else ""]
    return aligned([*rows, total], left=2)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows as columns of text; the first `left` of them flush left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def picture(parts: Sequence[Part]) -> bytes:
    """A PNG: tokens of each source in each phase, on a logarithmic scale, with its share."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    ordered = sorted(parts, key=lambda part: part.tokens)
    height = 1.2 + 0.26 * len(parts)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = {"clinical": "tab:blue", "biomedical": "tab:green", "generic": "tab:grey"}
    names = [part.name for part in ordered]
    for phase, axis in enumerate(axes):
        total = budget(parts, phase)
        tokens = [part.epochs[phase] * part.tokens for part in ordered]
        axis.barh(names, tokens, color=[colours[part.kind] for part in ordered])
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(title=f"phase {phase + 1}: {total:,} tokens", xlabel="tokens, all epochs")
        for place, count in enumerate(tokens):
            if count:
                axis.annotate(
                    f" {100 * count / total:.3g}%", (count, place), va="center", fontsize=7
                )
        axis.grid(axis="x", alpha=0.3)
    counts = [e * part.tokens for part in parts for e in part.epochs if e * part.tokens] or [1]
    axes[0].set_xlim(min(counts) / 5, max(counts) * 8)  # room for the shares
    kinds = dict.fromkeys(part.kind for part in reversed(ordered))
    axes[1].legend(handles=[Patch(color=colours[kind], label=kind) for kind in kinds], fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
