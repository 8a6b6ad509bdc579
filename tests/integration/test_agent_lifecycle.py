"""A real agent process against a real (fake-minded) control plane: update, refusal, revert, kill, liars, silence."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import msgspec
import pytest

from slmops.artifact.chunkmap import decode_chunk_map
from slmops.cli.local_fleet.asking import ask
from slmops.core.device.machine import Phase
from slmops.testing.agent_process import AgentProcess, make_bad_release, make_release
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SERVING, SignedReleases

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> SignedReleases:
    return SignedReleases()


@pytest.fixture
def plane(releases: SignedReleases) -> Iterator[FakeControlPlane]:
    with FakeControlPlane(releases) as running:
        yield running


@pytest.fixture
def device(tmp_path: Path, plane: FakeControlPlane) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "device", plane) as agent:
        yield agent


@pytest.fixture(scope="module")
def first(releases: SignedReleases, tmp_path_factory: pytest.TempPathFactory):
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.0.0")


@pytest.fixture(scope="module")
def second(releases: SignedReleases, first, tmp_path_factory: pytest.TempPathFactory):
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.1.0", confidence=0.89)


@pytest.fixture(scope="module")
def bad(releases: SignedReleases, first, second, tmp_path_factory: pytest.TempPathFactory):
    return make_bad_release(releases, tmp_path_factory.mktemp("m"), "1.2.0")


def _commit(plane: FakeControlPlane, made, generation: int) -> None:
    plane.assignment = made.assignment(generation)
    digest = plane.assignment.assignment_digest
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest)


def test_takes_a_first_release_and_serves_it(device: AgentProcess, plane: FakeControlPlane, first) -> None:
    """From nothing to committed, through every phase, and the answer carries its release."""
    device.start()
    _commit(plane, first, 1)
    response = device.ask()
    assert response.json()["choices"][0]["message"]["content"] == "Helsinki"
    assert response.headers["X-Slmops-Release"].startswith("assistant@1.0.0+")
    outcome = next(r.outcome for r in plane.reports if r.outcome is not None)
    assert outcome.status == "committed"
    assert outcome.golden is not None and outcome.golden.own_passed == 3 and outcome.golden.own_failed == 0


def test_an_update_takes_known_chunks_from_the_active_slot(
    device: AgentProcess, plane: FakeControlPlane, first, second
) -> None:
    """Only what is not on the device moves; a client that asks all the time sees no failure."""
    device.start()
    _commit(plane, first, 1)
    with _Load(device) as load:
        _commit(plane, second, 2)
    assert load.failed == []
    assert load.served > 0
    outcome = next(r.outcome for r in reversed(plane.reports) if r.outcome is not None)
    model = second.variant.model_file()
    assert 0 < outcome.fetched_bytes < model.bytes
    assert outcome.golden is not None and outcome.golden.both == 3 and outcome.golden.only_old == 0
    assert device.journal().state.previous is not None


def test_a_bad_release_is_refused_by_the_committed_pack(
    device: AgentProcess, plane: FakeControlPlane, first, bad
) -> None:
    """It passes its own golden pack, and is still refused; nobody ever gets its answer; it is quarantined."""
    device.start()
    _commit(plane, first, 1)
    with _Load(device) as load:
        plane.assignment = bad.assignment(2)
        plane.wait_for(lambda p: p.last is not None and p.last.phase == "reverted")
    assert load.failed == []
    assert set(load.answers) == {"Helsinki"}
    outcome = next(r.outcome for r in reversed(plane.reports) if r.outcome is not None)
    assert (outcome.status, outcome.cause, outcome.code) == ("reverted", "content", "golden.committed_pack")
    assert outcome.golden is not None
    assert (outcome.golden.own_passed, outcome.golden.own_failed) == (3, 0)
    assert outcome.golden.only_old == 3
    plane.assignment = bad.assignment(3)
    plane.wait_for(lambda p: any(r.outcome is not None and r.outcome.generation == 3 for r in p.reports))
    last = next(r.outcome for r in reversed(plane.reports) if r.outcome is not None)
    assert (last.status, last.code) == ("refused", "device.quarantined")
    assert device.answer() == "Helsinki"


def test_a_device_too_small_refuses_before_the_first_byte(
    tmp_path: Path, plane: FakeControlPlane, first
) -> None:
    with AgentProcess(tmp_path / "small", plane, ram_limit_bytes=50 << 20) as device:
        device.start()
        plane.fetched.clear()
        plane.assignment = first.assignment(1)
        plane.wait_for(lambda p: any(r.outcome is not None for r in p.reports))
        outcome = next(r.outcome for r in plane.reports if r.outcome is not None)
        assert (outcome.status, outcome.code) == ("refused", "device.does_not_fit")
        assert "memory: needs" in outcome.detail
        chunk_digests = {c for c, content in plane.releases.blobs.items() if len(content) > 100_000}
        assert not chunk_digests & set(plane.fetched)


PHASES = (
    Phase.ADMISSION,
    Phase.DOWNLOADING,
    Phase.VERIFYING,
    Phase.STAGED,
    Phase.ACTIVATING,
    Phase.PROBATION,
    Phase.COMMITTED,
)


@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.value)
def test_killed_in_a_phase_it_goes_on_and_serves_the_old_release_meanwhile(
    device: AgentProcess, plane: FakeControlPlane, first, second, phase: Phase
) -> None:
    """Kill -9 as soon as the journal shows the phase: after a restart the device serves at once and ends committed."""
    device.start()
    _commit(plane, first, 1)
    plane.faults.delay_chunk_s = 0.05
    digest = _caught_in(device, plane, second, phase)
    device.kill()
    state = device.journal().state
    assert state.committed is not None  # always old or new, never neither
    device.start()
    assert device.answer() == "Helsinki"
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest)


def test_killed_while_reverting_it_finishes_the_revert(
    device: AgentProcess, plane: FakeControlPlane, first, bad
) -> None:
    device.start()
    _commit(plane, first, 1)
    plane.assignment = bad.assignment(2)
    _until_journal(device, Phase.REVERTING, None)
    device.kill()
    device.start()
    assert device.answer() == "Helsinki"
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "reverted")


def test_a_kill_costs_at_most_one_chunk(device: AgentProcess, plane: FakeControlPlane, first) -> None:
    device.start()
    plane.faults.delay_chunk_s = 0.05
    plane.fetched.clear()
    plane.assignment = first.assignment(1)
    _until_journal(device, Phase.DOWNLOADING, plane.assignment.assignment_digest)
    large = {digest for digest, content in plane.releases.blobs.items() if len(content) > 100_000}
    plane.wait_for(lambda p: sum(p.fetched[d] for d in large) >= 2)
    device.kill()
    plane.faults.delay_chunk_s = 0.0
    device.start()
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed")
    assert sum(count - 1 for digest, count in plane.fetched.items() if digest in large) <= 1


def test_serves_without_the_control_plane_and_reverts_offline(
    tmp_path: Path, releases: SignedReleases, first, second
) -> None:
    with FakeControlPlane(releases) as plane:
        device = AgentProcess(tmp_path / "device", plane)
        device.start()
        _commit(plane, first, 1)
        _commit(plane, second, 2)
        assert device.process is not None
        device.stop()
    device.start()  # nobody answers any more
    with device:
        assert device.answer() == "Helsinki"
        assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.1.0")
        assert device.process is not None
        os.kill(device.process.pid, signal.SIGUSR1)
        _until_journal(device, Phase.REVERTED, None)
        assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.0.0")


def test_windows_hold_back_download_and_activation(
    device: AgentProcess, plane: FakeControlPlane, first, second
) -> None:
    """What serves goes on; a restart inside the wait changes nothing; an order without windows ends the wait."""
    device.start()
    _commit(plane, first, 1)
    in_twelve_hours = f"0 {(datetime.now(timezone.utc).astimezone().hour + 12) % 24} * * * +1h"
    order = second.assignment(2)
    model = second.variant.model_file()
    chunk_map = decode_chunk_map(plane.releases.blobs[model.chunk_map.sha256])
    new = {chunk.sha256 for _, chunk in chunk_map.offsets()} - set(plane.fetched)

    plane.assignment = msgspec.structs.replace(order, download_window=in_twelve_hours)
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "downloading")
    _until_log(device, "download waits for its window")
    assert new
    assert not new & set(plane.fetched)
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.0.0")

    plane.assignment = msgspec.structs.replace(order, generation=3, activate_window=in_twelve_hours)
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "staged", 90)
    assert new <= set(plane.fetched)
    device.stop()
    device.start()
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "staged")
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.0.0")

    plane.assignment = msgspec.structs.replace(order, generation=4)
    plane.wait_for(
        lambda p: p.last is not None and p.last.phase == "committed" and p.last.generation == 4, 90
    )
    assert device.ask().headers["X-Slmops-Release"].startswith("assistant@1.1.0")


@pytest.mark.parametrize("fault", ["flip_chunks", "truncate_chunks", "endless_chunks", "refuse_chunks"])
def test_spoiled_downloads_are_fetched_again(
    device: AgentProcess, plane: FakeControlPlane, first, fault: str
) -> None:
    """Two bad answers in a row: wrong bytes are never kept, and the update ends well."""
    setattr(plane.faults, fault, 2)
    device.start()
    _commit(plane, first, 1)
    assert device.answer() == "Helsinki"


def test_a_server_that_assigns_what_was_never_signed_is_refused(
    device: AgentProcess, plane: FakeControlPlane, first
) -> None:
    device.start()
    honest = first.assignment(1)
    plane.assignment = msgspec.structs.replace(honest, release_sha256="0" * 64)
    plane.wait_for(lambda p: any(r.outcome is not None for r in p.reports))
    outcome = next(r.outcome for r in plane.reports if r.outcome is not None)
    assert (outcome.status, outcome.code) == ("failed", "trust.digest")
    plane.assignment = msgspec.structs.replace(
        honest, generation=2, serving=msgspec.structs.replace(honest.serving, context_tokens=256)
    )
    plane.wait_for(lambda p: p.last is not None and p.last.generation == 2 and p.last.phase == "idle")
    _commit(plane, first, 3)


def test_a_clock_wrong_by_years_does_not_matter(device: AgentProcess, plane: FakeControlPlane, first) -> None:
    plane.faults.clock_offset_s = 8 * 365 * 86_400.0
    device.start()
    _commit(plane, first, 1)


def test_an_engine_that_dies_is_started_again(device: AgentProcess, plane: FakeControlPlane, first) -> None:
    device.start()
    _commit(plane, first, 1)
    engines = device.engines()
    assert engines
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    assert device.answer() == "Helsinki"


def test_a_release_whose_engine_crashes_is_reverted(
    device: AgentProcess, plane: FakeControlPlane, releases: SignedReleases, first, tmp_path: Path
) -> None:
    """It loads, then dies on a golden prompt: content failure, old release still there."""
    crashing = make_release(releases, tmp_path, "9.0.0", faults={"crash_on_request": 40})
    device.start()
    _commit(plane, first, 1)
    plane.assignment = crashing.assignment(2, probation_min_s=20.0)
    digest = plane.assignment.assignment_digest
    with _Load(device):
        plane.wait_for(lambda p: p.last is not None and p.last.phase == "reverted")
    assert digest in device.journal().state.quarantine
    assert device.answer() == "Helsinki"


def test_memory_for_one_engine_swaps_cold_and_queues_requests(
    tmp_path: Path, plane: FakeControlPlane, first, second
) -> None:
    """RAM for one model only: requests wait while it is swapped, none fails."""
    with AgentProcess(tmp_path / "tight", plane, ram_limit_bytes=150 << 20) as device:
        device.start()
        _commit(plane, first, 1)
        with _Load(device) as load:
            _commit(plane, second, 2)
        assert load.failed == []
        assert "memory holds one engine" in device.text()


def test_two_agents_on_one_folder_are_refused(device: AgentProcess, plane: FakeControlPlane) -> None:
    import subprocess
    import sys

    device.start()
    command = [sys.executable, "-m", "slmops.cli.main", "agent", "run", "--dir", str(device.layout.root)]
    second_agent = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert second_agent.returncode == 75
    assert "another agent" in second_agent.stderr


class _Load:
    """Asks all the time in a thread, streaming every second time."""

    def __init__(self, device: AgentProcess) -> None:
        self._device, self._stop = device, threading.Event()
        self.served, self.failed, self.answers = 0, [], []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Load:
        self._url = self._device.url
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120.0, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(
                        ask(client, "assistant", "capital of Finland", stream=self.served % 2 == 0)[0]
                    )
                    self.served += 1
                except (httpx.HTTPError, ValueError) as error:
                    self.failed.append(repr(error))
                self._stop.wait(0.02)


def _caught_in(device: AgentProcess, plane: FakeControlPlane, made, phase: Phase) -> str:
    """Assign until the journal is seen in a phase: some last milliseconds only, so the same release is tried again.

    Another context size makes another assignment of it. Returns the digest of the one that was caught.
    """
    for attempt in range(30):
        serving = msgspec.structs.replace(SERVING, context_tokens=512 + 64 * attempt)
        plane.assignment = made.assignment(2 + attempt, serving=serving, probation_min_s=0.3)
        digest = plane.assignment.assignment_digest
        while True:
            state = device.journal().state
            target = state.committed if state.phase is Phase.COMMITTED else state.candidate
            if target is not None and target.assignment_digest == digest:
                if state.phase is phase:
                    return digest
                if state.phase is Phase.COMMITTED:
                    break
    raise AssertionError(f"{phase.value} was never seen")


def _until_log(device: AgentProcess, text: str) -> None:
    end = time.monotonic() + 60
    while text not in device.text():
        assert time.monotonic() < end, device.text()[-2000:]
        time.sleep(0.05)


def _until_journal(device: AgentProcess, phase: Phase, digest: str | None) -> None:
    """Poll the journal, quickly: a phase may last only milliseconds."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        state = device.journal().state
        target = state.committed if phase is Phase.COMMITTED else state.candidate
        if state.phase is phase and (
            digest is None or (target is not None and target.assignment_digest == digest)
        ):
            return
        time.sleep(0.001)
    raise AssertionError(
        f"{phase.value} was not seen; now {device.journal().state.phase.value}\n{device.text()[-2000:]}"
    )
