"""Talking to the user's server, on loopback or on its Unix socket, with its key."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
_LISTENING = "0A"


@dataclass(frozen=True)
class Address:
    """Where the server listens: a port of loopback, or a Unix socket."""

    port: int = 0
    socket_path: Path | None = None

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket.

        Raises:
            OSError: nobody listens there.
        """
        if self.socket_path is not None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            try:
                connection.connect(str(self.socket_path))
            except BaseException:
                connection.close()
                raise
            return connection
        return socket.create_connection((LOOPBACK, self.port), timeout_s)


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._address, self._timeout_s = address, timeout_s

    def connect(self) -> None:
        """Over our address, in place of the host's name."""
        self.sock = self._address.connect(self._timeout_s)


@dataclass(frozen=True)
class Upstream:
    """The server as a client sees it."""

    address: Address
    api_key: str

    def get(self, path: str, timeout_s: float = 30.0) -> tuple[int, Any]:
        """Status and JSON value (None when it is none) of a route.

        Raises:
            OSError: no connection, or no answer in time.
        """
        return self._ask("GET", path, None, timeout_s)

    def post(self, path: str, body: object, timeout_s: float = 300.0) -> tuple[int, Any]:
        """The same for a question with a body."""
        return self._ask("POST", path, json.dumps(body).encode(), timeout_s)

    def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with contextlib.closing(_Connection(self.address, timeout_s)) as connection:
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                content = response.read()
            except http.client.HTTPException as error:
                raise OSError(f"{type(error).__name__} on {path}") from error
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, None


def free_port() -> int:
    """A port of loopback that nobody has now. Somebody may take it before the server does: `owns_port` finds out."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def owns_port(pids: Iterable[int], port: int) -> bool:
    """Tell whether one of these processes listens on the port; True where the kernel does not say."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return not Path("/proc/net/tcp").exists()
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:
                        return True
    return False


def descendants(pid: int) -> list[int]:
    """The process and every process below it, from /proc; empty when it is gone."""
    parents: dict[int, list[int]] = {}
    alive = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
            alive.add(int(name))
    found = [pid] if pid in alive else []
    for one in found:
        found += parents.get(one, [])
    return found
