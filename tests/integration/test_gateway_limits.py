"""The device's API against clients that send too much, too slowly, nonsense, or hang up: a small device stays small."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.agent.gateway import bodies
from slmops.agent.gateway.bodies import ClientGone, read_body
from slmops.agent.gateway.requests import MAX_BODY_BYTES, BadRequest
from slmops.testing.agent_process import AgentProcess, make_release
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SignedReleases

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeControlPlane]:
    with FakeControlPlane(SignedReleases()) as running:
        yield running


@pytest.fixture(scope="module")
def device(plane: FakeControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    made = make_release(plane.releases, tmp_path_factory.mktemp("m"), "1.0.0", padding_bytes=100_000)
    with AgentProcess(tmp_path_factory.mktemp("limits") / "device", plane) as agent:
        agent.start()
        plane.assignment = made.assignment(1)
        plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed")
        yield agent


def rss_bytes(device: AgentProcess) -> int:
    assert device.process is not None
    status = Path(f"/proc/{device.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def raw(device: AgentProcess, content: bytes) -> socket.socket:
    """A connection with a request begun by hand."""
    host, _, port = device.url.removeprefix("http://").removesuffix("/v1").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: device\r\n" + content)
    return connection


def test_answers_and_stream_chunks_carry_the_models_name(device: AgentProcess) -> None:
    """Not the digest under which its file lies."""
    assert device.ask().json()["model"] == "assistant"
    stream = device.ask(stream=True).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert chunks and {chunk["model"] for chunk in chunks} == {"assistant"}
    completion = httpx.post(
        f"{device.url}/completions",
        json={"model": "assistant", "prompt": "x", "max_tokens": 2},
        trust_env=False,
    )
    assert completion.json()["model"] == "assistant"


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(device: AgentProcess) -> None:
    with raw(device, f"Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode()) as connection:
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer.lower()


def test_large_bodies_in_parallel_never_lie_in_memory(device: AgentProcess) -> None:
    """Six times 60 MB that announce no length: each is cut off at the limit."""
    device.ask()
    before, peak = rss_bytes(device), 0
    refused: list[bool] = []

    def send() -> None:
        with raw(device, b"Transfer-Encoding: chunked\r\n\r\n") as connection:
            part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            try:
                for _ in range(60 << 4):
                    connection.sendall(part)
                refused.append(False)
            except OSError:  # it was told, and the connection closed
                refused.append(True)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, rss_bytes(device))
        time.sleep(0.01)
    assert refused == [True] * 6
    assert peak - before < 6 * 2 * MAX_BODY_BYTES + (32 << 20)
    assert device.answer() == "Helsinki"


def test_clients_that_hang_up_leave_no_trace_and_no_failed_request(
    device: AgentProcess, plane: FakeControlPlane
) -> None:
    before = metric(device, "5xx")
    for _ in range(20):
        raw(device, b'Content-Length: 100\r\n\r\n{"mo').close()
    assert device.answer() == "Helsinki"
    assert "Traceback" not in device.text()
    assert metric(device, "5xx") == before


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": ["x"], "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"response_format": {"type": "json_schema"}},
        {"tool_choice": "required"},
        {"max_tokens": 0},
        {"temperature": 99},
    ],
    ids=repr,
)
def test_a_clients_mistake_is_400_and_no_failed_request_of_the_device(
    device: AgentProcess, fields: dict[str, Any]
) -> None:
    before = metric(device, "5xx")
    response = device.ask(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in fields
    assert metric(device, "5xx") == before


def test_many_unknown_fields_make_a_small_header(device: AgentProcess) -> None:
    response = device.ask(**{f"made_up_{number}": 1 for number in range(3000)})
    assert response.status_code == 200
    assert len(response.headers["X-Slmops-Ignored"]) < 1000
    assert "more" in response.headers["X-Slmops-Ignored"]


def test_a_text_too_long_to_embed_is_told_what_raises_the_limit(device: AgentProcess) -> None:
    body = {"model": "assistant", "input": "word " * 2000}
    response = httpx.post(f"{device.url}/embeddings", json=body, trust_env=False, timeout=60)
    assert response.status_code == 400
    assert "micro_batch_tokens" in response.json()["error"]["message"]


def metric(device: AgentProcess, status: str) -> float:
    text = httpx.get(device.url.removesuffix("/v1") + "/metrics", trust_env=False).text
    lines = [
        line for line in text.splitlines() if line.startswith("slmops_requests_total") and status in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


# ---- the reader alone ------------------------------------------------------------------------------------------------


class Sent:
    """A request whose messages a test writes; after the last one nothing comes."""

    def __init__(self, *messages: dict[str, Any], length: str = "") -> None:
        self.messages = list(messages)
        self.headers = {"content-length": length} if length else {}

    async def receive(self) -> dict[str, Any]:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)


def read(sent: Sent) -> bytes:
    return bytes(asyncio.run(read_body(sent)))  # type: ignore[arg-type]


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_arrives_in_parts() -> None:
    assert read(Sent(part(b"ab"), part(b""), part(b"c", more=False))) == b"abc"
    assert read(Sent({"type": "http.request"})) == b""


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "STALL_TIMEOUT_S", 0.05)
    with pytest.raises(BadRequest) as refused:
        read(Sent(part(b"ab")))
    assert refused.value.status == 408


def test_a_body_is_refused_as_soon_as_it_is_too_long() -> None:
    sent = Sent(part(b" " * MAX_BODY_BYTES), part(b" "), part(b"never read"))
    with pytest.raises(BadRequest) as refused:
        read(sent)
    assert (refused.value.status, len(sent.messages)) == (413, 1)
    with pytest.raises(BadRequest, match="announces"):
        read(Sent(length=str(MAX_BODY_BYTES + 1)))


def test_a_client_that_hangs_up_is_no_error_of_ours() -> None:
    with pytest.raises(ClientGone):
        read(Sent(part(b"ab"), {"type": "http.disconnect"}))
