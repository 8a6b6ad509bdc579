"""A tiny HTTP/1.1 server on a Unix socket, for engine children: no email parser, one thread a connection.

It serves our own client and gateway only (content length or no body; streams come in chunks and end their
connection). It is no server for strangers: the socket is the caller's alone (mode 0600 by umask).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import socketserver
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

MAX_BODY_BYTES = 64 << 20
_MAX_HEADER_LINES = 100
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    499: "Client Closed Request",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Request:
    """One request; `body` is complete. `gone` tells whether the client has hung up meanwhile."""

    method: str
    path: str
    body: bytes = field(repr=False)
    gone: Callable[[], bool] = field(default=lambda: False, repr=False)

    def json(self) -> Any:
        """Body as JSON; an empty body is an empty object."""
        return json.loads(self.body) if self.body else {}


@dataclass(frozen=True)
class Response:
    """One answer: a JSON value, or a stream of events that is closed when the client goes away."""

    status: int = 200
    value: Any = None
    events: Iterator[bytes] | None = None


def error_response(status: int, kind: str, message: str, **fields: object) -> Response:
    """An error in OpenAI's shape."""
    return Response(status, {"error": {"code": status, "type": kind, "message": message, **fields}})


class UnixHttpServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves `answer` on `path`; `serve_forever` blocks."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path, answer: Callable[[Request], Response]) -> None:
        self.answer = answer
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        super().__init__(str(path), _Connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Connection(socketserver.StreamRequestHandler):
    """One connection, in a thread of its own."""

    server: UnixHttpServer

    def handle(self) -> None:
        while (request := _read_request(self.rfile)) is not None:
            request = replace(request, gone=lambda: _hung_up(self.connection))
            try:
                response = self.server.answer(request)
            except ValueError as error:
                response = error_response(400, "invalid_request_error", str(error))
            if not _write_response(self.connection, response):
                return


def _read_request(stream: BufferedIOBase) -> Request | None:
    start = stream.readline(8192).split()
    if len(start) != 3:
        return None
    length = 0
    for _ in range(_MAX_HEADER_LINES):
        line = stream.readline(8192)
        if line in (b"\r\n", b"\n", b""):
            break
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    if not 0 <= length <= MAX_BODY_BYTES:
        return None
    return Request(start[0].decode("ascii"), start[1].decode("ascii"), stream.read(length))


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed; a client of ours sends nothing while it waits."""
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except (OSError, ValueError):
        return True


def _write_response(connection: socket.socket, response: Response) -> bool:
    """Send; tell whether the connection can be used again."""
    status = f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Status')}\r\n"
    if response.events is None:
        body = json.dumps(response.value).encode()
        head = f"{status}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("ascii") + body)
        return True
    head = f"{status}Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head.encode("ascii"))
    with contextlib.closing(response.events) as events:  # type: ignore[type-var]
        for event in events:
            connection.sendall(b"%x\r\n%s\r\n" % (len(event), event))
    connection.sendall(b"0\r\n\r\n")
    return False  # as llama.cpp does, so that a client which reuses connections after a stream is found out
