"""The gateway's routes. Bytes of a stream are passed on as they come; nothing of a prompt or an answer is kept or logged."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slmops.agent.gateway.bodies import ClientGone, read_body
from slmops.agent.gateway.measures import Measures
from slmops.agent.gateway.openai_errors import JSON, error_body, from_engine, openai_error
from slmops.agent.gateway.requests import (
    BadRequest,
    Parsed,
    check_model,
    parse_chat,
    parse_completion,
    parse_embeddings,
    read_json,
)
from slmops.agent.gateway.responses import Answer, to_chat
from slmops.agent.serving import Backend, Router
from slmops.core.errors import BusyError, SlmopsError, UsageError
from slmops.runtimes.matrix import matrix_of

RELEASE_HEADER = "X-Slmops-Release"
IGNORED_HEADER = "X-Slmops-Ignored"
#: answers that are given before the whole body was read
UNREAD = (408, 413)
#: ignored fields that are named in a header, and how long a name may be there
MAX_NAMED, MAX_NAME_LENGTH = 16, 40
#: a request whose engine died before it answered is tried again, this many times
RETRIES = 3

Status = Callable[[], dict[str, Any]]
Prepare = Callable[[Backend], Parsed]


class Gateway:
    """Routes over one router."""

    def __init__(self, router: Router, measures: Measures, status: Status) -> None:
        """Serve what the router has; ``status`` tells the device's phase for ``/health``."""
        self._router = router
        self._measures = measures
        self._status = status

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._measured("models", self._models)),
                Route("/v1/models/{model:path}", self._measured("models", self._model)),
                Route("/v1/chat/completions", self._measured("chat", self._chat), methods=["POST"]),
                Route("/v1/completions", self._measured("completions", self._completions), methods=["POST"]),
                Route("/v1/responses", self._measured("responses", self._responses), methods=["POST"]),
                Route("/v1/embeddings", self._measured("embeddings", self._embeddings), methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={404: _unknown_route, 405: _unknown_route},
        )

    def _measured(
        self, route: str, act: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            began = time.perf_counter()
            try:
                response = await act(request)
            except BadRequest as refused:
                response = openai_error(
                    refused.status, refused.message, param=refused.param, code=refused.code
                )
                if refused.status in UNREAD:
                    response.headers["Connection"] = "close"  # the rest of the body is not wanted
            except ClientGone:
                response = Response(status_code=499)  # nobody reads it; it is the client's failure, not ours
            except BusyError as busy:
                response = openai_error(
                    503, busy.message, kind="server_error", code="no_model", retry_after_s=5
                )
            except UsageError as usage:
                response = openai_error(400, usage.message)
            except SlmopsError as error:
                response = openai_error(500, error.message, kind="server_error", code=error.code)
            if isinstance(response, StreamingResponse):
                response.body_iterator = self._counted(
                    response.body_iterator, response.status_code, route, began
                )
            else:
                self._measures.count(route, response.status_code, time.perf_counter() - began)
            return response

        return endpoint

    async def _counted(
        self, parts: AsyncIterable[Any], status: int, route: str, began: float
    ) -> AsyncIterator[Any]:
        """Count a stream when its last byte has gone."""
        first = True
        try:
            async for part in parts:
                if first:
                    self._measures.first_token.observe(time.perf_counter() - began)
                    first = False
                yield part
        except _BrokenStream:
            status = 502
            yield (
                b"data: "
                + error_body("the engine died while answering", kind="server_error", code="engine_died")
                + b"\n\n"
            )
        finally:
            self._measures.count(route, status, time.perf_counter() - began)

    # ---- models, health, metrics ------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        backend = self._router.active
        listed = [_model_card(backend)] if backend is not None else []
        return _json({"object": "list", "data": listed}, backend)

    async def _model(self, request: Request) -> Response:
        backend = self._router.active
        known = model_names(backend)
        if request.path_params["model"] not in known or backend is None:
            raise BadRequest(
                404,
                f"The model '{request.path_params['model']}' does not exist here",
                param="model",
                code="model_not_found",
            )
        return _json(_model_card(backend), backend)

    async def _health(self, request: Request) -> Response:
        """Answered by the agent itself, so a long prefill in the engine cannot hang it."""
        backend = self._router.active
        alive = backend is not None and backend.engine.alive()
        body = {
            "status": "ok"
            if alive
            else "no_model"
            if self._router.fallback or backend is None
            else "restarting",
            **self._status(),
        }
        if backend is not None:
            body["release"] = backend.release
            body["in_flight"] = backend.in_flight
        return Response(msgspec.json.encode(body), 200 if alive else 503, media_type=JSON)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._measures.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---- generation -------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = read_json(await read_body(request))
        return await self._generate(
            "/v1/chat/completions",
            body,
            lambda b: parse_chat(body, b.capabilities, b.system_prompt, b.engine.spec.runtime),
        )

    async def _responses(self, request: Request) -> Response:
        body = read_json(await read_body(request))
        chat = to_chat(body)

        def prepare(backend: Backend) -> Parsed:
            if chat.get("stream") and "stream_options" in backend.capabilities.chat_fields:
                chat["stream_options"] = {"include_usage": True}
            return parse_chat(chat, backend.capabilities, backend.system_prompt, backend.engine.spec.runtime)

        response = await self._generate("/v1/chat/completions", chat, prepare)
        answer = Answer(body)
        if isinstance(response, StreamingResponse):
            response.body_iterator = answer.events(aiter(response.body_iterator))
        elif response.status_code == httpx.codes.OK:
            headers = {name: value for name, value in response.headers.items() if name.startswith("x-")}
            return Response(answer.whole(bytes(response.body)), 200, headers, JSON)
        return response

    async def _completions(self, request: Request) -> Response:
        body = read_json(await read_body(request))
        return await self._generate(
            "/v1/completions",
            body,
            lambda b: parse_completion(body, b.capabilities, b.engine.spec.runtime),
        )

    async def _generate(self, path: str, body: dict[str, Any], prepare: Prepare) -> Response:
        """Forward a request; while nothing has been answered yet, a dead engine costs a retry, not a failure."""
        failed: Backend | None = None
        for attempt in range(RETRIES + 1):
            stack = AsyncExitStack()
            try:
                backend = await stack.enter_async_context(self._router.borrow(avoid=failed))
                check_model(body, model_names(backend))
                parsed = prepare(backend)
                request = backend.client.build_request(
                    "POST", path, content=msgspec.json.encode(parsed.body), headers={"Content-Type": JSON}
                )
                response = await backend.client.send(request, stream=True)
                stack.push_async_callback(response.aclose)
                headers = _headers(backend, parsed)
                if response.status_code != httpx.codes.OK or not parsed.stream:
                    content = await response.aread()
                    await stack.aclose()
                    status = response.status_code
                    if status != httpx.codes.OK:
                        status, content = from_engine(status, content)
                    return Response(content, status, headers, JSON)
                first = await _first_part(response)
                return _EngineStream(first, stack, headers)
            except (httpx.TransportError, _BrokenStream) as error:
                await stack.aclose()
                failed = backend if not backend.engine.alive() or attempt > 0 else None
                if attempt == RETRIES:
                    raise BusyError(
                        f"the engine broke off {RETRIES + 1} times: {type(error).__name__}",
                        hint="see the agent's log",
                    ) from error
            except BaseException:
                await stack.aclose()
                raise
        raise BusyError("unreachable", hint="")

    async def _embeddings(self, request: Request) -> Response:
        body = read_json(await read_body(request))
        async with self._router.borrow() as backend:
            check_model(body, model_names(backend))
            texts, encoding = parse_embeddings(body, backend.capabilities, backend.engine.spec.runtime)
            sizes = [len(await backend.engine.tokenize(text)) for text in texts]
            longest = (
                backend.engine.spec.ubatch_tokens - 2
            )  # one micro-batch, with the tokens around a sentence
            if max(sizes) > longest:
                raise BadRequest(
                    400,
                    f"an input has {max(sizes)} tokens, this device embeds at most {longest} at once: "
                    "serving.micro_batch_tokens of its blueprint raises that",
                    param="input",
                    code="context_length_exceeded",
                )
            vectors = await backend.engine.embed(texts)
            tokens = sum(sizes)
        items = [
            {
                "object": "embedding",
                "index": i,
                "embedding": v
                if encoding == "float"
                else base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode(),
            }
            for i, v in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": items, "model": body["model"], "usage": usage}, backend)


class _BrokenStream(Exception):
    """The engine's stream ended without its end mark."""


async def _first_part(response: httpx.Response) -> tuple[bytes, AsyncIterator[bytes]]:
    """Wait for the first bytes, so that an engine that dies during prefill can still be retried."""
    parts = response.aiter_raw()
    async for part in parts:
        return part, parts
    raise _BrokenStream


class _EngineStream(StreamingResponse):
    """The engine's stream, passed on.

    However it ends (or never begins), the backend is given back: a hang-up of the client closes the engine's stream,
    which stops its work.
    """

    def __init__(
        self, first: tuple[bytes, AsyncIterator[bytes]], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(_pass_on(first), 200, headers, "text/event-stream")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def _pass_on(first: tuple[bytes, AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    head, rest = first
    tail = head
    yield head
    try:
        async for part in rest:
            tail = (tail + part)[-32:]
            yield part
    except httpx.TransportError as error:
        raise _BrokenStream from error
    if b"[DONE]" not in tail:
        raise _BrokenStream


def model_names(backend: Backend | None) -> tuple[str, ...]:
    """Names under which a client may ask for what is served: the model, and the model with its version."""
    if backend is None:
        return ()
    return backend.slot.model_name, f"{backend.slot.model_name}@{backend.slot.assignment.version}"


def _model_card(backend: Backend) -> dict[str, Any]:
    assignment = backend.slot.assignment
    return {
        "id": backend.slot.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "slmops",
        "slmops": {
            "version": assignment.version,
            "release": assignment.release_sha256,
            "variant": assignment.variant_sha256,
            "context_tokens": assignment.serving.context_tokens if assignment.serving else None,
            "runtime": backend.engine.spec.runtime,
            "kv_cache": backend.engine.spec.kv_cache,
            "capabilities": matrix_of(backend.capabilities),
        },
    }


def _headers(backend: Backend, parsed: Parsed) -> dict[str, str]:
    headers = {RELEASE_HEADER: backend.release}
    if parsed.ignored:
        headers[IGNORED_HEADER] = ignored_header(parsed.ignored)
    return headers


def ignored_header(ignored: tuple[str, ...]) -> str:
    """Ignored fields in words that fit into a header, whatever a client called them."""
    shown = [
        name for name in ignored if name.isascii() and name.isprintable() and len(name) <= MAX_NAME_LENGTH
    ]
    named = shown[:MAX_NAMED]
    more = len(ignored) - len(named)
    return ", ".join((*named, f"and {more} more") if more else named)


def _json(body: dict[str, Any], backend: Backend | None) -> Response:
    headers = {RELEASE_HEADER: backend.release} if backend is not None else None
    return Response(msgspec.json.encode(body), headers=headers, media_type=JSON)


async def _unknown_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return openai_error(
        status, f"{request.method} {request.url.path} does not exist here", code="unknown_url"
    )
