"""Checks and times every implementation of attention that can run on this device.

    python -m modernbert_jax.attention                  prints a table in about a minute
    python -m modernbert_jax.attention --json out.json  also writes it to a file

The table shows the error of the forward and backward pass against the reference in float32, and the
speed relative to `xla`, for packed sequences in local and global layers.
"""

import argparse
import functools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import jax

from modernbert_jax import attention as op
from modernbert_jax.attention.first_use import LENGTH, TOLERANCE, both_passes, case, error_of

HEADS, HEAD_DIM, WINDOW = 12, 64, 64


def named(name: str) -> Callable[..., jax.Array]:
    """Returns the op with this implementation."""
    return functools.partial(op.attention, implementation=name)


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
        of = functools.partial(
            case, window=window, dtype=dtype, heads=HEADS, head_dim=HEAD_DIM, whole=whole
        )
        *arrays, bounds = of(2 if on_cpu else 4, length)
        base = None
        for name in op.IMPLEMENTATIONS[1:]:
            reason = op.refusal(name, arrays[0], bounds, device)
            if reason is not None:
                if window is not None or name == "cudnn" and whole:
                    print(f"{name:15} {layer:14} {reason}")
                continue
            row = {"implementation": name, "layer": layer, "length": length, "dtype": dtype}
            try:
                row["error"] = error_of(named(name), *of(2, LENGTH))
                forward = jax.jit(
                    lambda q, k, v, name=name, bounds=bounds: named(name)(
                        q, k, v, bounds, scale=HEAD_DIM**-0.5
                    )
                )
                row["forward_seconds"] = seconds_of(forward, arrays[:3])
                row["both_seconds"] = seconds_of(both_passes(named(name), bounds), arrays)
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
    print(f"implementation=None runs {op.check(device, dtype=dtype, head_dim=HEAD_DIM).reason}")
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
