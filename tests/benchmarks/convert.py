"""Seconds and peak memory of each conversion of ModernBERT-base: python tests/benchmarks/convert.py

Makes a random HF folder of base size (571 MiB in float32) in a temporary directory and converts it
in fresh processes, each with two threads. Prints a table and one line of JSON. The aim: under 10 s
and under twice the file in memory, on two cores.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import sys
import numpy as np
from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.hf import write_hf
from modernbert_jax.checkpoint.params import param_shapes
from modernbert_jax.weights import weight_of

config, rng = ModernBertConfig.base(), np.random.default_rng(0)
shapes = param_shapes(ModernBertForMaskedLM, config)
tensors = {
    key: rng.standard_normal(weight_of(key).hf_shape(tuple(v.shape)), np.float32) * 0.02
    for key, v in shapes.items()
}
write_hf(sys.argv[1], config, tensors, architecture="ModernBertForMaskedLM")
"""
VERBS = (
    ("from-hf", "hf", "orbax"),
    ("to-hf", "orbax", "back"),
    ("to-composer", "orbax", "c.pt"),
    ("from-composer", "c.pt", "orbax2"),
)
REPORT = re.compile(r"([\d.]+) s, peak memory (\d+) MiB \(([\d.]+) times the file\)")


def python(*args: str) -> str:
    """The output of Python in a process of its own, so that no peak counts another's memory."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def main() -> None:
    """Prints the table, then the same as JSON."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        python("-c", MAKE, f"{folder}/hf")
        print(f"{'':14} {'seconds':>8} {'peak MiB':>9} {'peak/file':>10}")
        for verb, src, dst in VERBS:
            out = python("-m", "convert", verb, f"{folder}/{src}", f"{folder}/{dst}")
            found = REPORT.search(out)
            assert found, out
            seconds, peak, ratio = float(found[1]), int(found[2]), float(found[3])
            rows[verb] = {"seconds": seconds, "peak_mib": peak, "peak_over_file": ratio}
            print(f"{verb:14} {seconds:8.1f} {peak:9d} {ratio:10.2f}", flush=True)
        one, other = (Path(folder, name, "model.safetensors") for name in ("hf", "back"))
        same = python("-c", "import filecmp, sys; print(filecmp.cmp(*sys.argv[1:], False))",
                      str(one), str(other)).strip() == "True"  # fmt: skip
    print(f"hf -> orbax -> hf, same bytes: {same}")
    print(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
