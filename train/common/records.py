"""Files that this project writes and reads back: damaged ones are named, never half believed.

It imports neither the library nor jax, which the workers of `prepare` would wait for.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

_DELETE = "delete it, and the same command makes it again"


def read_object(path: Any, *keys: str, remedy: str = _DELETE) -> dict[str, Any]:
    """Returns the JSON object in a file, which has these keys; {} without the file.

    Raises ValueError, which names the file and the remedy, if it holds anything else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise ValueError(
            f"{path}: expected a JSON object{' with ' if keys else ''}{', '.join(keys)}, found "
            f"something else: the file is damaged; {remedy}"
        )
    return found


def write_object(path: Any, value: dict[str, Any], indent: int | None = None) -> None:
    """Writes a JSON object to a local file, atomically.

    As `modernbert_jax.checkpoint.files.write_text` does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_lines(path: Any, *keys: str) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines that have these keys; [] without the file.

    Other lines are left out: a crash cuts the last one short, a disk may damage any.
    """
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and all(key in line for key in keys):
            lines.append(line)
    return lines


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Raises an OSError of the block, which may name no file, as one that names this file."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space, then the "
            "same command resumes from the last checkpoint"
        ) from None
