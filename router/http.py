"""The HTTP door: OpenAI's API over the same relay.

GET  /v1/models             GET /health   200 when requests can run, else 503
POST /v1/completions        POST /v1/chat/completions
"""

import asyncio
import contextlib
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.errors import BatonError, ConfigError, InvalidRequest, NotAuthenticated
from ..observe.tracing import valid_traceparent
from .inference import Inference
from .openai_request import OpenAiRequest, parse
from .openai_response import Json, Shaper, error_body, model_body
from .records import Message
from .tenants import tenant_of

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 30.0  # for a request's body to arrive
DONE = b"data: [DONE]\n\n"


def build_app(
    inference: Inference,
    *,
    api_keys: Iterable[str] = (),
    max_body_bytes: int,
    on_refused: Callable[[str], None] = lambda outcome: None,
) -> ASGIApp:
    """The ASGI application. Without API keys everybody is let in. `on_refused`: a question for an answer ended at the
    door, by the named error."""
    keys = tuple(api_keys)

    async def models(request: Request) -> Response:
        model = inference.model()
        return JSONResponse({"object": "list", "data": [model_body(model.name, model.max_model_len)]})

    async def model(request: Request) -> Response:
        found = inference.model(request.path_params["name"])
        return JSONResponse(model_body(found.name, found.max_model_len))

    async def health(request: Request) -> Response:
        return JSONResponse({"ready": inference.ready}, 200 if inference.ready else 503)

    async def completions(request: Request) -> Response:
        chat = request.url.path == "/v1/chat/completions"
        data = await _body(request, max_body_bytes)
        try:
            parsed = parse(_json(data), chat=chat, request_id=request.headers.get("x-request-id", ""))
        except BatonError as error:
            on_refused(error.code)
            raise
        tenant = tenant_of(request.headers.get("authorization", "")) if keys else ""
        return _Answer(inference, parsed, valid_traceparent(request.headers.get("traceparent", "")), tenant)

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", completions, methods=["POST"]),
        ],
        exception_handlers={BatonError: _on_error, HTTPException: _on_http_error, Exception: _on_error},
    )
    return _KeyCheck(app, keys, on_refused) if keys else app


class HttpDoor:
    """The application on a port of its own, on the running event loop."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        """Opens the port; 0: any free one. Raises ConfigError."""
        self._socket = _listen(host, port)
        where = f"[{host}]" if ":" in host else host
        self.address = f"{where}:{self._socket.getsockname()[1]}"
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")

    async def close(self) -> None:
        """Refuses new connections, lets the open ones finish for some seconds."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=4)
        self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's to handle."""
        yield


class _KeyCheck:
    """Lets in who brings one of the keys as "Authorization: Bearer <key>"; /health is open to all."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], on_refused: Callable[[str], None]) -> None:
        self._app = app
        self._on_refused = on_refused
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self._knows(Request(scope)):
            error = NotAuthenticated("bring an API key: Authorization: Bearer <key>")
            if scope["method"] == "POST":
                self._on_refused(error.code)
            response = _on_error(None, error)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = _digest(key.encode())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, so that time tells nothing
        return scheme.lower() == "bearer" and any(matches)


class _Answer(Response):
    """Runs a request while its client listens. A client that leaves cancels it."""

    def __init__(self, inference: Inference, parsed: OpenAiRequest, traceparent: str, tenant: str) -> None:
        super().__init__()
        self._inference = inference
        self._parsed = parsed
        self._traceparent = traceparent
        self._tenant = tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        parsed = self._parsed
        try:
            submitted = self._inference.submit(parsed.request, None, self._traceparent, self._tenant)
            record = submitted.record
            shaper = Shaper(
                request_id=record.request_id,
                model=self._inference.model_name,
                chat=parsed.chat,
                logprobs=parsed.request.sampling.HasField("logprobs"),
                prompt_logprobs=parsed.request.sampling.HasField("prompt_logprobs"),
                include_usage=parsed.include_usage,
                tokenizer=self._inference.tokenizer,
            )
            headers: dict[str, str] = {"x-request-id": record.request_id}
            with record.attached() as reader:
                messages = reader.messages(final_only=not parsed.stream)
                first = await anext(messages)
                if parsed.stream:
                    await _stream(shaper, first, messages, headers, send)
                else:
                    await JSONResponse(shaper.whole(first), headers=headers)(scope, receive, send)
        except BatonError as error:
            await _on_error(None, error)(scope, receive, send)


async def _stream(
    shaper: Shaper, first: Message, rest: AsyncIterator[Message], headers: dict[str, str], send: Send
) -> None:
    """Server-sent events. Before the first message an error had its own status; after it, it is an event."""
    fields = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def event(bodies: Iterable[Json], end: bytes = b"") -> None:
        data = b"".join(b"data: " + _dump(body) + b"\n\n" for body in bodies) + end
        await send({"type": "http.response.body", "body": data, "more_body": True})

    await event(shaper.chunks(first))
    try:
        async for message in rest:
            await event(shaper.chunks(message))
    except Exception as error:
        if not isinstance(error, BatonError):
            log.exception("a streamed answer failed")
        await event([error_body(error)[1]])
    await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, whose request body was read, until it ends or the client goes."""
    running = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.wait((running, gone))
    if not running.cancelled():
        running.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise HTTPException(413, f"the body has more than {limit} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time") from None
    return bytes(data)


def _json(data: bytes) -> object:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _dump(body: Json) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _on_error(request: Request | None, error: Exception) -> Response:
    status, body = error_body(error)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(body, status, headers)


def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette raises itself, such as 404 and 405, and our 408 and 413."""
    assert isinstance(error, HTTPException)
    body = {"error": {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise ConfigError(
            f"can't listen on {host}:{port} for HTTP: stop what uses the port, or choose another"
        ) from None
    listener.setblocking(False)
    return listener
