"""The bad network: bytes arrive as they were sent, slower, later or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from slmops.testing.link import Link, LinkProfile


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that gives back what it gets; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_give_back, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def _give_back(connection: socket.socket) -> None:
    try:
        with connection:
            while block := connection.recv(1 << 16):
                connection.sendall(block)
    except OSError:
        return


def through(link: Link, content: bytes) -> bytes:
    """Send, close our half, and read to the end."""
    with socket.create_connection(("127.0.0.1", link.port), 10) as connection:
        sender = threading.Thread(target=_send, args=(connection, content), daemon=True)
        sender.start()
        got = b""
        while block := connection.recv(1 << 16):
            got += block
        sender.join(10)
        return got


def _ends_when_used(connection: socket.socket) -> bool:
    """Whether the other side ends a connection that is used again and again."""
    try:
        while True:
            connection.sendall(b"during")
            if not connection.recv(100):
                return True
            time.sleep(0.02)
    except ConnectionError:
        return True


def _passes(link: Link, content: bytes) -> bool:
    try:
        return through(link, content) == content
    except OSError:
        return False


def _send(connection: socket.socket, content: bytes) -> None:
    try:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_a_good_link_changes_nothing(echo: int) -> None:
    content = bytes(range(256)) * 2000
    with Link("127.0.0.1", echo, LinkProfile()) as link:
        assert through(link, content) == content
        assert link.counts.bytes == 2 * len(content)
        assert (link.counts.connections, link.counts.broken, link.counts.cut) == (1, 0, 0)


def test_a_slow_link_takes_its_time(echo: int) -> None:
    """No faster than its rate; how much slower a busy machine makes it is not asked."""
    content = b"x" * 100_000
    with Link("127.0.0.1", echo, LinkProfile(rate_bytes_s=400_000, delay_s=0.05)) as link:
        began_s = time.monotonic()
        assert through(link, content) == content
        assert time.monotonic() - began_s > 2 * len(content) / 400_000


def test_a_lossy_link_breaks_connections_and_the_seed_says_which(echo: int) -> None:
    content = b"x" * 400_000
    with Link("127.0.0.1", echo, LinkProfile(break_ratio=1.0)) as link:
        with pytest.raises(ConnectionError):
            assert through(link, content) != content
            raise ConnectionResetError  # an end of file is a broken connection, too
        assert link.counts.broken == 1


def test_a_partition_ends_what_was_open_and_refuses_what_comes(echo: int) -> None:
    with Link("127.0.0.1", echo, LinkProfile(cut_after_s=1.0, cut_for_s=1.0)) as link:
        with socket.create_connection(("127.0.0.1", link.port), 10) as connection:
            connection.sendall(b"before")
            assert connection.recv(100) == b"before"
            assert _ends_when_used(connection)
        while not _passes(link, b"after"):
            time.sleep(0.05)
        assert link.counts.cut >= 1
