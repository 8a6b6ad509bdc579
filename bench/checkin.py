"""Promise ``checkin``: unchanged check-ins per second in one process, and what 10,000 devices at 30 s cost.

Every check-in is a real HTTP request over loopback, signed by its device (ES256), with a growing sequence number, and
answered after it is on disk (SQLite, WAL, synchronous=FULL). The peer, in the same run and with the same load: the usual
FastAPI route with a pydantic body, the same signature check, and one commit per request.

    python bench/checkin.py [--seconds 8] [--devices 2000] [--connections 256]

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import CryptoSigner

from slmops.artifact.trust import new_root, new_targets
from slmops.protocol.messages import DEVICE_AUDIENCE, SCHEMA, CheckinRequest, Facts

PROMISE_PER_S = 5_000.0
PROMISE_CORE_RATIO = 0.25
PROMISE_P99_MS = 50.0
FLEET = 10_000
POLL_S = 30.0


@dataclass
class Device:
    """One device: its token and a template of its report."""

    name: str
    key: ec.EllipticCurvePrivateKey
    token: str = ""
    seq: int = 0

    def request(self) -> bytes:
        """The next check-in, as HTTP/1.1."""
        self.seq += 1
        report = CheckinRequest(
            schema=SCHEMA,
            boot_id="bench",
            seq=self.seq,
            generation=0,
            phase="committed",
            running="a" * 64,
            running_release="b" * 64,
            fetched_bytes=90_000_000,
            requests=1000 + self.seq,
        )
        body = msgspec.json.encode(report)
        return (
            f"POST /v1/checkin HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self.token}\r\n"
            f"Content-Type: application/json\r\nX-Slmops-Protocol: {SCHEMA}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    def sign(self) -> None:
        """A token for the next two minutes."""
        now = int(time.time())
        claims = {"iss": self.name, "aud": DEVICE_AUDIENCE, "iat": now, "exp": now + 120}
        self.token = jwt.encode(claims, self.key, algorithm="ES256")


@dataclass
class Load:
    """What a run measured."""

    answered: int = 0
    errors: int = 0
    lost: bool = False
    latencies_s: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the last one was answered."""

    def __init__(self, devices: deque[Device], load: Load) -> None:
        """Share the devices with the other connections."""
        self.devices = devices
        self.load = load
        self.running = True
        self.paced = False
        self.idle = True
        self._device: Device | None = None
        self._sent_s = 0.0
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """A server that hangs up is a failed bench, not a slow one."""
        if self.running:
            self.load.lost = True

    def send_next(self) -> None:
        """One request of the device that has waited longest."""
        if not self.devices:
            return
        self._device = self.devices.popleft()
        self.idle = False
        self._sent_s = time.perf_counter()
        self.transport.write(self._device.request())

    def data_received(self, data: bytes) -> None:
        """Answers are short: a head without a body, or one with a length."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end]
        ok = head.startswith(b"HTTP/1.1 204")
        if not ok:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self._buffer) < end + 4 + length:
                return
            self.load.errors += 1
            if self.load.errors <= 3:
                print("  unexpected:", self._buffer[:400].decode(errors="replace"), file=sys.stderr)
        self._buffer = b""
        self.load.answered += 1
        self.load.latencies_s.append(time.perf_counter() - self._sent_s)
        assert self._device is not None
        self.devices.append(self._device)
        self.idle = True
        if not self.paced:
            self.send_next()


async def drive(
    url: str,
    devices: list[Device],
    connections: int,
    seconds: float,
    rate_s: float | None,
    used_s: Callable[[], float],
) -> tuple[Load, float, float]:
    """Load a server with ``rate_s`` requests per second, or as many as it takes.

    Returns the load, its seconds, and the CPU seconds that ``used_s`` saw meanwhile.
    """
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    load = Load()
    waiting = deque(devices)
    protocols = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(
            lambda: Connection(waiting, load), parts.hostname, parts.port
        )
        protocols.append(protocol)
    # Every device once, so that every token is verified before the clock starts.
    for protocol in protocols:
        protocol.send_next()
    while load.answered < len(devices):
        _require_alive(load)
        await asyncio.sleep(0.05)
    load.answered, load.latencies_s = 0, []
    began, used = time.perf_counter(), used_s()
    if rate_s is None:
        await asyncio.sleep(seconds)
    else:
        for protocol in protocols:
            protocol.paced = True
        while not all(protocol.idle for protocol in protocols):
            _require_alive(load)
            await asyncio.sleep(0.01)
        load.answered, load.latencies_s = 0, []
        began, used = time.perf_counter(), used_s()
        sent = 0
        while (now := time.perf_counter() - began) < seconds:
            for protocol in [p for p in protocols if p.idle][: max(int(now * rate_s) - sent, 0)]:
                protocol.send_next()
                sent += 1
            await asyncio.sleep(0.002)
    took, used = time.perf_counter() - began, used_s() - used
    for protocol in protocols:
        protocol.paced = True
    answered = load.answered
    while not all(protocol.idle for protocol in protocols):
        _require_alive(load)
        await asyncio.sleep(0.01)
    for protocol in protocols:
        protocol.running = False
        protocol.transport.close()
    load.answered = answered
    return load, took, used


def _require_alive(load: Load) -> None:
    if load.lost:
        raise SystemExit("the server closed a connection in the middle of the run")


# ---- servers ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, count: int) -> list[Device]:
    """A data folder with keys and enrolled devices (written straight into the store: enrolment is not measured)."""
    from slmops.server.adapters.database import SqlStore  # noqa: PLC0415
    from slmops.server.ports.rows import DeviceRow  # noqa: PLC0415

    private = ec.generate_private_key(ec.SECP256R1())
    online, root, release = (
        CryptoSigner(private),
        CryptoSigner.generate_ecdsa(),
        CryptoSigner.generate_ecdsa(),
    )
    now = datetime.now(timezone.utc)
    (folder / "keys").mkdir(parents=True)
    (folder / "tuf").mkdir()
    (folder / "keys/online.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (folder / "tuf/1.root.json").write_bytes(new_root([root], [release.public_key], [online.public_key], now))
    (folder / "tuf/1.targets.json").write_bytes(new_targets([release], now))
    facts = Facts("aarch64", 4, 2 << 30, 4 << 30, {"llama.cpp": "1"}, "0.1.0")
    devices = [Device(f"pi-{i}", ec.generate_private_key(ec.SECP256R1())) for i in range(count)]
    store = SqlStore.in_folder(folder)
    with store.write() as tx:
        for device in devices:
            pem = device.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            tx.devices.add(DeviceRow(device.name, "pi5-8gb", {}, pem.decode(), "0" * 64, now, facts))
    store.close()
    return devices


def start(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server process that says its URL in its first line."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the server did not start")
    return process, json.loads(line)["url"]


def cpu_s(process: subprocess.Popen[str]) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    arguments: list[str], devices: list[Device], connections: int, seconds: float, rate_s: float | None = None
) -> dict[str, float]:
    """Start a server, load it, stop it."""
    process, url = start(arguments)
    try:
        for device in devices:
            device.sign()
        work = drive(url, devices, connections, seconds, rate_s, lambda: cpu_s(process))
        load, took, used = asyncio.run(work)
    finally:
        process.terminate()
        process.wait(20)
    ordered = sorted(load.latencies_s)
    if load.errors:
        raise SystemExit(f"{load.errors} check-ins were not answered with 204")
    return {
        "per_s": load.answered / took,
        "p50_ms": 1000 * statistics.median(ordered),
        "p99_ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))],
        "core_ratio": used / took,
        "per_cpu_s": load.answered / used,
    }


PEER = """
import json, socket, sqlite3, sys, time
import jwt, uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from sqlalchemy import create_engine, event, text

engine = create_engine("sqlite:///" + sys.argv[1], connect_args={"check_same_thread": False})

@event.listens_for(engine, "connect")
def configure(connection, _):
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")

with engine.connect() as connection:
    keys = dict(connection.execute(text("select id, public_key_pem from devices")).all())

class Checkin(BaseModel):
    schema_: int = 1
    boot_id: str
    seq: int
    generation: int
    phase: str
    running: str = ""
    running_release: str = ""
    fetched_bytes: int = 0
    requests: int = 0

app = FastAPI()

@app.post("/v1/checkin")
async def checkin(body: Checkin, request: Request) -> Response:
    token = request.headers["authorization"][7:]
    name = jwt.decode(token, options={"verify_signature": False})["iss"]
    jwt.decode(token, keys[name], algorithms=["ES256"], audience="slmops-control-plane")
    with engine.begin() as connection:
        connection.execute(
            text("update devices set seq=:s, phase=:p, running=:r, requests=:q, last_seen_at=:t where id=:i"),
            {"s": body.seq, "p": body.phase, "r": body.running, "q": body.requests, "t": int(time.time()), "i": name},
        )
    return Response(status_code=204, headers={"Retry-After": "30"})

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(4096)
print(json.dumps({"url": "http://127.0.0.1:%d" % listener.getsockname()[1]}), flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)).run(sockets=[listener])
"""


def main() -> None:
    """Measure ours and the peer, then judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slmops-bench-") as name:
        folder = Path(name)
        devices = prepare(folder / "data", given.devices)
        server = [
            "-m",
            "slmops.server",
            "--data-dir",
            str(folder / "data"),
            "--port",
            "0",
            "--log-level",
            "error",
        ]
        ours = measure(server, devices, given.connections, given.seconds)
        print(
            f"ours:  {ours['per_s']:,.0f}/s  p50 {ours['p50_ms']:.1f} ms  p99 {ours['p99_ms']:.1f} ms  "
            f"{ours['core_ratio']:.2f} cores"
        )
        paced = measure(server, devices, given.connections, given.seconds, FLEET / POLL_S)
        print(
            f"fleet: {paced['per_s']:,.0f}/s  p50 {paced['p50_ms']:.1f} ms  p99 {paced['p99_ms']:.1f} ms  "
            f"{paced['core_ratio']:.3f} of a core ({FLEET} devices at {POLL_S:g} s)"
        )
        peer_script = folder / "peer.py"
        peer_script.write_text(PEER)
        database = str(folder / "data" / "slmops.db")
        peer = measure([str(peer_script), database], devices, given.connections, given.seconds)
        print(f"peer:  {peer['per_s']:,.0f}/s  p50 {peer['p50_ms']:.1f} ms  p99 {peer['p99_ms']:.1f} ms")
        peer_paced = measure(
            [str(peer_script), database], devices, given.connections, given.seconds, FLEET / POLL_S
        )
    peer_name = "FastAPI + pydantic, token verified and committed per request (same SQLite, same load)"
    results = [
        row(
            "unchanged check-ins per second, one process",
            ours["per_s"],
            peer["per_s"],
            "1/s",
            PROMISE_PER_S,
            True,
        ),
        row(
            "unchanged check-ins per CPU second (whatever else runs here)",
            ours["per_cpu_s"],
            peer["per_cpu_s"],
            "1/s",
            PROMISE_PER_S,
            True,
        ),
        row(
            "share of a core for 10,000 devices at 30 s",
            paced["core_ratio"],
            peer_paced["core_ratio"],
            "cores",
            PROMISE_CORE_RATIO,
            False,
        ),
        row(
            "p99 latency for 10,000 devices at 30 s",
            paced["p99_ms"],
            peer_paced["p99_ms"],
            "ms",
            PROMISE_P99_MS,
            False,
        ),
    ]
    for result in results:
        result["peer_name"] = peer_name
    print(json.dumps({"bench": "checkin", "results": results}))


def row(
    case: str, ours: float, peer: float, unit: str, promise: float, more_is_better: bool
) -> dict[str, object]:
    """One line of the result."""
    holds = ours >= promise if more_is_better else ours <= promise
    return {
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": "",
        "unit": unit,
        "ratio": round(ours / peer, 3),
        "promise": promise,
        "holds": holds,
    }


if __name__ == "__main__":
    main()
