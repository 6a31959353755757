"""The op beside its peers on whatever device is there, forward and backward, in one process.

    python tests/benchmarks/attention.py [--json FILE] [--lengths 512 8192] [--seconds 1]

On a GPU: bf16, 16k tokens, 12 and 16 heads of 64, against torch SDPA (its best backend), torch
FlexAttention with the window, cuDNN through jax.nn and tokamax where it can be imported. On a CPU:
float32, 2k tokens, against torch SDPA. Packed rows are also timed as one whole segment, which is
what no skipping costs. TFLOP/s count 4 B H L^2 D forward and 2.5 times that backward; local layers
are judged in GB/s of q, k, v, out (and their gradients). A peer that cannot run is named with its
reason.
"""

import argparse
import functools
import json
import pathlib
import platform
import time
from datetime import UTC, datetime

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax import attention as op

HEAD_DIM, WINDOW, MEAN_SEGMENT = 64, 64, 1024


def seconds_of(call, wait, seconds: float) -> float:
    """The median time of a call over about `seconds`, after a warm-up."""
    wait(call())
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        wait(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def segments(rows: int, length: int) -> np.ndarray:
    """Packed rows: lengths around MEAN_SEGMENT tokens, or a quarter of a shorter row."""
    rng = np.random.default_rng(0)
    mean = min(MEAN_SEGMENT, length // 4)
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        ends = np.cumsum(np.maximum(1, rng.exponential(mean, length).astype(int)))
        ids[row] = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return ids


def of_jax(function, arrays, seconds):
    """(forward seconds, backward seconds) of function(q, k, v) in jax."""
    q, k, v, d_out = arrays
    forward = jax.jit(function)

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return (out, *pull(d_out))

    one = seconds_of(lambda: forward(q, k, v), jax.block_until_ready, seconds)
    two = seconds_of(lambda: both(q, k, v, d_out), jax.block_until_ready, seconds)
    return one, two - one


def of_torch(function, arrays, seconds, device):
    """The same of function(q, k, v) in torch, tensors [B, H, L, K]."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v, d_out = (
        torch.tensor(np.asarray(x, np.float32)).to(device, dtype).transpose(1, 2).contiguous()
        for x in arrays
    )

    def wait(_):
        if device != "cpu":
            torch.cuda.synchronize()

    for x in (q, k, v):
        x.requires_grad_(True)

    def both():
        return torch.autograd.grad(function(q, k, v), (q, k, v), d_out)

    with torch.no_grad():
        one = seconds_of(lambda: function(q, k, v), wait, seconds)
    return one, seconds_of(both, wait, seconds) - one


def peers(window, device):
    """name -> run(arrays, seconds) of the other libraries, for whole rows."""

    def sdpa(arrays, seconds):
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        mask = None
        if window is not None:
            i = torch.arange(arrays[0].shape[1], device=device)
            mask = (i[:, None] - i[None]).abs() <= window
        call = functools.partial(scaled_dot_product_attention, attn_mask=mask)
        return of_torch(call, arrays, seconds, device)

    def flex(arrays, seconds):
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = arrays[0].shape[1]
        block_mask = None
        if window is not None:
            block_mask = create_block_mask(
                lambda b, h, q, k: (q - k).abs() <= window, None, None, length, length, device
            )
        call = functools.partial(torch.compile(flex_attention), block_mask=block_mask)
        return of_torch(call, arrays, seconds, device)

    def tokamax(arrays, seconds):
        import tokamax  # pyright: ignore[reportMissingImports]

        size = None if window is None else (window, window)
        call = functools.partial(tokamax.dot_product_attention, local_window_size=size)
        return of_jax(call, arrays, seconds)

    return {"torch sdpa": sdpa} | ({} if device == "cpu" else {"flex": flex, "tokamax": tokamax})


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--heads", type=int, nargs="*")
    parser.add_argument("--seconds", type=float, default=1.0, help="a timing, about")
    args = parser.parse_args()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    lengths = args.lengths or ([512, 2048] if on_cpu else [512, 1024, 2048, 4096, 8192])
    results = []
    print(f"{device.device_kind}, jax {jax.__version__}; seconds are medians")
    for heads in args.heads or ([12] if on_cpu else [12, 16]):
        for length in lengths:
            rows = max(1, (2048 if on_cpu else 16384) // length)
            x = np.random.default_rng(0).normal(size=(4, rows, length, heads, HEAD_DIM))
            arrays = list(jnp.asarray(x, jnp.float32 if on_cpu else jnp.bfloat16))
            whole, packed = np.ones((rows, length), np.int32), segments(rows, length)
            for layer, window, ids in (
                ("local", WINDOW, whole),
                ("global", None, whole),
                ("global, packed", None, packed),
            ):
                bounds = op.make_bounds(jnp.asarray(ids), window, whole=ids is whole)
                runs = {}
                for name in op.IMPLEMENTATIONS[1:]:
                    if op.refusal(name, arrays[0], bounds, device) is None:
                        call = functools.partial(
                            op.attention, bounds=bounds, scale=HEAD_DIM**-0.5, implementation=name
                        )
                        runs[name] = lambda a, s, call=call: of_jax(
                            lambda q, k, v: call(q, k, v), a, s
                        )
                if ids is whole:
                    runs |= peers(window, "cpu" if on_cpu else "cuda")
                for name, run in runs.items():
                    row = {"implementation": name, "layer": layer, "length": length,
                           "rows": rows, "heads": heads}  # fmt: skip
                    try:
                        forward, backward = run(arrays, args.seconds)
                    except Exception as error:  # a peer that fails is a result, too
                        row["failure"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                        print(f"{name:14} {layer:14} L={length:5} H={heads:2} {row['failure']}")
                        results.append(row)
                        continue
                    flops = 4 * rows * heads * length**2 * HEAD_DIM
                    nbytes = 4 * arrays[0].nbytes
                    row |= {
                        "forward_seconds": forward,
                        "backward_seconds": backward,
                        "forward_tflops": flops / forward / 1e12,
                        "backward_tflops": 2.5 * flops / backward / 1e12,
                        "forward_gbytes_per_second": nbytes / forward / 1e9,
                        "backward_gbytes_per_second": 2 * nbytes / backward / 1e9,
                    }
                    if ids is packed:
                        lengths_of = [np.bincount(r)[1:].astype(float) for r in ids]
                        row["sum_of_squared_lengths"] = float(
                            np.mean([(n**2).sum() for n in lengths_of]) / length**2
                        )
                    results.append(row)
                    print(
                        f"{name:14} {layer:14} L={length:5} H={heads:2} "
                        f"fwd {forward * 1e3:9.3f} ms {row['forward_tflops']:7.2f} TFLOP/s "
                        f"{row['forward_gbytes_per_second']:7.1f} GB/s   "
                        f"bwd {backward * 1e3:9.3f} ms {row['backward_tflops']:7.2f} TFLOP/s "
                        f"{row['backward_gbytes_per_second']:7.1f} GB/s",
                        flush=True,
                    )
    if args.json:
        record = {
            "command": "python tests/benchmarks/attention.py",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.device_kind,
            "generation": op.generation_of(device),
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
