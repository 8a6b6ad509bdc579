"""The control plane as a process: starting, stopping, being killed, and what its log says."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.support.control_plane import Keys, blueprint, enrolled, make_release, over_http, publish

from slmops.artifact.digest import sha256_hex
from slmops.client import ControlPlane
from slmops.core.errors import NetworkError, NoSpaceError
from slmops.server.main import ServerOptions, create_operator_token

pytestmark = pytest.mark.e2e


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path
    log: Path

    def kill(self) -> None:
        """No goodbye."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start(data_dir: Path, *arguments: str, file_limit_bytes: int | None = None) -> Server:
    """Start a server on a free port."""
    log = data_dir.parent / "server.log"
    command = [sys.executable, "-m", "slmops.server", "--data-dir", str(data_dir), "--port", "0", *arguments]
    with log.open("a") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    if file_limit_bytes is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))
    return Server(process, json.loads(line)["url"], data_dir, log)


@contextmanager
def serving(data_dir: Path, *arguments: str, **limits: int) -> Iterator[Server]:
    """A server that is gone at the end."""
    server = start(data_dir, *arguments, **limits)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(20)
        assert server.process.stdout is not None
        server.process.stdout.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A server that is expected to give up."""
    command = [sys.executable, "-m", "slmops.server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def token_for(server: Server, name: str) -> str:
    """An admin's token, made beside the running server."""
    return create_operator_token(ServerOptions(data_dir=server.data_dir), "admin", name, None)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, Keys]:
    """A data folder with keys."""
    keys = Keys()
    keys.prepare(tmp_path / "data")
    return tmp_path / "data", keys


def test_a_folder_without_keys_says_which_command_makes_them(tmp_path: Path) -> None:
    """Exit code 2, one sentence, the fix; no trace."""
    done = run("--data-dir", str(tmp_path / "data"), "--port", "0")
    assert done.returncode == 2
    assert "slmops keys init --server-data" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_busy_port_and_a_busy_folder_are_named_with_the_fix(
    prepared: tuple[Path, Keys], tmp_path: Path
) -> None:
    """Exit code 75: another try may succeed."""
    data_dir, _ = prepared
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("--data-dir", str(data_dir), "--port", port)
    assert done.returncode == 75
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    with serving(data_dir) as server:
        second = run("--data-dir", str(data_dir), "--port", "0")
        assert second.returncode == 75
        assert f"is in use by another control plane (process {server.process.pid})" in second.stderr


def test_it_stops_when_told_to_even_while_somebody_listens_to_events(prepared: tuple[Path, Keys]) -> None:
    """The stream ends, the exit code is 0, and the folder is free again."""
    data_dir, _ = prepared
    with serving(data_dir) as server:
        token = token_for(server, "listener")
        with httpx.Client(trust_env=False, timeout=30) as client:
            headers = {"Authorization": f"Bearer {token}"}
            with client.stream("GET", f"{server.url}/v1/events", headers=headers) as stream:
                lines = stream.iter_lines()
                assert next(lines) == ": slmops events"
                server.process.send_signal(signal.SIGTERM)
                assert all(not line.startswith("data:") for line in lines)
        assert server.process.wait(30) == 0
    with serving(data_dir) as again:
        assert httpx.get(f"{again.url}/readyz", trust_env=False).status_code == 200
        assert again.stop() == 0


def test_a_server_killed_again_and_again_loses_and_doubles_nothing(prepared: tuple[Path, Keys]) -> None:
    """Kill -9 in the middle of a rollout, four times: every device gets one order, and the rollout completes."""
    data_dir, keys = prepared
    ticks = ("--tick-s", "0.01")
    server = start(data_dir, *ticks)
    token = token_for(server, "killer")
    try:
        with (
            ControlPlane(server.url, token) as api,
            httpx.Client(base_url=server.url, trust_env=False) as http,
        ):
            publish(api, keys, make_release("1.0.0", 1))
            devices = enrolled(api, http, [f"pi-{i}" for i in range(8)])
            waves = "[{limit: 1}, {limit: 3}, {limit: 100%}]"
            rollout_id = api.apply_blueprint(blueprint(version="1.0.0", waves=waves)).rollout_id
        rounds = kills = 0
        phase = ""
        while phase != "completed" and rounds < 400:
            rounds += 1
            if kills < 4:
                server.kill()
                assert server.process.stdout is not None
                server.process.stdout.close()
                server = start(data_dir, *ticks)
                kills += 1
            with httpx.Client(base_url=server.url, trust_env=False) as http:
                for device in devices:
                    device.send = over_http(http)
                    device.checkin()
            with ControlPlane(server.url, token) as api:
                phase = api.rollout(rollout_id).phase
        assert (phase, kills) == ("completed", 4)
        assert [device.generations for device in devices] == [[(1, "run")]] * 8
        with ControlPlane(server.url, token) as api:
            assert api.rollout(rollout_id).counts.committed == 8
            assert {found.generation for found in api.devices()} == {1}
    finally:
        server.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()


def test_a_checkin_that_was_answered_survives_the_kill(prepared: tuple[Path, Keys]) -> None:
    """Acknowledged means on disk: its number cannot be used again after the restart."""
    data_dir, _ = prepared
    with serving(data_dir) as server:
        token = token_for(server, "durable")
        with (
            ControlPlane(server.url, token) as api,
            httpx.Client(base_url=server.url, trust_env=False) as http,
        ):
            (device,) = enrolled(api, http, ["durable"])
            for _ in range(5):
                device.checkin()
        server.kill()
    with serving(data_dir) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        device.send = over_http(http)
        device.seq -= 2
        with pytest.raises(Exception, match=f"{device.seq + 2} was accepted already"):
            device.checkin()
        device.seq += 1
        device.checkin()


def test_a_full_disk_refuses_the_upload_and_keeps_nothing_of_it(prepared: tuple[Path, Keys]) -> None:
    """The kernel refuses to write on: 507 with our code, no leftover, and the server goes on."""
    data_dir, _ = prepared
    content = os.urandom(3 << 20)
    name = sha256_hex(content)
    with serving(data_dir, file_limit_bytes=2 << 20) as server:
        token = token_for(server, "uploader")
        with ControlPlane(server.url, token) as api:
            with pytest.raises(NoSpaceError, match="no space for the bytes that came") as caught:
                api.put_blob(name, content)
            assert caught.value.exit_code == 1
            assert api.missing_blobs([name]) == [name]
            small = os.urandom(1000)
            api.put_blob(sha256_hex(small), small)
            assert api.blob(sha256_hex(small)) == small
    files = [path.name for path in (data_dir / "chunks").rglob("*") if path.is_file()]
    assert files == [sha256_hex(small)]


def test_the_log_is_json_and_holds_no_secret(prepared: tuple[Path, Keys]) -> None:
    """Neither tokens, nor keys, nor what was sent."""
    data_dir, _ = prepared
    with serving(data_dir, "--log-level", "debug") as server:
        token = token_for(server, "logger")
        with (
            ControlPlane(server.url, token) as api,
            httpx.Client(base_url=server.url, trust_env=False) as http,
        ):
            enrolment = api.create_device_token(uses=2).token
            (device,) = enrolled(api, http, ["logged"])
            bearer = device.bearer()
            device.checkin()
            http.get("/v1/devices", headers={"Authorization": "Bearer slm_wrong-token-wrong"})
            http.post("/login", data={"token": "slm_wrong-login-wrong"}, headers={"Origin": server.url})
        server.stop()
    text = server.log.read_text()
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert {"server.listening", "enroll.accepted", "server.stopped"} <= set(events)
    pem = (data_dir / "keys" / "online.pem").read_text().splitlines()[1]
    for secret in (token, enrolment, bearer[7:], "slm_wrong-token-wrong", "slm_wrong-login-wrong", pem):
        assert secret not in text


def test_tokens_are_stored_as_hashes_only(prepared: tuple[Path, Keys]) -> None:
    """A stolen database opens nothing."""
    data_dir, _ = prepared
    with serving(data_dir) as server:
        token = token_for(server, "hashed")
        with ControlPlane(server.url, token) as api:
            enrolment = api.create_device_token().token
        response = httpx.post(
            f"{server.url}/login", data={"token": token}, headers={"Origin": server.url}, trust_env=False
        )
        cookie = response.cookies["slmops_session"]
        server.stop()
    stored = b"".join(path.read_bytes() for path in data_dir.glob("slmops.db*"))
    for secret in (token, enrolment, cookie):
        assert secret.encode() not in stored
    assert data_dir.stat().st_mode & 0o777 == 0o700


def test_a_server_that_is_gone_is_a_network_error(prepared: tuple[Path, Keys]) -> None:
    """With the address and the command."""
    data_dir, _ = prepared
    with serving(data_dir) as server:
        token = token_for(server, "gone")
        server.stop()
        with ControlPlane(server.url, token) as api, pytest.raises(NetworkError, match="slmops server run"):
            api.devices()
