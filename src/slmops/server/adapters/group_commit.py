"""Group commit: check-ins that arrive while the disk is busy share the next flush.

One thread writes. It takes everything that has arrived, writes it in one transaction (``synchronous=FULL``) and only then
lets the waiting requests answer: an acknowledged check-in survives a power cut, at the price of one flush for all of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from slmops.core.errors import BusyError, SlmopsError
from slmops.server.ports.rows import CheckinWrite
from slmops.server.ports.store import Store

#: check-ins of one transaction at most, so that one flush never keeps the others waiting for long
MAX_BATCH = 1024
#: a lone check-in waits this long for company, seconds: a flush costs ten times the CPU of a check-in
LINGER_S = 0.02
#: with this many waiting, nobody waits for more
ENOUGH = 32


class GroupCommit:
    """``CheckinJournal`` over a store.

    Args:
        store: where batches go.
        observe: called in the writer's thread with the batch's size after each flush.
        linger_s: how long a lone check-in waits for company, seconds.
    """

    def __init__(
        self, store: Store, observe: Callable[[int], None] | None = None, linger_s: float = LINGER_S
    ) -> None:
        """Start the writer."""
        self._store = store
        self._observe = observe
        self._linger_s = linger_s
        self._queue: list[tuple[CheckinWrite | None, asyncio.Future[None]]] = []
        self._arrived = threading.Condition()
        self._closed = False
        self._writer = threading.Thread(target=self._run, name="slmops-group-commit", daemon=True)
        self._writer.start()

    async def append(self, checkin: CheckinWrite | None) -> None:
        """Return after the check-in, and all before it, are on disk."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._arrived:
            if self._closed:
                raise BusyError(
                    "the control plane is stopping", hint="try again in a moment", retry_after_s=5
                )
            self._queue.append((checkin, future))
            self._arrived.notify()
        await future

    def close(self) -> None:
        """Write what has arrived, then stop."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._writer.join()

    def _enough(self) -> bool:
        return len(self._queue) >= ENOUGH or self._closed

    def _run(self) -> None:
        while True:
            with self._arrived:
                while not self._queue and not self._closed:
                    self._arrived.wait()
                if not self._queue:
                    return
                if len(self._queue) < ENOUGH and not self._closed:
                    self._arrived.wait_for(self._enough, self._linger_s)
                batch, self._queue = self._queue[:MAX_BATCH], self._queue[MAX_BATCH:]
            failure: SlmopsError | None = None
            try:
                with self._store.write() as tx:
                    tx.devices.record([checkin for checkin, _ in batch if checkin is not None])
            except SlmopsError as error:
                failure = error
            except Exception as error:
                failure = BusyError(
                    f"check-ins could not be written: {error}", hint="look at the server's log"
                )
            if self._observe is not None:
                self._observe(len(batch))
            _settle(batch, failure)


def _settle(
    batch: list[tuple[CheckinWrite | None, asyncio.Future[None]]], failure: SlmopsError | None
) -> None:
    """Wake all waiting requests of a loop with one call into it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for _, future in batch:
        by_loop.setdefault(future.get_loop(), []).append(future)
    for loop, futures in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, futures, failure)


def _resolve(futures: list[asyncio.Future[None]], failure: SlmopsError | None) -> None:
    for future in futures:
        if future.done():  # the client went away meanwhile
            continue
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)
