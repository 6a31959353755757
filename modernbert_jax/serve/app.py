"""The HTTP side: authorization, limits, errors in OpenAI's form, and the life of a request."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modernbert_jax.serve.batcher import Batcher, Closed, QueueFull, row_costs
from modernbert_jax.serve.endpoints import Endpoint, Refused
from modernbert_jax.serve.metrics import Metrics
from modernbert_jax.untrusted import parse_json

TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # OpenAI's names
LEFT = 499  # the status of a request whose client left; nobody reads it

log = logging.getLogger("modernbert_jax.serve")


@dataclasses.dataclass(frozen=True)
class Limits:
    """row_tokens: of a packed row. queue_tokens: that wait or run. requests: accepted at a time.
    body_bytes: of one request. seconds: until a request is answered with 504."""

    row_tokens: int
    queue_tokens: int
    requests: int = 1024
    body_bytes: int = 4 * 1024**2
    seconds: float = 60.0


class Failed(Exception):
    """The computation of a request raised an exception, at the place in the message."""


class Service:
    """Answers requests with `endpoints`; `app` is the ASGI application.

    missing: {path: why it is not among the endpoints}. token: that each request must send; without
    one, only requests to this machine's own name are answered. close() computes what was accepted.
    """

    def __init__(
        self,
        endpoints: list[Endpoint],
        missing: Mapping[str, str],
        limits: Limits,
        token: str | None = None,
    ):
        self.limits, self.metrics = limits, Metrics()
        self.accepted = self.answered = 0  # requests that entered the queue, and their answers
        self._token, self._active = token, 0
        self._batcher = Batcher(
            lambda key, values: key[0].run(key[1], values),
            limits.row_tokens, limits.queue_tokens, self.metrics.row,
        )  # fmt: skip
        for name, about, value in (
            ("queue_tokens", "Tokens that wait or run.", lambda: self._batcher.queued_tokens),
            ("queue_tokens_limit", "The most of them.", lambda: limits.queue_tokens),
            ("requests_active", "Requests without an answer yet.", lambda: self._active),
        ):
            self.metrics.gauge(name, about, value)
        routes = [Route("/health", self._health), Route("/metrics", self._metrics)]
        for endpoint in endpoints:
            routes.append(Route(endpoint.path, self._post(endpoint), methods=["POST"]))
        for path, why in missing.items():
            routes.append(Route(path, self._absent(why), methods=["POST", "GET"]))
        handlers: Any = {HTTPException: _http_error}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    def close(self) -> None:
        """Accepts nothing more, and returns once everything accepted is computed."""
        self._batcher.close()

    def _post(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            began = time.monotonic()
            response = await self._answer(endpoint, request)
            self.metrics.request(endpoint.path, response.status_code, time.monotonic() - began)
            return response

        return answer

    async def _answer(self, endpoint: Endpoint, request: Request) -> Response:
        """The response of a request; no exception leaves it, since a server would log its text."""
        try:
            self._check_sender(request)
            if self._active >= self.limits.requests:
                raise QueueFull(1)
            self._active += 1
            try:
                async with asyncio.timeout(self.limits.seconds):
                    return await self._work(endpoint, request)
            finally:
                self._active -= 1
        except Refused as error:
            return _error(error.status, error.message, error.param, error.code)
        except QueueFull as error:
            headers = {"Retry-After": str(error.seconds)}
            return _error(429, str(error), code="queue_full", headers=headers)
        except Closed:
            return _error(503, "the server is shutting down", code="shutting_down")
        except TimeoutError:
            return _error(
                504, f"no answer within {self.limits.seconds:g} s; send less at a time, or retry",
                code="timeout",
            )  # fmt: skip
        except ClientDisconnect:
            return Response(status_code=LEFT)
        except Exception as error:
            place = str(error) if isinstance(error, Failed) else _place(error)
            log.error("%s: %s", endpoint.path, place)
            return _error(500, "this request failed in the server; its log says where")

    async def _work(self, endpoint: Endpoint, request: Request) -> Response:
        body = await self._body(request)
        work = endpoint.read(body)
        lengths, total = await run_in_threadpool(endpoint.count, work)
        tokens = row_costs(lengths)
        if sum(tokens) > self.limits.queue_tokens:
            raise Refused(
                413,
                f"{endpoint.param}: expected at most {self.limits.queue_tokens:,} tokens in a "
                f"request, got {sum(tokens):,}; send several requests",
                endpoint.param,
            )
        job = self._batcher.submit((endpoint, work.key), work.values, tokens)
        self.accepted += 1
        results = asyncio.wrap_future(job.future)
        left = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({results, left}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ClientDisconnect
            if error := results.exception():
                raise Failed(_place(error))
            found = results.result()
            # In a thread: thousands of vectors take a second to write.
            return await run_in_threadpool(lambda: JSONResponse(work.answer(found, total)))
        finally:
            self.answered += 1  # whether with results, an error, or a client that left
            left.cancel()
            results.cancel()
            self._batcher.cancel(job)

    def _check_sender(self, request: Request) -> None:
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not same:
                raise Refused(401, "expected the header Authorization: Bearer TOKEN")
            return
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        if not is_loopback_name(host):
            # A page in a browser can reach this machine under a name of its own.
            raise Refused(403, "Host: expected localhost or a loopback address")

    async def _body(self, request: Request) -> dict[str, Any]:
        """Reads and parses the JSON object of a request."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser cannot send this type unasked
            raise Refused(415, "Content-Type: expected application/json")
        limit = self.limits.body_bytes
        length = request.headers.get("content-length", "0")
        parts, size = [], 0
        if length.isdecimal() and int(length[:20]) <= limit:
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limit:
                    break
        else:
            size = limit + 1
        if size > limit:
            raise Refused(413, f"expected a body of at most {limit:,} bytes")
        try:
            body = parse_json(b"".join(parts))
        except ValueError:  # the message may show a part of the body
            raise Refused(400, "expected a body in JSON, each key once, no NaN") from None
        if not isinstance(body, dict):
            raise Refused(400, "expected a JSON object")
        return body

    async def _health(self, request: Request) -> Response:
        if not self._batcher.alive:
            return _error(503, "the computing thread has ended")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        try:
            self._check_sender(request)
        except Refused as error:
            return _error(error.status, error.message)
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _absent(self, why: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return _error(404, why, code="endpoint_not_served")

        return answer


def is_loopback_name(host: str) -> bool:
    """Whether a host name or address is one of this machine only."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors: an unknown path, or another method."""
    return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _place(error: BaseException) -> str:
    """The type of an exception and where it was raised; its message may hold a text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
