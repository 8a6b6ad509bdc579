"""What devices call: enrolment, and the check-in route, which is raw ASGI with msgspec because it is called all the time."""

from __future__ import annotations

import math

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slmops.core.errors import BugError, SlmopsError, UsageError
from slmops.protocol.messages import MAX_MESSAGE_BYTES, EnrollRequest, decode, encode
from slmops.server.api.metrics import Metrics
from slmops.server.api.problems import error_response
from slmops.server.services.control_plane import Services

log = structlog.get_logger("slmops.server.device_side")


class DeviceSide:
    """ASGI endpoints for devices."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        """Keep what is called on every request."""
        self._services = services
        self._metrics = metrics

    async def checkin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/checkin``: 204 unchanged, 200 with an order or an acknowledgement."""
        request = Request(scope, receive)
        try:
            response = await self._checkin(request)
        except SlmopsError as error:
            self._metrics.checkins.labels(error.code).inc()
            response = error_response(error)
        except ClientDisconnect:
            return
        except Exception as error:
            log.error("checkin.bug", exc_info=error)
            response = error_response(BugError("check-in failed", hint="the server's log has the trace"))
        await response(scope, receive, send)

    async def _checkin(self, request: Request) -> Response:
        require_post(request)
        services = self._services
        now_s = services.clock.now().timestamp()
        known = services.device_tokens.device(request.headers.get("authorization"), now_s)
        answer = await services.checkins.take(known, await _body(request))
        headers = {"Retry-After": str(max(math.ceil(answer.poll_s), 1))}
        if answer.body is None:
            self._metrics.checkins.labels("unchanged").inc()
            return Response(status_code=204, headers=headers)
        self._metrics.checkins.labels("changed").inc()
        return Response(encode(answer.body), 200, headers, "application/json")

    async def enroll(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/enroll``: a new device introduces itself."""
        request = Request(scope, receive)
        try:
            require_post(request)
            wanted = decode(await _body(request), EnrollRequest)
            response = await run_in_threadpool(self._enroll, wanted)
        except SlmopsError as error:
            log.info("enroll.refused", code=error.code)
            response = error_response(error)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    def _enroll(self, wanted: EnrollRequest) -> Response:
        services = self._services
        accepted = services.access.enroll(wanted, services.publication.root_text(), services.poll_s)
        services.registry.refresh((accepted.device_id,))
        log.info("enroll.accepted", device=accepted.device_id, profile=wanted.profile)
        return Response(encode(accepted), 201, media_type="application/json")


def require_post(request: Request) -> None:
    """Refuse other methods.

    Raises:
        UsageError: it is not a POST.
    """
    if request.method != "POST":
        raise UsageError(
            f"{request.method} {request.url.path}: only POST is answered here", hint="see /openapi.json"
        )


async def _body(request: Request) -> bytes:
    """The body, refused before it is whole when it is too long."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_MESSAGE_BYTES:
            raise UsageError(
                f"message has {size} bytes or more, {MAX_MESSAGE_BYTES} are allowed",
                hint="send fewer labels or facts",
            )
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
