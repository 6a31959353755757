"""Checks and times every implementation of attention that can run on this device.

    python -m modernbert_jax.attention                  prints a table in about a minute
    python -m modernbert_jax.attention --json out.json  also writes it to a file

The table shows the error of the forward and backward pass against the reference in float32, and the
speed relative to `xla`, for packed sequences in local and global layers.
"""

import argparse
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax import attention as op

HEADS, HEAD_DIM, WINDOW = 12, 64, 64
# Relative to the reference's largest value; allows for rounding of inputs and products.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def case(
    rows: int, length: int, window: int | None, dtype: str, whole: bool = False, seed: int = 0
) -> tuple[Any, ...]:
    """Makes (q, k, v, d_out, bounds): rows packed with segments of about 300 tokens."""
    rng = np.random.default_rng(seed)
    shape = (4, rows, length, HEADS, HEAD_DIM)
    arrays = jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    ids = np.ones((rows, length), np.int32)
    if not whole:
        for row in range(rows):
            cuts = np.sort(rng.choice(np.arange(1, length), max(1, length // 300), replace=False))
            ids[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
            ids[row, length - length // 50 :] = 0
    return (*arrays, op.make_bounds(jnp.asarray(ids), window, whole=whole))


def both_passes(name: str, bounds: op.Bounds) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the compiled function (q, k, v, d_out) -> (out, dq, dk, dv)."""

    def run(q, k, v, d_out):
        f = lambda q, k, v: op.attention(  # noqa: E731
            q, k, v, bounds, scale=HEAD_DIM**-0.5, implementation=name
        )
        out, pull = jax.vjp(f, q, k, v)
        return (out, *pull(d_out))

    return jax.jit(run)


def error_of(name: str, dtype: str, window: int | None, whole: bool) -> float:
    """The largest error of out, dq, dk and dv, relative to the reference's largest value."""
    *arrays, bounds = case(2, 1000, window, dtype, whole)
    got = both_passes(name, bounds)(*arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = both_passes("reference", bounds)(*exact)
    return max(
        float(jnp.max(jnp.abs(g.astype(jnp.float32) - w)) / jnp.max(jnp.abs(w)))
        for g, w in zip(got, want, strict=True)
    )


def seconds_of(run: Callable[..., Any], arrays: Sequence[jax.Array]) -> float:
    """Returns the time of the fastest of a few calls."""
    jax.block_until_ready(run(*arrays))
    times = []
    while len(times) < 5 and sum(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: list[str] | None = None) -> int:
    """Prints the table. Returns 1 if an implementation exceeds its tolerance, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m modernbert_jax.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    parser.add_argument("--length", type=int, help="sequence length in the timings, in tokens")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    length = args.length or (1024 if on_cpu else 8192)
    dtype = "float32" if on_cpu else "bfloat16"
    print(f"{device.device_kind} ({op.generation_of(device)}), jax {jax.__version__}, {dtype}")
    print(f"{'implementation':15} {'layer':14} {'error':>9} {'fwd ms':>9} {'both ms':>9}  vs xla")
    results, failed = [], False
    for window, whole in ((WINDOW, False), (None, False), (None, True)):
        layer = f"{'global' if window is None else 'local'}{', whole' if whole else ', packed'}"
        *arrays, bounds = case(2 if on_cpu else 4, length, window, dtype, whole)
        base = None
        for name in op.IMPLEMENTATIONS[1:]:
            reason = op.refusal(name, arrays[0], bounds, device)
            if reason is not None:
                if window is not None or name == "cudnn" and whole:
                    print(f"{name:15} {layer:14} {reason}")
                continue
            row = {"implementation": name, "layer": layer, "length": length, "dtype": dtype}
            try:
                row["error"] = error_of(name, dtype, window, whole)
                forward = jax.jit(
                    lambda q, k, v, name=name, bounds=bounds: op.attention(
                        q, k, v, bounds, scale=HEAD_DIM**-0.5, implementation=name
                    )
                )
                row["forward_seconds"] = seconds_of(forward, arrays[:3])
                row["both_seconds"] = seconds_of(both_passes(name, bounds), arrays)
            except Exception as error:  # a kernel that fails is a result too
                first = str(error).strip().split("\n")[0]
                row["failure"] = f"{type(error).__name__}: {first}"
                print(f"{name:15} {layer:14} {row['failure'][:200]}")
                results.append(row)
                failed = True
                continue
            base = base or row["both_seconds"]
            row["speed_against_xla"] = base / row["both_seconds"]
            good = row["error"] <= TOLERANCE[dtype]
            failed |= not good
            print(
                f"{name:15} {layer:14} {row['error']:9.1e} {row['forward_seconds'] * 1e3:9.2f} "
                f"{row['both_seconds'] * 1e3:9.2f}  {row['speed_against_xla']:.2f}x"
                f"{'' if good else '  exceeds the tolerance'}"
            )
            results.append(row)
    q, *_, bounds = case(1, 1024, None, dtype)
    print(f"implementation=None runs {op.choose(q, bounds, device).reason}")
    if args.json:
        record = {
            "command": "python -m modernbert_jax.attention",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.device_kind,
            "generation": op.generation_of(device),
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {args.json}; contribute it as a file in tests/benchmarks/results")
    else:
        print("--json FILE writes these results to a file that you can contribute")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
