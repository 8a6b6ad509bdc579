"""The children's small HTTP server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from slmops.runtimes.unix_http import Request, Response, UnixHttpServer


class Service:
    def __init__(self) -> None:
        self.closed = threading.Event()

    def answer(self, request: Request) -> Response:
        if request.path == "/stream":
            return Response(events=self.events())
        if request.path == "/bad":
            raise ValueError("wrong value")
        return Response(value={"method": request.method, "body": request.json()})

    def events(self) -> Iterator[bytes]:
        try:
            while True:
                yield b"data: " + b"x" * 4096 + b"\n\n"
        finally:
            self.closed.set()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Service, Path]]:
    path = tmp_path / "s.sock"
    service = Service()
    with UnixHttpServer(path, service.answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service, path
        server.shutdown()
        thread.join()


def client_of(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x")


def test_keeps_connections_and_bodies(service: tuple[Service, Path]) -> None:
    """Several requests go over one connection, each with its own body; an error of input is a 400."""
    with client_of(service[1]) as client:
        for number in range(3):
            assert client.post("/echo", json={"n": number}).json() == {
                "method": "POST",
                "body": {"n": number},
            }
        assert client.get("/echo").json() == {"method": "GET", "body": {}}
        assert client.get("/bad").status_code == 400
        assert client.post("/echo", content=b"{").status_code == 400
        assert client.get("/echo").status_code == 200


def test_a_reader_that_leaves_ends_the_stream(service: tuple[Service, Path]) -> None:
    """The generator behind a stream is closed when its client disconnects."""
    with client_of(service[1]) as client, client.stream("GET", "/stream") as response:
        assert next(response.iter_bytes())
    assert service[0].closed.wait(timeout=30)


HEAD = b"POST /echo HTTP/1.1\r\nContent-Length: "


@pytest.mark.parametrize("raw", [b"nonsense\r\n\r\n", HEAD + b"-5\r\n\r\n", HEAD + b"99999999999\r\n\r\n"])
def test_what_is_no_request_is_dropped(service: tuple[Service, Path], raw: bytes) -> None:
    """A broken request closes its connection and harms nobody else."""
    with socket.socket(socket.AF_UNIX) as raw_client:
        raw_client.connect(str(service[1]))
        raw_client.sendall(raw)
        assert raw_client.recv(1) == b""
    with client_of(service[1]) as client:
        assert client.get("/echo").status_code == 200
