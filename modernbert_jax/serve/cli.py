"""The command `serve`: loads a model, compiles its programs, and answers requests."""

import argparse
import contextlib
import logging
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvicorn

from modernbert_jax.auto import read_class
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.inference.colbert import is_colbert
from modernbert_jax.inference.embedder import Embedder
from modernbert_jax.inference.export import tokens_per_sequence, whole_number
from modernbert_jax.inference.multi_vector import MultiVectorEmbedder
from modernbert_jax.inference.pipelines import Reranker, pipeline
from modernbert_jax.inference.sentence import MODULES_FILE, read_modules
from modernbert_jax.packing import row_size
from modernbert_jax.serve.app import Limits, Service, is_loopback_name
from modernbert_jax.serve.endpoints import TASKS, endpoints_of, task_of
from modernbert_jax.untrusted import printable

TOKEN = "MODERNBERT_JAX_TOKEN"
ABOUT = """Serves a model over HTTP. Requests that wait at the same time share packed rows.

What the checkpoint is decides the endpoints:
  an encoder, or a folder of sentence-transformers    POST /v1/embeddings   (OpenAI's API)
  a sequence classifier                               POST /classify
  a sequence classifier with one label                POST /rerank as well  (Cohere's or TEI's)
  a multi-vector (ColBERT) model                      POST /rerank          by MaxSim
  a masked LM                                         POST /fill-mask
GET /health and GET /metrics (Prometheus) are always there."""
EXAMPLES = f"""examples:
  modernbert-jax serve MODEL --compile-cache compiled
  curl -s localhost:8000/v1/embeddings -H 'Content-Type: application/json' \\
      -d '{{"input": ["No fever.", "A long note"]}}'

  {TOKEN}=... modernbert-jax serve MODEL --host 0.0.0.0
  curl -s server:8000/v1/embeddings -H "Authorization: Bearer $TOKEN" ...

The answers to expect besides 200: 400 wrong input, 401 no token, 404 not served by this model,
413 too large, 429 the queue is full (Retry-After says when to retry), 500 this request alone
failed, 503 shutting down, 504 not answered in time. SIGTERM and Ctrl-C answer what was accepted,
then end the server. Neither logs nor errors contain a text of a request."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="modernbert-jax serve", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument(
        "--task", choices=TASKS, help="by default what the checkpoint is; embed serves any encoder"
    )
    parser.add_argument("--name", help="of the model in requests; by default MODEL's last part")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help=f"address to listen on (default 127.0.0.1); another than loopback needs {TOKEN}",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    start = parser.add_argument_group("start")
    start.add_argument("--compile-cache", metavar="DIR", help="folder for compiled programs")
    start.add_argument(
        "--exported", action="store_true",
        help="use the functions that you exported into MODEL; they are programs",
    )  # fmt: skip
    start.add_argument("--dtype", help="dtype of computation, by default the file's")
    start.add_argument(
        "--warm-up", type=int, nargs="*", metavar="TOKENS",
        help="lengths of rows to compile before the first request, by default all up to "
        "--batch-tokens; without numbers none",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--batch-tokens", type=int, help="of a packed row (default 16,384, on a CPU 512)"
    )
    limits.add_argument(
        "--queue-tokens", type=int,
        help="accepted at a time, beyond them 429; also the most of a request (default 128 rows)",
    )  # fmt: skip
    limits.add_argument("--max-requests", type=int, default=1024, help="at a time (default 1024)")
    limits.add_argument(
        "--max-body", type=int, default=4 * 1024**2, help="bytes of a request (default 4 MiB)"
    )
    limits.add_argument(
        "--timeout", type=float, default=60.0, help="seconds until 504 (default 60)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server and returns the exit code: 0, or 2 with one line on stderr for bad input."""
    args = parser().parse_args(argv)
    try:
        return serve(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {printable(error, 2000)}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT."""
    token = token_of(os.environ, args.host)
    row_tokens = tokens_per_sequence(args.batch_tokens)
    limits = Limits(
        row_tokens,
        whole_number("queue_tokens", args.queue_tokens or 128 * row_tokens, 1),
        whole_number("max_requests", args.max_requests, 1),
        whole_number("max_body", args.max_body, 1),
        args.timeout,
    )
    if not args.timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {args.timeout}")
    # Before the model is loaded, in case the port is taken.
    with contextlib.closing(bind(args.host, args.port)) as listener:
        return _serve(args, listener, limits, token)


def _serve(
    args: argparse.Namespace, listener: socket.socket, limits: Limits, token: str | None
) -> int:
    row_tokens = limits.row_tokens
    runner, reranker = load(args)
    name = args.name or pathlib.PurePath(args.model).name
    endpoints, missing = endpoints_of(runner, name, row_tokens, reranker)
    lengths = warm_up_lengths(args.warm_up, row_tokens)
    if lengths:
        began = time.monotonic()
        print(f"compiling for rows of {', '.join(map(str, lengths))} tokens", flush=True)
        for endpoint in endpoints:
            endpoint.warm_up(lengths)
        print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    service = Service(endpoints, missing, limits, token)
    # uvicorn raises the signal again after its shutdown; by then everything is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    paths = " ".join(endpoint.path for endpoint in endpoints)
    print(f"{name}: http://{address}:{port} answers {paths}", flush=True)
    config = uvicorn.Config(
        service.app, loop="asyncio", http="h11", ws="none", lifespan="off", access_log=False,
        log_config=None, server_header=False,
        # Every accepted request ends within its own time limit.
        timeout_graceful_shutdown=int(limits.seconds) + 5,
    )  # fmt: skip
    uvicorn.Server(config).run([listener])
    service.close()
    print(f"answered {service.answered} of {service.accepted} accepted requests", flush=True)
    return 0


def token_of(environment: Any, host: str) -> str | None:
    """Returns the token that requests must send, or None for a server on loopback without one.

    Raises ValueError for a host that others reach without a token, and for an unusable token.
    """
    token = environment.get(TOKEN)
    if token is None:
        if not is_loopback_name(host):
            raise ValueError(
                f"host: expected a loopback address without a token, got {host}; set {TOKEN} to "
                "a long random text, which requests then send as `Authorization: Bearer`"
            )
        return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{TOKEN}: expected at least 16 printable ASCII characters, no spaces")
    return token


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to a host and a port. Raises OSError if the port is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port}: {error.strerror}; choose another with --port") from None
    return listener


def load(args: argparse.Namespace) -> tuple[Any, Reranker | None]:
    """Returns the embedder or the pipeline that the checkpoint is served with.

    With it comes the reranker of a sequence classifier that has one label.
    """
    folder = resolve(args.model)
    if is_colbert(folder):
        for option in ("task", "exported"):
            if getattr(args, option):
                raise ValueError(f"{option}: expected none for a multi-vector model")
        return MultiVectorEmbedder.from_pretrained(
            args.model, dtype=args.dtype, compile_cache=args.compile_cache
        ), None
    task = args.task or ("embed" if embeds(folder) else None)
    if task != "embed":
        found = task_of(read_class(folder))
        if task not in (None, found):  # its head would have random weights
            raise ValueError(f"task: expected {found} or embed for this checkpoint, got {task}")
        task = found
    options = {"dtype": args.dtype, "compile_cache": args.compile_cache, "exported": args.exported}
    # A hub id is resolved again, so that exported functions are refused for it.
    if task == "embed":
        return Embedder.from_pretrained(args.model, **options), None
    runner = pipeline(
        task, args.model, batch_tokens=tokens_per_sequence(args.batch_tokens), **options
    )
    ranks = task == "text-classification" and runner.model.config.num_labels == 1
    return runner, Reranker.beside(runner, folder) if ranks else None


def embeds(folder: pathlib.Path) -> bool:
    """Whether sentence-transformers wrote a folder as an embedding model, not a cross-encoder."""
    return (folder / MODULES_FILE).is_file() and len(read_modules(folder)) > 1


def warm_up_lengths(given: Sequence[int] | None, row_tokens: int) -> list[int]:
    """Returns the lengths of rows to compile: those given, rounded up, or all up to row_tokens."""
    if given is not None:
        return sorted({row_size(whole_number("warm_up", tokens, 1)) for tokens in given})
    lengths, size = [], 1
    while not lengths or lengths[-1] < row_tokens:
        lengths.append(row_size(size))
        size = lengths[-1] + 1
    return lengths
