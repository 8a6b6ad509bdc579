"""Our Unix socket in front of the user's server: one connection a request, bytes passed on as they come.

Only the head of a request is read: its path (to answer what is ours) and its headers (to put in the key). A client
that leaves closes the server's connection, which stops its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from slmops.runtimes.external.upstream import LOOPBACK, Address

_HEAD_BYTES = 64 << 10
_PART_BYTES = 64 << 10
_DROPPED = (b"connection:", b"authorization:", b"host:", b"keep-alive:")


class Relay:
    """The engine's socket.

    Args:
        address: where the server listens.
        api_key: put into every request.
        blocked: a route's refusal (status, error type, message), or None to pass it on; asked with method and path.
    """

    def __init__(
        self,
        address: Address,
        api_key: str,
        blocked: Callable[[str, str], tuple[int, str, str] | None],
    ) -> None:
        self._address = address
        self._api_key = api_key
        self._blocked = blocked
        #: the server has proved itself; until then every question is a 503
        self.ready = False
        self.health_path = "/health"

    async def serve(self, path: Path) -> asyncio.Server:
        """Listen."""
        return await asyncio.start_unix_server(self._connection, path, limit=_HEAD_BYTES, backlog=128)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await self._request(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        start = lines[0].split()
        if len(start) != 3:
            return
        method, path = start[0].decode("ascii", "replace"), start[1].decode("ascii", "replace")
        length = _length(lines[1:])
        if length is None:
            await _answer(writer, 411, _error(411, "invalid_request_error", "a body needs a Content-Length"))
            return
        if not self.ready:
            await _answer(writer, 503, _error(503, "unavailable_error", "Loading model"))
            return
        if (method, path) == ("GET", "/health"):
            await self._health(writer)
            return
        if (refusal := self._blocked(method, path)) is not None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readexactly(length)
            await _answer(writer, refusal[0], _error(*refusal))
            return
        await self._pass_on(lines, length, reader, writer)

    async def _pass_on(
        self, lines: list[bytes], length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The request to the server, the answer back; ends when either side has closed."""
        try:
            server_reader, server_writer = await self._open()
        except OSError as error:
            message = f"the server is not reached: {error}"
            await _answer(writer, 503, _error(503, "unavailable_error", message))
            return
        try:
            server_writer.write(self._head(lines))
            while length > 0:
                part = await reader.read(min(length, _PART_BYTES))
                if not part:
                    return
                length -= len(part)
                server_writer.write(part)
                await server_writer.drain()
            answer = asyncio.ensure_future(_copy(server_reader, writer))
            gone = asyncio.ensure_future(reader.read(1))  # nothing more comes from a client that waits
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            for one in (answer, gone):
                one.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        finally:
            server_writer.transport.abort()  # at once: bytes that nobody reads must not keep it open

    def _head(self, lines: list[bytes]) -> bytes:
        kept = [line for line in lines[1:] if line and not line.lower().startswith(_DROPPED)]
        ours = [
            b"Host: localhost",
            b"Connection: close",
            b"Authorization: Bearer " + self._api_key.encode("ascii"),
        ]
        return b"\r\n".join([lines[0], *ours, *kept]) + b"\r\n\r\n"

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._address.socket_path is not None:
            return await asyncio.open_unix_connection(self._address.socket_path)
        return await asyncio.open_connection(LOOPBACK, self._address.port)

    async def _health(self, writer: asyncio.StreamWriter) -> None:
        if await self.healthy():
            await _answer(writer, 200, {"status": "ok"})
        else:
            await _answer(writer, 503, _error(503, "unavailable_error", "the server does not answer"))

    async def healthy(self, timeout_s: float = 30.0) -> bool:
        """Whether the server's health path says 200."""
        with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return await asyncio.wait_for(self._ask_health(), timeout_s)
        return False

    async def _ask_health(self) -> bool:
        reader, writer = await self._open()
        try:
            writer.write(self._head([f"GET {self.health_path} HTTP/1.1".encode("ascii")]))
            status = (await reader.readline()).split()
            return len(status) >= 2 and status[1] == b"200"
        finally:
            writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(_PART_BYTES):
            writer.write(part)
            await writer.drain()


def _length(headers: list[bytes]) -> int | None:
    """Bytes of the body; None when it comes without saying how many."""
    for line in headers:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"transfer-encoding":
            return None
        if name.strip().lower() == b"content-length":
            return int(value) if value.strip().isdigit() else None
    return 0


def _error(status: int, kind: str, message: str) -> dict[str, object]:
    return {"error": {"code": status, "type": kind, "message": message}}


async def _answer(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode("ascii") + body)
    await writer.drain()
