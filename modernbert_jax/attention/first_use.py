"""The first-use check: finds out whether a kernel is right on a device by running it there.

A kernel that was never measured on a kind of device runs there once, forward and backward, on small
packed sequences, and is compared with `reference`. The outcome is kept in the user's cache folder
(attention/*.json) for this kind of device, this source code, and the versions of jax and of the
driver, so that later processes need not repeat it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax.attention import reference
from modernbert_jax.attention.bounds import Bounds, make_bounds
from modernbert_jax.attention.rope import Rope, rope_tables, rotated
from modernbert_jax.cache import cache_folder

# Relative to the reference's largest value; allows for rounding of inputs and products.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
LENGTH = 1300  # several tiles of each kernel; no multiple of one
WINDOWS = (64, None)  # a local and a global layer
_HEADS = 2
_LONGEST_CHECK = 600.0  # seconds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a kernel passed, and its error or what went wrong, in one line."""

    passed: bool
    reason: str


def case(
    rows: int,
    length: int,
    window: int | None,
    *,
    dtype: str,
    heads: int,
    head_dim: int,
    whole: bool = False,
) -> tuple[Any, ...]:
    """Makes (q, k, v, d_out, bounds): rows packed with segments of about 300 tokens."""
    rng = np.random.default_rng(0)
    shape = (4, rows, length, heads, head_dim)
    arrays = jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    ids = np.ones((rows, length), np.int32)
    if not whole:
        for row in range(rows):
            cuts = np.sort(rng.choice(np.arange(1, length), max(1, length // 300), replace=False))
            ids[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
            ids[row, length - length // 50 :] = 0
    return (*arrays, make_bounds(jnp.asarray(ids), window, whole=whole))


def both_passes(attention: Callable[..., Any], bounds: Bounds) -> Callable[..., Any]:
    """Returns the compiled function (q, k, v, d_out) -> (out, dq, dk, dv)."""

    def run(q, k, v, d_out):
        f = lambda q, k, v: attention(q, k, v, bounds, scale=q.shape[-1] ** -0.5)  # noqa: E731
        out, pull = jax.vjp(f, q, k, v)
        return (out, *pull(d_out))

    return jax.jit(run)


def error_of(
    attention: Callable[..., Any],
    *arrays: Any,
    reference: Callable[..., Any] = reference.attention,
) -> float:
    """Returns the largest error of out, dq, dk and dv, relative to the reference's largest value.

    arrays: of `case`. The reference computes in float32. NaN if a result has a NaN.
    """
    *inputs, bounds = arrays
    got = both_passes(attention, bounds)(*inputs)
    want = both_passes(reference, bounds)(*(x.astype(jnp.float32) for x in inputs))
    errors = [
        float(jnp.max(jnp.abs(g.astype(jnp.float32) - w)) / jnp.max(jnp.abs(w)))
        for g, w in zip(got, want, strict=True)
    ]
    return float(np.max(errors))


def packed(attention: Callable[..., Any], per_block: int, rope: Rope) -> Callable[..., Any]:
    """Returns `attention` called as layers do: q, k and v in one array, rotated by the kernel."""

    def run(q, k, v, bounds, *, scale):
        B, L, H, K = q.shape
        qkv_BLTGJK = jnp.stack([q, k, v], axis=2).reshape(B, L, 3, H // per_block, per_block, K)
        qkv_BLGTJK = jnp.swapaxes(qkv_BLTGJK, 2, 3)
        out = attention(qkv_BLGTJK, None, None, bounds, scale=scale, rope=rope)
        return out.reshape(q.shape)

    return run


def examine(
    name: str,
    attention: Callable[..., Any],
    device: Any,
    dtype: str,
    head_dim: int,
    per_block: int = 0,
) -> Outcome:
    """Runs the check of the kernel `name` on `device` now, and remembers and returns its outcome.

    per_block: if not 0, the number of heads of one block in which the kernel also takes q, k and v,
    and rotates them; this form, which training uses, is then checked too. A record on disk that the
    check has begun is found by the next process if this one crashes or hangs.
    """
    facts = _facts(name, device, dtype, head_dim)
    _write(facts, {"started": [time.time(), socket.gethostname(), os.getpid()]})
    heads = max(_HEADS, per_block)
    of = functools.partial(case, 2, LENGTH, dtype=dtype, heads=heads, head_dim=head_dim)
    try:
        with jax.default_device(device):
            errors = [error_of(attention, *of(window)) for window in WINDOWS]
            if per_block:
                rope = rope_tables(jnp.arange(LENGTH)[None], head_dim, 10_000.0)
                trained = packed(attention, per_block, rope)
                outside = functools.partial(rotated, reference.attention, rope=rope)
                errors += [error_of(trained, *of(w), reference=outside) for w in WINDOWS]
            error = float(np.max(errors))
    except Exception as failure:  # whatever a compiler or a driver raises
        first = str(failure).strip().split("\n")[0][:200]
        outcome = Outcome(False, f"{type(failure).__name__}: {first}")
    else:
        good = error <= TOLERANCE[dtype]
        outcome = Outcome(good, f"error {error:.1e}, tolerance {TOLERANCE[dtype]:.0e}")
    note(name, device, dtype, head_dim, outcome)
    _write(facts, {"passed": outcome.passed, "reason": outcome.reason})
    return outcome


def note(name: str, device: Any, dtype: str, head_dim: int, outcome: Outcome) -> None:
    """Sets the outcome that this process goes by."""
    _OUTCOMES[_digest(_facts(name, device, dtype, head_dim))] = outcome


def remembered(name: str, device: Any, dtype: str, head_dim: int) -> Outcome | None:
    """Returns the outcome of a check in this process or a former one, None if there was none."""
    facts = _facts(name, device, dtype, head_dim)
    known = _OUTCOMES.get(_digest(facts))
    return known or _read(facts)


_OUTCOMES: dict[str, Outcome] = {}


def _facts(name: str, device: Any, dtype: str, head_dim: int) -> dict[str, Any]:
    """Returns what an outcome depends on."""
    return {
        "implementation": name,
        "source": _source_digest(),
        "device": device.device_kind,
        "runtime": str(getattr(getattr(device, "client", None), "platform_version", "")),
        "jax": [jax.__version__, version("jaxlib")],
        "dtype": dtype,
        "head_dim": head_dim,
    }


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _path(facts: dict[str, Any]) -> pathlib.Path:
    return cache_folder() / "attention" / f"{_digest(facts)}.json"


def _read(facts: dict[str, Any]) -> Outcome | None:
    """Returns the outcome on disk; None if there is none, or if the file is damaged."""
    path = _path(facts)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["facts"] != facts:
            return None
        if "started" not in record:
            return Outcome(record["passed"] is True, str(record["reason"]))
        when, host, process = record["started"]
        ended = host == socket.gethostname() and not _is_alive(process)
        if ended or time.time() - when > _LONGEST_CHECK:
            return Outcome(False, f"a process crashed or hung in it; delete {path} to check again")
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def _is_alive(process: int) -> bool:
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _write(facts: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes a record under a name of its own and renames it: several processes may do so."""
    path = _path(facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".", suffix=".tmp", delete=False
        ) as file:
            json.dump({"facts": facts, **record}, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"{path.parent}: cannot be written ({error.strerror}), so the check of attention is "
            "not remembered; set MODERNBERT_JAX_CACHE to another folder",
            stacklevel=4,
        )
