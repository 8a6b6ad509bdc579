"""Server-sent events: what happened, in order, resumable by ``Last-Event-ID``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from slmops.client.records import EventRecord
from slmops.server.api.callers import Served, Viewer
from slmops.server.ports.rows import EventRow
from slmops.server.ports.store import Store
from slmops.server.services.words import rfc3339

#: a comment is sent after this much silence, so that both sides notice a broken line
KEEP_ALIVE_S = 15.0

router = APIRouter(prefix="/v1", tags=["events"])


class EventHub:
    """Wakes the streams of all event loops when something was committed; a ``Bell``."""

    def __init__(self) -> None:
        """Begin open."""
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self.closed = False

    def ring(self) -> None:
        """Wake everybody; safe from any thread."""
        for loop, event in tuple(self._waiting):
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """End all streams."""
        self.closed = True
        self.ring()

    def join(self) -> asyncio.Event:
        """An event that is set at each ring; give it back to :meth:`leave`."""
        event = asyncio.Event()
        self._waiting.add((asyncio.get_running_loop(), event))
        return event

    def leave(self, event: asyncio.Event) -> None:
        """Stop waiting."""
        self._waiting = {entry for entry in self._waiting if entry[1] is not event}


@router.get("/events", response_class=Response)
async def events(request: Request, services: Served, caller: Viewer) -> Response:
    """A stream of events; without ``Last-Event-ID`` only new ones."""
    hub: EventHub = request.app.state.hub
    header = request.headers.get("last-event-id", "")
    after = (
        int(header)
        if header.isascii() and header.isdigit()
        else await run_in_threadpool(_last, services.store)
    )
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _stream(hub, services.store, after), headers=headers, media_type="text/event-stream"
    )


async def _stream(hub: EventHub, store: Store, after: int) -> AsyncIterator[bytes]:
    woken = hub.join()
    try:
        yield b": slmops events\n\n"
        while not hub.closed:
            woken.clear()
            rows = await run_in_threadpool(_read, store, after)
            for row in rows:
                after = row.id
                yield _frame(row)
            if rows:
                continue
            try:
                await asyncio.wait_for(woken.wait(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield b": still here\n\n"
    finally:
        hub.leave(woken)


def _frame(row: EventRow) -> bytes:
    record = EventRecord(id=row.id, at=rfc3339(row.at), kind=row.kind, subject=row.subject, detail=row.detail)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (row.id, row.kind.encode(), msgspec.json.encode(record))


def _read(store: Store, after: int) -> list[EventRow]:
    with store.read() as tx:
        return tx.journal.events(after)


def _last(store: Store) -> int:
    with store.read() as tx:
        return tx.journal.last_event_id()
