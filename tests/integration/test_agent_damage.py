"""A device whose disk lies, is full or forgets: it serves only what it proved, repairs it by itself, and says the truth."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from slmops.agent.identity import load_config, save_config
from slmops.agent.main import order_revert_offline
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_slot
from slmops.core.device.machine import Phase
from slmops.testing.agent_process import AgentProcess, make_release
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SignedReleases

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def releases() -> SignedReleases:
    return SignedReleases()


@pytest.fixture(scope="module")
def first(releases: SignedReleases, tmp_path_factory: pytest.TempPathFactory):
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.0.0")


@pytest.fixture(scope="module")
def second(releases: SignedReleases, first, tmp_path_factory: pytest.TempPathFactory):
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.1.0", confidence=0.89)


@pytest.fixture
def plane(releases: SignedReleases) -> Iterator[FakeControlPlane]:
    with FakeControlPlane(releases) as running:
        yield running


@pytest.fixture
def device(tmp_path: Path, plane: FakeControlPlane) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "device", plane) as agent:
        yield agent


def commit(plane: FakeControlPlane, made, generation: int) -> None:
    plane.assignment = made.assignment(generation)
    running(plane, plane.assignment.assignment_digest)


def running(plane: FakeControlPlane, digest: str, phase: str = "committed") -> None:
    """Wait for fresh reports: the ones before say how it was."""
    plane.reports.clear()
    plane.wait_for(lambda p: p.last is not None and p.last.phase == phase and p.last.running == digest)


def role_path(device: AgentProcess, role: str) -> Path:
    """A file of the committed release."""
    state = device.journal().state
    assert state.committed_slot is not None
    slot = read_slot(device.layout, state.committed_slot)
    assert slot is not None
    return device.layout.artifact(slot.digest_of(role))


def overwrite(path: Path) -> None:
    """Damage the middle of a file without changing its size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        was = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([was[0] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def told(device: AgentProcess) -> dict[str, object]:
    """What ``slmops agent status --json`` says."""
    command = [
        sys.executable,
        "-m",
        "slmops.cli.main",
        "agent",
        "status",
        "--json",
        "--dir",
        str(device.layout.root),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    return dict(json.loads(done.stdout))


def outcomes(plane: FakeControlPlane) -> list[tuple[str, str]]:
    """Status and cause of every outcome that was reported, in order, without repeats."""
    seen: list[tuple[str, str]] = []
    for report in list(plane.reports):
        if report.outcome is not None and (report.outcome.status, report.outcome.cause) not in seen[-1:]:
            seen.append((report.outcome.status, report.outcome.cause))
    return seen


@pytest.mark.parametrize("damage", [overwrite, truncate, Path.unlink], ids=["flipped", "truncated", "gone"])
def test_damaged_weights_are_never_served_and_only_their_damaged_chunks_are_fetched_again(
    device: AgentProcess, plane: FakeControlPlane, first, damage: Callable[[Path], None]
) -> None:
    """Found at the start, before the engine loads; while nothing can be fetched the device says that it serves nothing."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    damage(role_path(device, "model"))
    plane.faults.down = True
    plane.fetched.clear()
    device.start()
    assert device.ask().status_code == 503
    assert (told(device)["serves"], told(device)["phase"]) == ("", "safe_fallback")
    plane.reports.clear()
    plane.faults.down = False
    digest = plane.assignment.assignment_digest if plane.assignment else ""
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest)
    assert device.answer() == "Helsinki"
    assert str(told(device)["serves"]).startswith("assistant@1.0.0")
    fetched = sum(len(plane.releases.blobs[digest]) * count for digest, count in plane.fetched.items())
    size = first.variant.model_file().bytes
    if damage is overwrite:
        assert 0 < fetched < size / 2
    elif damage is truncate:
        assert 0 < fetched < size
    wrong = [r for r in plane.reports if r.phase == "committed" and r.running != digest]
    assert not wrong, "it was reported as committed while it did not run"
    assert outcomes(plane)[-1] == ("committed", "")


def test_damage_is_reported_as_the_environments_and_the_same_release_again_settles_when_it_runs(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    """A second rollout of the lost release ends as committed, once it serves again."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    truncate(role_path(device, "model"))
    plane.faults.refuse_chunks = 3
    plane.reports.clear()
    plane.assignment = first.assignment(2, rollout_id="again")
    device.start()
    plane.wait_for(
        lambda p: any(r.outcome is not None and r.outcome.rollout_id == "again" for r in p.reports)
    )
    for report in list(plane.reports):
        if report.outcome is not None and report.outcome.status == "committed":
            assert report.running == report.outcome.assignment_digest
    assert all(cause != "content" for _, cause in outcomes(plane))
    assert device.answer() == "Helsinki"


def test_the_previous_release_stands_in_for_a_damaged_one(
    device: AgentProcess, plane: FakeControlPlane, first, second
) -> None:
    """Its release is in the answer's header, in the report and in the status; then the repaired one takes over."""
    device.start()
    commit(plane, first, 1)
    commit(plane, second, 2)
    device.stop()
    truncate(role_path(device, "variant"))  # not needed to serve: mended on the way
    overwrite(role_path(device, "model"))
    plane.faults.refuse_chunks = 10**6
    device.start()
    old = first.assignment(1).assignment_digest
    running(plane, old, "safe_fallback")
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.0.0")
    assert "1.0.0" in str(told(device)["serves"]) and "1.1.0" in str(told(device)["committed"])
    plane.faults.refuse_chunks = 0
    running(plane, second.assignment(2).assignment_digest)
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.1.0")
    assert device.journal().state.previous is not None


@pytest.mark.parametrize("role", ["variant", "golden-pack", "chunk-map", "release"])
def test_a_damaged_document_stops_neither_serving_nor_a_good_newer_release(
    device: AgentProcess, plane: FakeControlPlane, first, second, role: str
) -> None:
    """One flipped byte in a kilobyte: the device serves after a restart, offline, and takes the next release."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    overwrite(role_path(device, role))
    plane.faults.down = True
    device.start()
    assert device.answer() == "Helsinki"
    plane.faults.down = False
    plane.reports.clear()
    commit(plane, second, 2)
    assert outcomes(plane)[-1] == ("committed", "")


def test_a_newer_release_is_taken_while_the_committed_one_cannot_be_repaired(
    device: AgentProcess, plane: FakeControlPlane, releases: SignedReleases, first, second
) -> None:
    """The damaged chunk is gone from the control plane; the good newer release is not held up by it."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    model = role_path(device, "model")
    content = model.read_bytes()
    overwrite(model)
    at = len(content) // 2
    chunk_map = msgspec.json.decode(role_path(device, "chunk-map").read_bytes())
    offset = 0
    for chunk in chunk_map["chunks"]:
        if offset <= at < offset + chunk["bytes"]:
            lost = chunk["sha256"]
        offset += chunk["bytes"]
    shared = lost in {c["sha256"] for c in _chunks_of(releases, second)}
    kept = releases.blobs.pop(lost)
    try:
        device.start()
        running(plane, "", "safe_fallback")
        if shared:
            releases.blobs[lost] = kept
        commit(plane, second, 2)
    finally:
        releases.blobs[lost] = kept
    assert device.answer() == "Helsinki"


def _chunks_of(releases: SignedReleases, made) -> list[dict[str, str]]:
    chunk_map = releases.blobs[made.variant.model_file().chunk_map.sha256]
    return list(msgspec.json.decode(chunk_map)["chunks"])


def test_a_damaged_slot_is_made_anew_from_what_was_assigned(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    device.start()
    commit(plane, first, 1)
    device.stop()
    device.layout.slot("a").write_bytes(b"\x00" * 40)
    device.layout.slot("b").write_bytes(b"\x00" * 40)
    device.start()
    running(plane, first.assignment(1).assignment_digest)
    assert device.answer() == "Helsinki"


def test_an_engine_that_dies_over_a_damaged_file_is_repaired(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    """No restart of the agent is needed: every start of an engine hashes what it loads."""
    device.start()
    commit(plane, first, 1)
    overwrite(role_path(device, "model"))
    for pid in device.engines():
        os.kill(pid, signal.SIGKILL)
    plane.wait_for(lambda p: ("fallback", "environment") in outcomes(p))
    running(plane, first.assignment(1).assignment_digest)
    assert device.answer() == "Helsinki"


def test_a_revert_to_a_damaged_slot_leaves_the_proved_release_serving(
    device: AgentProcess, plane: FakeControlPlane, first, second
) -> None:
    device.start()
    commit(plane, first, 1)
    commit(plane, second, 2)
    state = device.journal().state
    other = read_slot(device.layout, state.candidate_slot)
    assert other is not None and device.process is not None
    truncate(device.layout.artifact(other.digest_of("model")))
    before = device.engines()
    os.kill(device.process.pid, signal.SIGUSR1)
    plane.wait_for(
        lambda p: any(r.outcome is not None and r.outcome.code == "device.revert_failed" for r in p.reports)
    )
    running(plane, second.assignment(2).assignment_digest)
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.1.0")
    assert device.engines() == before, "the proved engine was never stopped"
    device.stop()
    device.start()
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.1.0")


def test_a_revert_at_the_device_during_a_download_is_a_refusal(
    device: AgentProcess, plane: FakeControlPlane, first, second
) -> None:
    """Reported with its cause, so that the rollout settles; whether the agent runs or not."""
    device.start()
    commit(plane, first, 1)
    plane.faults.delay_chunk_s = 0.3
    plane.assignment = second.assignment(2)
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "downloading")
    assert device.process is not None
    os.kill(device.process.pid, signal.SIGUSR1)
    plane.wait_for(lambda p: ("refused", "operator") in outcomes(p))
    running(plane, first.assignment(1).assignment_digest)
    plane.assignment = second.assignment(3)
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "downloading")
    device.kill()
    plane.reports.clear()
    assert "refused" in order_revert_offline(device.layout)
    device.start()
    plane.wait_for(lambda p: ("refused", "operator") in outcomes(p))
    plane.faults.delay_chunk_s = 0.0
    commit(plane, second, 4)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"", b"c\n"])
def test_a_damaged_pointer_does_not_matter_at_rest(
    device: AgentProcess, plane: FakeControlPlane, first, damage: bytes
) -> None:
    """The journal knows the committed slot; the pointer is written anew."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    pointer = device.layout.pointer.read_bytes()
    device.layout.pointer.write_bytes(damage)
    device.start()
    assert device.answer() == "Helsinki"
    assert device.layout.pointer.read_bytes() == pointer


@pytest.mark.parametrize("counters", [b'{"seq":"x"}', b'{"seq":-5}', None])
def test_lost_counters_go_on_after_what_the_control_plane_has_seen(
    device: AgentProcess, plane: FakeControlPlane, first, counters: bytes | None
) -> None:
    plane.check_seq = True
    device.start()
    commit(plane, first, 1)
    device.stop()
    seen = plane.last.seq if plane.last is not None else 0
    if counters is None:
        device.layout.counters.unlink()
    else:
        device.layout.counters.write_bytes(counters)
    plane.reports.clear()
    device.start()
    plane.wait_for(lambda p: p.last is not None and p.last.seq > seen)
    assert plane.refused_seqs == 1


def test_a_full_disk_and_a_restart_serve_what_was_proved(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    """The file-size limit stands for the full disk: nothing can be written, the release still answers, reports still go."""
    device.start()
    commit(plane, first, 1)
    device.stop()
    device.layout.counters.unlink()
    port = _free_port()
    save_config(device.layout, msgspec.structs.replace(load_config(device.layout), gateway_port=port))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "slmops.cli.main", "agent", "run", "--dir", str(device.layout.root)]
    plane.reports.clear()
    agent = subprocess.Popen(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        body = {"model": "assistant", "messages": [{"role": "user", "content": "the capital of Finland"}]}
        answer = _until_up(f"http://127.0.0.1:{port}/v1/chat/completions", body, agent)
        assert answer.json()["choices"][0]["message"]["content"] == "Helsinki"
        plane.wait_for(lambda p: p.last is not None and p.last.running != "")
        assert not (device.layout.root / "run.json").exists()
    finally:
        agent.terminate()
        agent.wait(30)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _until_up(url: str, body: dict[str, object], agent: subprocess.Popen[bytes]) -> httpx.Response:
    end = time.monotonic() + 30
    while True:
        try:
            return httpx.post(url, json=body, timeout=60.0, trust_env=False)
        except httpx.ConnectError:
            assert agent.poll() is None, "the agent ended"
            assert time.monotonic() < end
            time.sleep(0.05)


def test_the_offline_order_without_anything_before_says_so(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    device.start()
    commit(plane, first, 1)
    device.stop()
    assert "nothing to go back to" in order_revert_offline(Layout(device.layout.root))
    assert device.journal().state.phase is Phase.COMMITTED
