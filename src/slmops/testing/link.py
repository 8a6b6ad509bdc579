"""A bad network on one machine: a TCP relay on loopback that is slow, late, lossy or cut.

``netem`` is not to be had everywhere and needs root; a relay in user space is, and does not. What it cannot show is
packets: a loss here is a connection that breaks, which is what an HTTP client sees of a lossy link in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """What a link does to traffic, in both directions.

    Attributes:
        rate_bytes_s: bytes per second, of all connections together; None for no limit.
        delay_s: added to the first byte after every pause, each way.
        break_ratio: chance, 0..1, with which a block of 16 KiB breaks its connection.
        cut_after_s, cut_for_s: a partition: none can be made, and one that is used in it ends; counted from the
            first connection.
    """

    rate_bytes_s: float | None = None
    delay_s: float = 0.0
    break_ratio: float = 0.0
    cut_after_s: float = 0.0
    cut_for_s: float = 0.0


@dataclass
class LinkCounts:
    """What went through a link, and what did not.

    Attributes:
        connections: that were opened; ``broken``: by chance; ``cut``: refused or ended by the partition.
        bytes: in both directions.
    """

    connections: int = 0
    broken: int = 0
    cut: int = 0
    bytes: int = 0


class Link:
    """Relays connections to ``host:port``; a context manager. ``seed`` decides what breaks."""

    def __init__(self, host: str, port: int, profile: LinkProfile, *, seed: int = 0) -> None:
        """Nothing listens yet."""
        self._target = (host, port)
        self._profile = profile
        self._chance = random.Random(seed)
        self._first_s: float | None = None
        self._free_at_s = 0.0
        self._relays: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="link", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self.counts = LinkCounts()
        self.port = 0

    def __enter__(self) -> Link:
        """Listen on a free loopback port."""
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; open connections are broken."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        """Where to connect instead."""
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in self._relays:
            task.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close their sockets in the next turn

    def _is_cut(self) -> bool:
        profile = self._profile
        if not profile.cut_for_s:
            return False
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
        return profile.cut_after_s <= now_s - self._first_s < profile.cut_after_s + profile.cut_for_s

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            await self._carry(reader, writer)
        except asyncio.CancelledError:
            pass  # by `_serve`, at the end: asyncio's own callback would write a traceback about a cancelled connection
        finally:
            writer.transport.abort()
            self._relays.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        if self._is_cut():
            self.counts.cut += 1
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            return
        abort = _both_aborted(writer, far_writer)
        try:
            await asyncio.gather(
                self._one_way(reader, far_writer, abort),
                self._one_way(far_reader, writer, abort),
                return_exceptions=True,
            )
            for end in (writer, far_writer):  # what is on its way still arrives
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()
        finally:
            far_writer.transport.abort()

    async def _one_way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, abort: Callable[[], None]
    ) -> None:
        last_s = 0.0
        while block := await reader.read(_BLOCK_BYTES):
            if self._is_cut():
                self.counts.cut += 1
                abort()
                return
            if self._chance.random() < self._profile.break_ratio:
                self.counts.broken += 1
                abort()
                return
            if self._profile.delay_s and time.monotonic() - last_s > self._profile.delay_s:
                await asyncio.sleep(self._profile.delay_s)
            await self._take_turn(len(block))
            writer.write(block)
            await writer.drain()
            self.counts.bytes += len(block)
            last_s = time.monotonic()
        writer.write_eof()

    async def _take_turn(self, size_bytes: int) -> None:
        """Wait until the link has carried what was before, and this."""
        if self._profile.rate_bytes_s is None:
            return
        now_s = time.monotonic()
        self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._profile.rate_bytes_s
        await asyncio.sleep(self._free_at_s - now_s)


def _both_aborted(*writers: asyncio.StreamWriter) -> Callable[[], None]:
    def abort() -> None:
        for writer in writers:
            writer.transport.abort()

    return abort
