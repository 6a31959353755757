"""python -m train mixture: shows the tokens and share of each source in a run's phases.

BioClinical ModernBERT trains three epochs on everything in phase 1 and three epochs on the clinical
corpora in phase 2. The numbers come from prepared folders; without any, they are those of the model
card, as a plan.
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence

from modernbert_jax.checkpoint.files import write_bytes

from ...common.records import read_object
from ...common.settings import check_set
from ..sources import sources


@dataclasses.dataclass(frozen=True)
class Part:
    """A corpus in a mixture. tokens: in one epoch of its train split. epochs: in each phase."""

    name: str
    kind: str  # clinical, biomedical or generic
    documents: int
    tokens: int
    epochs: tuple[int, ...]
    folder: str = ""


def budget(parts: Sequence[Part], phase: int) -> int:
    """The number of tokens in a phase."""
    return sum(part.epochs[phase] * part.tokens for part in parts)


def flags(parts: Sequence[Part], phase: int) -> str:
    """Flags of `pretrain` for a phase. A corpus listed n times is repeated n times per epoch."""
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
    png: str | None = None,
) -> str:
    """Tabulates documents, tokens and shares of each source, with the flags that train on them.

    Args:
        prepared: outputs of `prepare`, or a folder of them (--corpus all); none shows the plan.
        epochs: number of epochs on everything in phase 1, on the clinical corpora in phase 2.
        repeat: other epochs for a source, NAME=PHASE 1,PHASE 2, such as medqa=3,6.
        png: file for a chart of the table.
    """
    check_set(png=png)
    parts = [_prepared(folder) for name in prepared for folder in _folders(pathlib.Path(name))]
    if not prepared:
        parts = _planned()
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"prepared: expected each source once, got {', '.join(names)}")
    parts = _with_epochs(parts, epochs, repeat)
    if png is not None:
        write_bytes(pathlib.Path(png), picture(parts))
    lines = [table(parts)]
    if prepared:
        lines += [flags(parts, phase) for phase in (0, 1) if budget(parts, phase)]
    return "\n".join(lines)


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    complete = [f for f in found if (f / "tokens" / "manifest.json").is_file()]
    if not complete:
        raise FileNotFoundError(
            f"prepared {folder}: expected an output of `python -m train prepare`, or a folder of "
            "them, found none"
        )
    return complete


def _prepared(folder: pathlib.Path) -> Part:
    facts = read_object(folder / "tokens" / "manifest.json", "source", "kind", "documents", "train")
    name = facts["source"] if facts["kind"] != "generic" else folder.name
    tokens = facts["train"]["tokens"]
    return Part(name, facts["kind"], facts["documents"], tokens, (), str(folder))


def _planned() -> list[Part]:
    clinical = [source for source in sources() if source.kind == "clinical"]
    return [
        # The reference's training configuration gives only their sum.
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
    """Formats documents, tokens in an epoch and, for each phase, the epochs, tokens and share."""
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
    """Aligns rows in columns; the first `left` columns are flush left, the others flush right."""
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
    """Plots the tokens of each source in each phase, with their shares; returns a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    ordered = sorted(parts, key=lambda part: part.tokens)
    height = 1.2 + 0.26 * len(parts)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    colors = {"clinical": "tab:blue", "biomedical": "tab:green", "generic": "tab:grey"}
    names = [part.name for part in ordered]
    for phase, axis in enumerate(axes):
        total = budget(parts, phase)
        tokens = [part.epochs[phase] * part.tokens for part in ordered]
        axis.barh(names, tokens, color=[colors[part.kind] for part in ordered])
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(title=f"phase {phase + 1}: {total:,} tokens", xlabel="tokens, all epochs")
        for position, count in enumerate(tokens):
            if count:
                axis.annotate(
                    f" {100 * count / total:.3g}%", (count, position), va="center", fontsize=7
                )
        axis.grid(axis="x", alpha=0.3)
    counts = [e * part.tokens for part in parts for e in part.epochs if e * part.tokens] or [1]
    axes[0].set_xlim(min(counts) / 5, max(counts) * 8)  # leaves room for the shares
    kinds = dict.fromkeys(part.kind for part in reversed(ordered))
    axes[1].legend(handles=[Patch(color=colors[kind], label=kind) for kind in kinds], fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
