"""ModernBERT-base forward in float32 beside transformers + torch (sdpa), in one process.

    python tests/benchmarks/model.py [--json FILE] [--quick]

Same weights, same inputs, calls of both in turn. Fixed lengths 1x128, 8x512, 1x2048, 1x8192, and
variable ones: sequences of lognormal length padded for torch and packed for us. Prints tokens a
second, the ratio of times (above 1: we are faster) and, in processes of their own, the peak memory
at 1x8192. A ratio on a shared machine moves by a few hundredths from run to run.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import machine
import numpy as np

FIXED = {"1x128": (1, 128), "8x512": (8, 512), "1x2048": (1, 2048), "1x8192": (1, 8192)}
VOCABULARY = 50368


def torch_model():
    """transformers' model with seeded weights, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = transformers.ModernBertConfig(attn_implementation="sdpa")
    return transformers.ModernBertModel(config).eval()


def our_model(reference=None):
    """Ours, with the weights of `reference` or fresh ones, as a compiled function."""
    import jax
    from flax import nnx

    import modernbert_jax as mj
    from modernbert_jax.checkpoint.hf import hf_to_params
    from modernbert_jax.checkpoint.params import module_of

    config = mj.ModernBertConfig.base()
    if reference is None:
        model = mj.ModernBertModel(config, rngs=nnx.Rngs(0))
    else:
        tensors = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
        params = hf_to_params(mj.ModernBertModel, config, tensors)
        model = module_of(mj.ModernBertModel, config, jax.tree.map(jax.numpy.asarray, params))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, ids, segment_ids):
        return nnx.merge(graph, state)(ids, segment_ids=segment_ids).last_hidden_state

    return lambda ids, segment_ids=None: run(state, ids, segment_ids)


def paired(ours, theirs, seconds: float) -> tuple[list[float], list[float]]:
    """Times of both, in turn, for at least `seconds` and three rounds after a warm-up."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, kept in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return times


def variable_case(count: int, longest: int):
    """(padded ids, mask) and (packed ids, segment ids) of the same sequences."""
    from modernbert_jax.packing import plan_rows

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(longest / 4), 0.8, count).astype(int), 16, longest)
    documents = [rng.integers(100, 50000, n) for n in lengths]
    width = int(lengths.max())
    ids, mask = np.full((count, width), 50283), np.zeros((count, width), np.int64)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document, 1
    plan = plan_rows(lengths, longest)
    packed = np.full((len(plan), longest), 50283, np.int32)
    segments = np.zeros((len(plan), longest), np.int32)
    for row in range(len(plan)):
        end = 0
        for number, d in enumerate(plan.row(row), start=1):
            packed[row, end : end + lengths[d]] = documents[d]
            segments[row, end : end + lengths[d]] = number
            end += lengths[d]
    return ids, mask, packed, segments, int(lengths.sum())


def measure(cases: list[str], seconds: float) -> list[dict]:
    """A result for each case."""
    import jax
    import torch

    reference = torch_model()
    ours = our_model(reference)
    results = []
    for case in cases:
        if case in FIXED:
            shape = FIXED[case]
            ids = np.random.default_rng(0).integers(100, 50000, shape)
            padded, mask, packed, segments, tokens = ids, None, ids.astype(np.int32), None, ids.size
        else:
            count, longest = (int(x) for x in case.removeprefix("variable ").split("x"))
            padded, mask, packed, segments, tokens = variable_case(count, longest)
        t_ids = torch.tensor(padded)
        t_mask = None if mask is None else torch.tensor(mask)

        @torch.no_grad()
        def theirs_call(t_ids=t_ids, t_mask=t_mask):
            return reference(t_ids, t_mask).last_hidden_state

        def ours_call(packed=packed, segments=segments):
            return jax.block_until_ready(ours(packed, segments))

        if segments is None:
            want, got = theirs_call().numpy(), np.asarray(ours_call())
            error = float(np.abs(got - want).max() / np.abs(want).max())
            assert error < 1e-4, error
        mine, other = paired(ours_call, theirs_call, seconds)
        row = {
            "case": case,
            "ours_seconds": min(mine),
            "torch_seconds": min(other),
            "ratio": min(other) / min(mine),
            "ratio_of_medians": float(np.median(other) / np.median(mine)),
            "tokens_per_second": tokens / min(mine),
        }
        results.append(row)
        print(
            f"{case:18} ours {row['ours_seconds']:8.3f} s   torch {row['torch_seconds']:8.3f} s   "
            f"{row['ratio']:.2f}x (medians {row['ratio_of_medians']:.2f}x)   "
            f"{row['tokens_per_second']:8.0f} tok/s",
            flush=True,
        )
    return results


def peak(which: str) -> float:
    """Peak memory in MiB of one forward at 1x8192 in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--peak-of", which], capture_output=True, text=True, check=True
    )
    return float(out.stdout.strip().splitlines()[-1])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="without 8192 and peak memory")
    parser.add_argument(
        "--cases", nargs="*", default=[*FIXED, "variable 32x512", "variable 8x2048"]
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="a case, at least")
    parser.add_argument("--peak-of", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.peak_of:
        ids = np.random.default_rng(0).integers(100, 50000, (1, 8192))
        if args.peak_of == "ours":
            import jax

            jax.block_until_ready(our_model()(ids.astype(np.int32)))
        else:
            import torch

            with torch.no_grad():
                torch_model()(torch.tensor(ids))
        # Not getrusage: its maximum is handed down by the process that started this one.
        status = pathlib.Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
        return
    import jax
    import torch
    import transformers

    cases = [c for c in args.cases if not (args.quick and "8192" in c)]
    record = {
        "command": "python tests/benchmarks/model.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.cpu(),
        "generation": "cpu",
        "implementation": "xla",
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": measure(cases, args.seconds),
    }
    if not args.quick:
        record["peak_mib_1x8192"] = {which: peak(which) for which in ("ours", "torch")}
        print("peak memory at 1x8192, MiB:", record["peak_mib_1x8192"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
