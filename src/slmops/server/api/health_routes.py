"""For monitors: alive, ready, and numbers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from slmops.core.errors import BusyError, SlmopsError
from slmops.server.api.answers import answer
from slmops.server.api.callers import Served

router = APIRouter(tags=["health"])


@router.get("/healthz", response_class=Response)
def healthz() -> Response:
    """The process answers."""
    return answer({"status": "ok"})


@router.get("/readyz", response_class=Response)
def readyz(request: Request, services: Served) -> Response:
    """Database and metadata can be read, and the worker takes its turns."""
    try:
        with services.store.read() as tx:
            tx.journal.last_event_id()
        services.publication.file("timestamp.json")
    except SlmopsError as error:
        raise BusyError(f"not ready: {error.message}", hint=error.hint, retry_after_s=2) from error
    if not request.app.state.worker_alive():
        raise BusyError(
            "not ready: the rollout worker has stopped", hint="look at the server's log", retry_after_s=2
        )
    return answer({"status": "ready"})


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Prometheus exposition format."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
