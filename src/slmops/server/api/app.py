"""The application: routes, error documents, and the two headers that every response carries."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmops.core.errors import VersionMismatchError
from slmops.protocol.messages import PROTOCOL_HEADER, SCHEMA, TIME_HEADER
from slmops.server.api import (
    content_routes,
    device_routes,
    event_routes,
    health_routes,
    problems,
    release_routes,
    rollout_routes,
)
from slmops.server.api.answers import install_schemas
from slmops.server.api.device_side import DeviceSide
from slmops.server.api.event_routes import EventHub
from slmops.server.api.metrics import Metrics
from slmops.server.api.problems import error_response
from slmops.server.ports.world import Clock
from slmops.server.services.control_plane import Services
from slmops.server.services.words import rfc3339

_PROTOCOL = PROTOCOL_HEADER.lower().encode()
_TIME = TIME_HEADER.lower().encode()
_SPOKEN = str(SCHEMA).encode()


def create_app(  # noqa: PLR0913 - the parts of the surface
    services: Services,
    metrics: Metrics,
    hub: EventHub,
    worker_alive: Callable[[], bool],
    version: str,
    pages: APIRouter | None = None,
    page_errors: Callable[[FastAPI], None] | None = None,
) -> ASGIApp:
    """The whole HTTP surface.

    Args:
        services: what the routes call.
        metrics: what they count.
        hub: wakes event streams.
        worker_alive: for ``/readyz``.
        version: of slmops, for ``/openapi.json``.
        pages: the dashboard's routes.
        page_errors: installs the dashboard's own error pages.
    """
    app = FastAPI(
        title="slmops control plane",
        version=version,
        description="Which device runs which small language model, and how a change reaches the fleet.",
        docs_url=None,  # the interactive pages load scripts from a CDN
        redoc_url=None,
    )
    app.state.services = services
    app.state.metrics = metrics
    app.state.hub = hub
    app.state.worker_alive = worker_alive
    problems.install(app)
    for module in (
        device_routes,
        release_routes,
        rollout_routes,
        content_routes,
        event_routes,
        health_routes,
    ):
        app.include_router(module.router)
    if pages is not None:
        app.include_router(pages, include_in_schema=False)
    if page_errors is not None:
        page_errors(app)
    install_schemas(app)
    device_side = DeviceSide(services, metrics)
    fast: dict[str, ASGIApp] = {"/v1/checkin": device_side.checkin, "/v1/enroll": device_side.enroll}
    return Surface(app, fast, services.clock)


class Surface:
    """Sends the busy routes past FastAPI, checks the protocol version, and stamps every response."""

    def __init__(self, app: ASGIApp, fast: dict[str, ASGIApp], clock: Clock) -> None:
        """``fast`` is path to endpoint."""
        self._app = app
        self._fast = fast
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                now = rfc3339(self._clock.now()).encode()
                message["headers"] = [*message.get("headers", ()), (_PROTOCOL, _SPOKEN), (_TIME, now)]
            await send(message)

        path: str = scope["path"]
        spoken = next((value for name, value in scope["headers"] if name == _PROTOCOL), _SPOKEN)
        if spoken != _SPOKEN and path.startswith("/v1/") and not _understood(spoken):
            error = VersionMismatchError(
                f"you speak protocol {spoken.decode('latin-1')[:20]}, this control plane speaks {SCHEMA}",
                hint="update the control plane first, then devices and tools",
                expected=SCHEMA,
            )
            await error_response(error)(scope, receive, stamped)
            return
        await self._fast.get(path, self._app)(scope, receive, stamped)


def _understood(spoken: bytes) -> bool:
    """Older peers are understood; newer ones may mean something that we do not know."""
    return spoken.isdigit() and int(spoken) <= SCHEMA
