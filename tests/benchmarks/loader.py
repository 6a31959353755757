"""Packed and masked tokens a second of the training loader, plan included.

    python tests/benchmarks/loader.py [--json FILE] [--tokens 40_000_000] [--sequence-length 8192]

Writes token folders of random ids (lognormal lengths, sigma 1; of mean 1,000 tokens, as articles
have, and 200, as notes) and draws one epoch of batches from each, masked at 30 %, in 1 thread, 2
threads and 2 worker processes. `tokens/s` counts from the first call to the last batch, the plan
included; `after start` from the first batch on, since a worker process takes seconds to import the
package, once. `tokens/CPU s` is what a core would do alone: other programs on the machine slow the
clock, and hardly this (for processes it includes their start). The aim: 1.5M tokens/s on two cores
and a fill above 99 % at 8192. The files were just written, so they come from memory.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from train.pretrain.config import Phase, TrainConfig
from train.pretrain.data import Batches, Plans
from train.pretrain.masking import Masking
from train.tokens.store import TokenStore, open_store
from train.tokens.writer import SplitWriter, write_manifest

MASKING = Masking(rate=0.30, mask_id=4, vocab_size=50_368, special_ids=(0, 1, 2, 3, 4))
MODES = {
    "1 thread": {"threads": 1},
    "2 threads": {"threads": 2},
    "2 processes": {"threads": 1, "workers": 2},
}


def write_tokens(folder: pathlib.Path, mean: float, tokens: int, longest: int) -> TokenStore:
    """A token folder of random ids."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    facts = {}
    for split, share in (("train", 1.0), ("eval", 0.01)):
        lengths = rng.lognormal(np.log(mean) - 0.5, 1, int(share * tokens / mean))
        writer = SplitWriter(folder, split, np.dtype("<u2"))
        for length in np.clip(lengths, 3, longest).astype(int).tolist():
            writer.add(rng.integers(5, 50_000, length))
        facts[split] = writer.close()
    write_manifest(folder, documents=0, tokenizer="", dtype=np.dtype("<u2"), splits=facts)
    return open_store(folder)["train"]


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def draw(store: TokenStore, config: TrainConfig, how: dict[str, Any]) -> dict[str, float]:
    """One epoch of batches."""
    before, start = cpu_seconds(), time.perf_counter()
    batches = Batches(store, MASKING, config, phase=0, **how)
    batch = next(batches)
    first, first_tokens = time.perf_counter(), batch.tokens
    tokens, rows, masked, dropped = batch.tokens, batch.sequences, batch.masked, batch.dropped
    while batch.epoch == 0:
        batch = next(batches)
        tokens, rows = tokens + batch.tokens, rows + batch.sequences
        masked, dropped = masked + batch.masked, dropped + batch.dropped
    end = time.perf_counter()
    batches.close()
    return {
        "tokens_per_second": tokens / (end - start),
        "tokens_per_second_after_start": (tokens - first_tokens) / (end - first),
        "tokens_per_cpu_second": tokens / (cpu_seconds() - before),
        "fill": tokens / (rows * config.sequence_length),
        "masked_share": masked / tokens,
        "dropped": dropped,
        "tokens": tokens,
    }


def main() -> None:
    """Prints a table; with --json, writes the same to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--sequence-length", type=int, default=8192)
    args = parser.parse_args()
    config = TrainConfig(
        phases=(Phase(tokens=10**12),),
        sequence_length=args.sequence_length,
        global_batch_size=32,
        gradient_accumulation_steps=4,
    )
    report = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("grain", "array-record", "numpy")
        }
        | {"python": platform.python_version()},
        "cases": {},
    }
    print(f"{'':24} {'tokens/s':>9} {'after start':>11} {'/CPU s':>9} {'fill':>8} {'dropped':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for mean in (1000, 200):
            path = pathlib.Path(folder, str(mean))
            store = write_tokens(path, mean, args.tokens, args.sequence_length)
            start = time.perf_counter()
            plans = Plans(store, args.sequence_length, (17, 0))
            plans(0)
            seconds = time.perf_counter() - start
            plans.close()
            case = {"pieces": len(store.lengths), "plan_seconds": seconds}
            print(f"mean {mean}: {len(store.lengths):,} pieces, plan {seconds:.3f} s")
            for mode, how in MODES.items():
                row = case[mode] = draw(store, config, how)
                print(
                    f"{mode:>24} {row['tokens_per_second'] / 1e6:8.2f}M "
                    f"{row['tokens_per_second_after_start'] / 1e6:10.2f}M "
                    f"{row['tokens_per_cpu_second'] / 1e6:8.2f}M {row['fill']:8.2%} "
                    f"{row['dropped']:7}",
                    flush=True,
                )
            report["cases"][f"mean {mean}"] = case
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
