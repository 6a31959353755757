"""What the tests of tasks share: examples by the names of their labels, and .ann files."""

from collections import Counter

from train.finetune.tasks.task import Data


def names(data: Data, split: str) -> list:
    """(text or words, label by name) of each example of a split."""
    found = []
    for example in getattr(data, split):
        if example.words:
            found.append((example.words, tuple(data.labels[i] for i in example.label)))
        elif isinstance(example.label, tuple):
            on = [name for name, one in zip(data.labels, example.label, strict=True) if one]
            found.append((example.text, on))
        else:
            found.append((example.text, data.labels[example.label]))
    return found


def everything(data: Data) -> list:
    return [one for split in ("train", "validation", "test") for one in names(data, split)]


def ann(text: str, *spans: tuple[str, str], start: int = 0) -> str:
    """T lines of (type, piece of the text); of the same piece the next occurrence."""
    lines, seen = [], Counter()
    for i, (kind, piece) in enumerate(spans, start=1):
        at = -1
        for _ in range(seen[piece] + 1):
            at = text.index(piece, at + 1)
        seen[piece] += 1
        lines.append(f"T{i}\t{kind} {start + at} {start + at + len(piece)}\t{piece}\n")
    return "".join(lines)
