"""The sockets that clients connect to: the gateway's and the control plane's."""

from __future__ import annotations

import asyncio
import socket

from slmops.agent.identity import DeviceConfig
from slmops.agent.main import listening_socket
from slmops.server.main import listen


def accepted_without_delay(listener: socket.socket) -> bool:
    """Whether asyncio switches Nagle's algorithm off for a connection that this socket accepts."""

    async def accept() -> bool:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            done.set_result(bool(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        server = await asyncio.start_server(connected, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            value = await asyncio.wait_for(done, 10)
            writer.close()
            await writer.wait_closed()
        return value

    return asyncio.run(accept())


def test_a_plain_socket_would_wait_for_acknowledgements() -> None:
    """The trap that the next two tests guard against: 40 ms on every second request of a busy client."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    assert not accepted_without_delay(listener)


def test_the_control_plane_answers_without_delay() -> None:
    assert accepted_without_delay(listen("127.0.0.1", 0))


def test_the_gateway_answers_without_delay() -> None:
    config = DeviceConfig(1, "d-1", "http://127.0.0.1:1", "pi5-8gb", "{}", gateway_port=0)
    with listening_socket(config) as listener:
        assert accepted_without_delay(listener)
