"""The one right way to talk HTTP to an engine's socket; for this room, the gateway and tests.

Connections are not kept alive. llama.cpp's server announces `Keep-Alive` and then closes the connection after
every stream, and after five idle seconds: a client that reuses connections meets "server disconnected" at
random. A kept connection also holds one of the engine's few threads. A new one costs some 0.1 ms.
"""

from __future__ import annotations

from pathlib import Path

import httpx


def engine_client(socket_path: Path) -> httpx.AsyncClient:
    """Client for `Engine.socket_path`: relative addresses, no timeout, no kept connections.

    Without a timeout, because a long prefill is silent; callers bound their requests themselves.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    transport = httpx.AsyncHTTPTransport(uds=str(socket_path), limits=limits)
    return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None)
