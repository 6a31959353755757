"""Tokens a second of `prepare`'s two stages on invented notes as long as MIMIC's.

    python tests/benchmarks/tokenizing.py --tokenizer FOLDER [--json FILE] [--notes 8_000]
        [--workers 2]

Writes one CSV of notes of about 2,000 characters (two or three of train/corpora/synthetic.py) and
prepares it. The aim is 1.2M tokens/s tokenized on two cores. `text` is reading, deduplicating and
writing the TFDS data set in one process; `tokenize` is the token stage, the start of its workers
included, over twice as many shards as workers. `tokens/CPU s` is what a core does alone: other
programs slow the clock, and hardly this. The load average says how busy the machine was.
"""

import argparse
import contextlib
import csv
import io
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import tokenizers

from modernbert_jax.tokenizer import AutoTokenizer, backend_json
from train.corpora.build import dataset as builder
from train.corpora.build.tokenize import Recipe, tokenize
from train.corpora.sources import find
from train.corpora.synthetic import synthetic_notes

CHARACTERS = 2_000


def write_notes(path: pathlib.Path, count: int) -> int:
    """A CSV of notes; returns its bytes."""
    short = synthetic_notes(10**9, seed=0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        for _ in range(count):
            note = next(short)
            while len(note) < CHARACTERS:
                note += "\n\n" + next(short)
            writer.writerow([note])
    return path.stat().st_size


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(folder: pathlib.Path, tokenizer: str, notes: int, workers: int) -> dict[str, Any]:
    """Both stages once."""
    size = write_notes(folder / "notes.csv", notes)
    builder.SHARD_BYTES = size // (2 * workers)
    before, start = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says much
        text, counts = builder.build(
            find("csv"), folder / "notes.csv", folder / "text", folder / "work", eval_fraction=0.0
        )
    read, read_cpu = time.perf_counter() - start, cpu_seconds() - before
    encoder = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
    ends = encoder.cls_token_id, encoder.sep_token_id
    assert ends[0] is not None and ends[1] is not None
    recipe = Recipe(backend_json(encoder), len(encoder), (ends[0], ends[1]), sequence_length=8192)
    shards = {"train": [(p, str(p)) for p in sorted(text.glob("*.array_record-*"))]}
    before, start = cpu_seconds(), time.perf_counter()
    facts = tokenize(shards, recipe, folder / "work" / "t", folder / "tokens", "", {}, workers)[
        "train"
    ]
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    tokens = facts["tokens"]
    return {
        "documents": counts["documents"],
        "tokens": tokens,
        "characters_per_token": counts["text_bytes"] / tokens,
        "text_mb_per_second": counts["text_bytes"] / read / 1e6,
        "text_mb_per_cpu_second": counts["text_bytes"] / read_cpu / 1e6,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--notes", type=int, default=8_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            pathlib.Path(folder), arguments.tokenizer, arguments.notes, arguments.workers
        )
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(
        f"{result['documents']:,} notes, {result['tokens']:,} tokens, "
        f"{result['characters_per_token']:.2f} bytes a token; load average {load} on "
        f"{os.cpu_count()} cores\n"
        f"text      {result['text_mb_per_second']:6.1f} MB/s   "
        f"{result['text_mb_per_cpu_second']:6.1f} MB/CPU s\n"
        f"tokenize  {result['tokens_per_second'] / 1e6:6.2f} M tokens/s   "
        f"{result['tokens_per_cpu_second'] / 1e6:6.2f} M tokens/CPU s   "
        f"({arguments.workers} processes)"
    )
    if arguments.json:
        versions = {"tokenizers": tokenizers.__version__, "python": platform.python_version()}
        record = {"time": datetime.now(UTC).isoformat(), "load": os.getloadavg()} | versions
        arguments.json.write_text(json.dumps(record | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
