"""Embedder beside sentence-transformers: the same weights, texts of mixed lengths, one process.

    python tests/benchmarks/embed.py [--size base] [--texts 64] [--mean 200] [--json FILE]

float32, mean pooling, unit vectors. sentence-transformers sorts by length and pads batches; it is
timed with several batch sizes and the best counts. Both encode in turn, after a first time that
compiles; the ratio of the medians (above 1: Embedder is faster) and the largest difference of the
vectors are printed, and the seconds of Embedder's first time.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from statistics import median

import machine
import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # beside torch, which runs on the CPU here

WORDS = "the patient has no fever denies cough and pain seen today with a rash on left arm".split()


def texts_of(count: int, mean: int, seed: int = 0) -> list[str]:
    """Texts of lognormal length, `mean` tokens on average, at most 2,048."""
    rng = np.random.default_rng(seed)
    sigma = 0.9
    lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).astype(int).clip(3, 2048)
    return [" ".join(rng.choice(WORDS, n)) for n in lengths]


def checkpoint(folder: pathlib.Path, size: str, tokenizer_files: str | None) -> None:
    """A seeded model in HF's layout with a tokenizer that keeps a word a token."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from modernbert_jax import AutoTokenizer
    from modernbert_jax.tokenizer import from_backend

    if tokenizer_files:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    else:
        names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *WORDS]
        backend = Tokenizer(
            models.WordLevel({n: i for i, n in enumerate(dict.fromkeys(names))}, "[UNK]")
        )
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        tokenizer = from_backend(backend)
    torch.manual_seed(0)
    sizes = {
        "base": {},
        "small": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 576,
                  "num_attention_heads": 6},
    }  # fmt: skip
    config = transformers.ModernBertConfig(attn_implementation="sdpa", **sizes[size])
    transformers.ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["base", "small"], default="base")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--mean", type=int, default=200, help="tokens a text, on average")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batch-tokens", type=int, help="of Embedder's rows")
    parser.add_argument("--tokenizer", help="a folder; by default a word is a token")
    parser.add_argument("--json", help="also written here")
    args = parser.parse_args()

    import jax
    import sentence_transformers
    import torch
    from sentence_transformers.sentence_transformer import modules

    from modernbert_jax import Embedder

    with tempfile.TemporaryDirectory() as folder:
        checkpoint(pathlib.Path(folder), args.size, args.tokenizer)
        word = modules.Transformer(folder)
        pooling = modules.Pooling(word.get_embedding_dimension())
        theirs = sentence_transformers.SentenceTransformer(
            modules=[word, pooling, modules.Normalize()], device="cpu"
        )
        ours = Embedder.from_pretrained(folder)
    texts = texts_of(args.texts, args.mean)
    tokens = sum(len(ids) for ids in ours.tokenizer(texts)["input_ids"])

    def timed(function) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        vectors = function()
        return time.perf_counter() - began, np.asarray(vectors)

    def encode() -> np.ndarray:
        return ours.encode(texts, batch_tokens=args.batch_tokens, show_progress_bar=False)

    first, mine = timed(encode)
    times: dict[str, list[float]] = {"ours": []}
    for _ in range(args.repeats):
        times["ours"].append(timed(encode)[0])
        for size in args.batch_sizes:
            seconds, other = timed(
                lambda size=size: theirs.encode(texts, batch_size=size, show_progress_bar=False)
            )
            times.setdefault(f"theirs, batches of {size}", []).append(seconds)
    medians = {name: median(values) for name, values in times.items()}
    best = min((n for n in medians if n != "ours"), key=medians.__getitem__)
    result = {
        "size": args.size, "texts": args.texts, "tokens": tokens, "dtype": "float32",
        "seconds": medians, "best of theirs": best, "first time, with compilations": first,
        "ratio": medians[best] / medians["ours"],
        "ratio by batch size": {n: medians[n] / medians["ours"] for n in medians if n != "ours"},
        "largest difference": float(np.abs(mine - other).max()),
        "versions": {"jax": jax.__version__, "torch": torch.__version__,
                     "sentence-transformers": sentence_transformers.__version__},
        "device": machine.cpu(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
