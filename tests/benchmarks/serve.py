"""Load test of `modernbert-jax serve`: beside offline packing and sentence-transformers.

    python tests/benchmarks/serve.py [--size base] [--texts 192] [--clients 64] [--json FILE]
    python tests/benchmarks/serve.py --first-answer [--size base]

Concurrent clients on loopback send one text of lognormal length per request. Every answer is
compared with `Embedder.encode`, and none may be missing. In turn, a few times: all texts offline,
through our server, and through the same Starlette application with sentence-transformers' encode in
it, for several of its batch sizes. The medians' ratios are printed. --first-answer instead measures
the seconds from the start of the process to the first answer, without and with a compile cache and
exported functions, each in a new process.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
from statistics import median

import embed
import httpx2
import machine
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5


def serve_theirs(folder: str, sizes: list[int], row_tokens: int) -> None:
    """Our application around sentence-transformers: one path per batch size."""
    import sentence_transformers
    import torch
    import uvicorn
    from sentence_transformers.sentence_transformer import modules

    from modernbert_jax import AutoTokenizer, ModernBertConfig
    from modernbert_jax.serve import cli
    from modernbert_jax.serve.app import Limits, Service
    from modernbert_jax.serve.endpoints import Embeddings

    word = modules.Transformer(folder)
    pooling = modules.Pooling(word.get_embedding_dimension())
    model = sentence_transformers.SentenceTransformer(
        modules=[word, pooling, modules.Normalize()], device="cpu"
    )

    def encode(size: int, texts, **_):
        with torch.inference_mode():
            return model.encode(texts, batch_size=size, show_progress_bar=False)

    endpoints = []
    for size in sizes:
        encoder = types.SimpleNamespace(  # what the application reads of an Embedder
            encode=functools.partial(encode, size), normalize=True, max_length=8192,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            model=types.SimpleNamespace(config=ModernBertConfig()),
            dimension=word.get_embedding_dimension(),
        )  # fmt: skip
        endpoint = Embeddings(encoder, "theirs", row_tokens)
        endpoint.path = f"/{size}"
        endpoints.append(endpoint)
    listener = cli.bind("127.0.0.1", 0)
    service = Service(endpoints, {}, Limits(row_tokens, 10**6, seconds=600.0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(service.app, loop="asyncio", http="h11", log_level="error")
    uvicorn.Server(config).run([listener])


@contextlib.contextmanager
def server(*command: str):
    """A server in a process of its own: its address, once it answers."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(process.stdout or ())
        found = next((m[0] for line in lines if (m := re.search(r"http://\S+", line))), None)
        if found is None:
            raise SystemExit("the server ended")
        yield found
    finally:
        process.terminate()
        process.communicate()


async def load(url: str, texts: list[str], clients: int, want: np.ndarray) -> tuple[float, float]:
    """Sends all texts; returns the seconds, and the largest difference of an answer."""
    waiting = iter(range(len(texts)))
    worst = 0.0

    async def client(http: httpx2.AsyncClient) -> int:
        nonlocal worst
        answers = 0
        for i in waiting:
            response = await http.post(url, json={"input": texts[i], "encoding_format": "base64"})
            response.raise_for_status()
            (item,) = response.json()["data"]
            vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
            worst = max(worst, float(np.abs(vector - want[i]).max()))
            answers += 1
        return answers

    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as http:
        began = time.perf_counter()
        answers = sum(await asyncio.gather(*(client(http) for _ in range(clients))))
        seconds = time.perf_counter() - began
    if answers != len(texts) or worst > TOLERANCE:
        raise SystemExit(f"{url}: {answers} of {len(texts)} answers, largest difference {worst}")
    return seconds, worst


def side_by_side(args: argparse.Namespace, folder: str) -> dict:
    from modernbert_jax import Embedder

    texts = embed.texts_of(args.texts, args.mean)
    ours = Embedder.from_pretrained(folder)
    want = ours.encode(texts, show_progress_bar=False)  # compiles
    times: dict[str, list[float]] = {}
    worst = 0.0
    theirs = [__file__, "--theirs", folder, "--batch-sizes", *map(str, args.batch_sizes)]
    mine = ["-m", "modernbert_jax", "serve", folder, "--name", "ours", "--port", "0"]
    mine += ["--timeout", "600", "--queue-tokens", "1000000", "--compile-cache", f"{folder}/cache"]
    with server(*mine) as address, server(*theirs) as their_address:
        paths = {"our server": f"{address}/v1/embeddings"}
        for size in args.batch_sizes:
            paths[f"theirs, batches of {size}"] = f"{their_address}/{size}"
        for url in paths.values():  # a first time that does not count: it compiles
            asyncio.run(load(url, texts[:8], 8, want))
        asyncio.run(load(paths["our server"], texts, args.clients, want))
        for _ in range(args.repeats):
            began = time.perf_counter()
            ours.encode(texts, show_progress_bar=False)
            times.setdefault("offline packing", []).append(time.perf_counter() - began)
            for name, url in paths.items():
                seconds, difference = asyncio.run(load(url, texts, args.clients, want))
                times.setdefault(name, []).append(seconds)
                worst = max(worst, difference)
        metrics = httpx2.get(f"{address}/metrics").text
    medians = {name: median(values) for name, values in times.items()}
    server_time = medians["our server"]
    rows = {
        name: float(re.findall(rf"^modernbert_jax_{name} (\S+)$", metrics, re.M)[0])
        for name in ("rows_total", "texts_total", "tokens_total")
    }
    return {
        "clients": args.clients, "texts": args.texts, "mean tokens": args.mean,
        "throughput against offline packing": medians["offline packing"] / server_time,
        "throughput against theirs": {
            name: medians[name] / server_time for name in medians if name.startswith("theirs")
        },
        "wrong or lost answers": 0, "largest difference": worst,
        "texts per row": rows["texts_total"] / rows["rows_total"],
        "tokens per row": rows["tokens_total"] / rows["rows_total"],
    }  # fmt: skip


def first_answers(folder: str) -> dict:
    from modernbert_jax import Embedder

    exported, cache = f"{folder}/exported", f"{folder}/cache"
    Embedder.from_pretrained(folder).export(exported, tokens=[64])
    kinds = {
        "neither": [folder],
        "compile cache, empty": [folder, "--compile-cache", cache],
        "compile cache": [folder, "--compile-cache", cache],
        "exported functions": [exported, "--exported"],
        "both, empty": [exported, "--exported", "--compile-cache", cache],
        "both": [exported, "--exported", "--compile-cache", cache],
    }
    seconds = {}
    for name, arguments in kinds.items():
        began = time.perf_counter()
        command = ["-m", "modernbert_jax", "serve", *arguments, "--port", "0", "--warm-up"]
        with server(*command) as address:
            body = {"input": "the patient has no fever"}
            httpx2.post(f"{address}/v1/embeddings", json=body, timeout=600).raise_for_status()
            seconds[name] = time.perf_counter() - began
    return {
        "seconds to the first answer": seconds,
        "as a part of that with neither": {k: v / seconds["neither"] for k, v in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["base", "small"], default="small")
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--mean", type=int, default=200, help="tokens a text, on average")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--first-answer", action="store_true", help="measure starts instead")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="also written here")
    args = parser.parse_args()
    if args.theirs:
        serve_theirs(args.theirs, args.batch_sizes, 32 * args.mean)
        return
    import jax

    with tempfile.TemporaryDirectory() as folder:
        embed.checkpoint(pathlib.Path(folder), args.size, None)
        measured = first_answers(folder) if args.first_answer else side_by_side(args, folder)
    result = {"size": args.size, "dtype": "float32", **measured}
    result |= {"jax": jax.__version__, "device": machine.cpu()}
    print(json.dumps(result, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
