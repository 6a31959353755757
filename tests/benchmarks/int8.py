"""int8 weights beside float32 and bfloat16: bytes, closeness and time, in one process.

    python tests/benchmarks/int8.py [--size base] [--lengths 32 512] [--repeats 5] [--json FILE]

Each model encodes one sequence of each length, in turn, after a first time that compiles. Ratios
are of medians, float32's over the model's: above 1 the model is faster. The processor's seconds, of
all threads, count, since other work on the machine lengthens them less than those of the clock.
Closeness is to float32's final hidden states (the worst and the mean token), their mean over the
tokens, and the masked-LM head's first choice per token. The weights are seeded: each layer adds to
the residual stream about as much as it gets, with inputs of equal size ("spread 0"), and with a
lognormal factor per input channel ("spread 0.5"), where a few channels are large and rounding costs
more.
"""

import argparse
import json
import math
import os
import pathlib
import time
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, quantize
from modernbert_jax.checkpoint.params import variables
from modernbert_jax.weights import weight_of

# name: (dtype, mode of `quantize`)
MODELS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float32, weights": ("float32", "weights"),
    "float32, dynamic": ("float32", "dynamic"),
    "bfloat16, dynamic": ("bfloat16", "dynamic"),
}


def scaled(model: ModernBertForMaskedLM, spread: float = 0.0, seed: int = 0) -> None:
    """Draws weights whose layers add as much as they get, in place: a new model's add little."""
    rng = np.random.default_rng(seed)
    for path, param in variables(model).items():
        row = weight_of(path)
        inputs = param.shape[: row.inputs]
        fan_in = math.prod(inputs) if row.inputs else 4
        value = rng.standard_normal(param.shape, np.float32) * fan_in**-0.5
        if row.kind == "norms":
            value = np.exp(0.3 * value)
        if spread and row.inputs:
            value *= rng.lognormal(0.0, spread, (*inputs, *[1] * (len(param.shape) - row.inputs)))
        param.set_value(jnp.asarray(value, param.dtype))


def cosine(a, b) -> np.ndarray:
    """Of the last axes, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["tiny", "base", "large"], default="base")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also written here")
    args = parser.parse_args()

    import machine
    import qwix

    rng = np.random.default_rng(0)
    config = getattr(ModernBertConfig, args.size)()
    inputs = {n: jnp.asarray(rng.integers(5, config.vocab_size, (1, n))) for n in args.lengths}
    call = nnx.jit(lambda encoder, ids: encoder(ids).last_hidden_state.astype(jnp.float32))

    def built(name: str, spread: float | None, size: str) -> ModernBertForMaskedLM:
        dtype, mode = MODELS[name]
        config = getattr(ModernBertConfig, size)(dtype=dtype, param_dtype=dtype)
        model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
        if spread is not None:
            scaled(model, spread)
        return model if mode is None else quantize(model, mode)

    ids = inputs[max(args.lengths)]
    closeness: dict[str, dict[str, dict[str, float]]] = {}
    models = {}
    for spread in reversed(args.spreads):  # the models of the first spread are timed
        expected = None
        for name in MODELS:
            models[name] = model = built(name, spread, args.size)
            hidden = call(model.model, ids)
            first = np.asarray(model.logits(model.head(hidden)).argmax(-1))
            expected = (hidden, first) if expected is None else expected
            tokens = cosine(hidden, expected[0])
            closeness.setdefault(f"spread {spread:g}", {})[name] = {
                "worst token": float(tokens.min()),
                "mean token": float(tokens.mean()),
                "mean-pooled": float(cosine(hidden.mean(1), expected[0].mean(1)).min()),
                "same first choice": float((first == expected[1]).mean()),
            }
            print(spread, name, closeness[f"spread {spread:g}"][name], flush=True)
    bytes_of = {}
    for size in ("base", "large"):
        shapes = {
            name: nnx.eval_shape(lambda name=name, size=size: built(name, None, size))
            for name in MODELS
        }
        bytes_of[size] = {
            name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
            for name, model in shapes.items()
        }
    seconds: dict[str, dict[str, float]] = {}
    for length, ids in inputs.items():
        times: dict[str, list[float]] = {name: [] for name in MODELS}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                began = time.process_time()
                call(model.model, ids).block_until_ready()
                if repeat:
                    times[name].append(time.process_time() - began)
        seconds[str(length)] = {name: median(values) for name, values in times.items()}
        print(length, seconds[str(length)], flush=True)
    result = {
        "command": f"python tests/benchmarks/int8.py --size {args.size}",
        "size": args.size,
        "bytes": bytes_of,
        "bytes, float32 over this": {
            size: {name: row["float32"] / value for name, value in row.items()}
            for size, row in bytes_of.items()
        },
        "closeness to float32": closeness,
        "processor seconds by length": seconds,
        "speed, of float32": {
            length: {name: row["float32"] / value for name, value in row.items()}
            for length, row in seconds.items()
        },
        "versions": {"jax": jax.__version__, "qwix": qwix.__version__},
        "device": machine.cpu(),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
