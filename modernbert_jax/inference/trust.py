"""Which exported functions may run: those that this user wrote, by their digests.

An exported function is a program. A file beside the weights proves nothing, since whoever wrote the
program could write that file too, so the digests are kept in the user's own cache folder
(modernbert_jax.cache).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re

import jax

from modernbert_jax.cache import cache_folder
from modernbert_jax.checkpoint.files import CONFIG_FILE, write_text

# What XLA itself provides, and the kernels of this project. A call of any other target would hand
# the program's numbers to code of this process.
ALLOWED_CALLS = frozenset(
    {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "shape_assertion"}
    | {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}
)


def weights_digest(folder: str | os.PathLike[str]) -> str:
    """Returns the sha256 (hex) of the configuration and the weights in a folder, file by file."""
    root = pathlib.Path(folder)
    total = hashlib.sha256()
    for path in [root / CONFIG_FILE, *sorted(root.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def remember(program: bytes, weights: str) -> None:
    """Notes that this user exported `program` for the weights with that digest."""
    record = _record(program)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(_facts(weights)) + "\n")


def objection(program: bytes, weights: str) -> str | None:
    """Returns why `program` must not run with these weights, None if it may."""
    try:
        facts = json.loads(_record(program).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not exported by this user on this machine"
    if facts != _facts(weights):
        return "exported for other weights or by another version"
    return None


def unknown_calls(program: str) -> list[str]:
    """Returns the targets of custom calls in a StableHLO text that are not in ALLOWED_CALLS."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    targets = re.findall(rf"custom_call\s+@({quoted}|[\w.$-]+)", program)
    targets += re.findall(rf"call_target_name\s*=\s*({quoted})", program)
    return sorted({target.strip('"') for target in targets} - ALLOWED_CALLS)


def _facts(weights: str) -> dict[str, str]:
    from modernbert_jax import __version__

    return {"weights": weights, "modernbert_jax": __version__, "jax": jax.__version__}


def _record(program: bytes) -> pathlib.Path:
    return cache_folder() / "exported" / f"{hashlib.sha256(program).hexdigest()}.json"
