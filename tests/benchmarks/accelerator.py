"""Everything that a kind of GPU or TPU must show, in one command of at most half an hour.

    python -m tests.benchmarks.accelerator [--json FILE] [--minutes 30]
    python -m tests.benchmarks.accelerator --quick       tiny shapes, for a CPU

Correctness and speed of every implementation of attention (python -m modernbert_jax.attention), the
op beside its peers (attention.py), and the train step of base and large with sequences of 1024 and
8192, full and packed, beside torch where it is installed (train_step.py). Each part is a process of
its own, so that one that fails or takes too long leaves the others' results.

The JSON lists in "measured" the kernels that were right, and faster than `xla`, in all layers. Put
the file into tests/benchmarks/results; tests/test_attention.py then fails until PROVEN in
modernbert_jax/attention/dispatch.py calls the same kernels MEASURED, which makes them the default.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def parts(quick: bool) -> dict[str, list[str]]:
    """Returns the arguments of Python for each part, the most important first."""
    # As modules, because the folder of a script is first on the path, and ours has a tokenize.py.
    check, op = ["-m", "modernbert_jax.attention"], ["-m", "tests.benchmarks.attention"]
    train = ["-m", "tests.benchmarks.train_step"]
    if quick:
        return {
            "check": [*check, "--length", "128"],
            "attention": [*op, "--lengths", "128", "--heads", "2", "--seconds", "0.01"],
            "train tiny 128": [*train, "--quick", "--seconds", "0.01"],
        }
    steps = {
        f"train {size} {length}": [*train, "--sizes", size, "--lengths", length, "--seconds", "5"]
        for size in ("base", "large")
        for length in ("8192", "1024")
    }
    op += ["--lengths", "1024", "8192", "--heads", "12", "--seconds", "0.3"]
    return {"check": check, **steps, "attention": op}


def run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Runs one part; returns its record, or {"failure": its last line}."""
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "record.json"
        command = [sys.executable, *arguments, "--json", str(record)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=max(1.0, seconds)
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"not finished after {seconds:.0f} s"}
        if record.exists():  # the self check ends with 1 if an implementation fails
            return json.loads(record.read_text())
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failure": lines[-1][:300]}


def measured(check: dict[str, Any]) -> list[str]:
    """Returns the kernels of a record of the self check that were right and fast in all layers."""
    from modernbert_jax.attention import KERNELS
    from modernbert_jax.attention.first_use import TOLERANCE

    def good(row: dict[str, Any]) -> bool:
        right = "failure" not in row and row["error"] <= TOLERANCE[row["dtype"]]
        return right and row["speed_against_xla"] > 1

    rows = check.get("results", [])
    named = {n: [row for row in rows if row["implementation"] == n] for n in KERNELS}
    return [name for name, own in named.items() if own and all(map(good, own))]


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Returns 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all parts together")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    found = {}
    for name, arguments in parts(args.quick).items():
        print(f"== {name}", flush=True)
        found[name] = run(arguments, end - time.monotonic())
        if "failure" in found[name]:
            print(found[name]["failure"], flush=True)
    check = found["check"]
    record = {
        "command": " ".join(["python -m tests.benchmarks.accelerator", *(argv or sys.argv[1:])]),
        **{key: check.get(key) for key in ("date", "device", "generation", "versions")},
        "measured": measured(check),
        "parts": found,
    }
    print(f"measured on {record['generation']}: {', '.join(record['measured']) or 'no kernel'}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(any("failure" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
