"""A variant of several files on a device: fetched, shown to the engine under their names, repaired, removed (ADR 0015)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.agent.store.slots import Slot, read_slot
from slmops.testing.agent_process import AgentProcess, make_release
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import MadeRelease, SignedReleases

pytestmark = pytest.mark.e2e

VOCABULARY = random.Random(5).randbytes(400_000)
PARTS = {
    "tokenizer.json": VOCABULARY,
    "weights/model.data": random.Random(6).randbytes(3_000_000),
    "empty.txt": b"",
}


@pytest.fixture(scope="module")
def releases() -> SignedReleases:
    return SignedReleases()


@pytest.fixture(scope="module")
def first(releases: SignedReleases, tmp_path_factory: pytest.TempPathFactory) -> MadeRelease:
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.0.0", parts=PARTS, padding_bytes=200_000)


@pytest.fixture(scope="module")
def second(
    releases: SignedReleases, first: MadeRelease, tmp_path_factory: pytest.TempPathFactory
) -> MadeRelease:
    """Another vocabulary, the same weights."""
    parts = PARTS | {"tokenizer.json": VOCABULARY[:200_000] + b"new" + VOCABULARY[200_000:]}
    return make_release(releases, tmp_path_factory.mktemp("m"), "1.1.0", parts=parts, padding_bytes=200_000)


@pytest.fixture
def plane(releases: SignedReleases) -> Iterator[FakeControlPlane]:
    with FakeControlPlane(releases) as running:
        yield running


@pytest.fixture
def device(tmp_path: Path, plane: FakeControlPlane) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "device", plane) as agent:
        yield agent


def commit(plane: FakeControlPlane, made: MadeRelease, generation: int) -> None:
    plane.assignment = made.assignment(generation)
    digest = plane.assignment.assignment_digest
    plane.reports.clear()
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest)


def committed(device: AgentProcess) -> tuple[str, Slot]:
    name = device.journal().state.committed_slot
    assert name is not None
    slot = read_slot(device.layout, name)
    assert slot is not None
    return name, slot


def part(slot: Slot, path: str) -> str:
    return next(a.sha256 for a in slot.artifacts if a.path == path)


def test_the_engine_finds_every_file_under_its_name_and_no_byte_lies_twice(
    device: AgentProcess, plane: FakeControlPlane, first: MadeRelease
) -> None:
    device.start()
    commit(plane, first, 1)
    assert device.answer() == "Helsinki"
    name, slot = committed(device)
    view = device.layout.view(name)
    assert {p.relative_to(view).as_posix() for p in view.rglob("*") if p.is_file()} == {*PARTS, "1.0.0.json"}
    for path, content in PARTS.items():
        assert (view / path).read_bytes() == content
        assert os.path.samefile(view / path, device.layout.artifact(part(slot, path)))


def test_an_update_moves_the_changed_part_only(
    device: AgentProcess, plane: FakeControlPlane, first: MadeRelease, second: MadeRelease
) -> None:
    device.start()
    commit(plane, first, 1)
    before, _ = committed(device)
    plane.fetched.clear()
    commit(plane, second, 2)
    moved = sum(len(plane.releases.blobs[digest]) * count for digest, count in plane.fetched.items())
    assert moved < 1_500_000, "weights were fetched again"
    device.stop()
    device.start()
    assert device.answer() == "Helsinki"
    after, _ = committed(device)
    assert before != after
    assert (device.layout.view(after) / "tokenizer.json").read_bytes() != VOCABULARY


@pytest.mark.parametrize("path", ["tokenizer.json", "weights/model.data"])
def test_a_damaged_part_is_never_served_and_its_chunks_are_fetched_again(
    device: AgentProcess, plane: FakeControlPlane, first: MadeRelease, path: str
) -> None:
    device.start()
    commit(plane, first, 1)
    name, slot = committed(device)
    device.stop()
    with device.layout.artifact(part(slot, path)).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    plane.reports.clear()
    device.start()
    digest = first.assignment(1).assignment_digest
    plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest)
    assert device.answer() == "Helsinki"
    assert (device.layout.view(name) / path).read_bytes() == PARTS[path]


def test_a_view_that_was_spoiled_is_made_anew(
    device: AgentProcess, plane: FakeControlPlane, first: MadeRelease
) -> None:
    """Nothing in it is trusted: it is made from the files by digest whenever an engine starts."""
    device.start()
    commit(plane, first, 1)
    name, _ = committed(device)
    device.stop()
    view = device.layout.view(name)
    (view / "tokenizer.json").unlink()
    (view / "tokenizer.json").write_bytes(b"another vocabulary")
    (view / "extra").write_bytes(b"not of this variant")
    device.start()
    assert device.answer() == "Helsinki"
    assert (view / "tokenizer.json").read_bytes() == VOCABULARY
    assert not (view / "extra").exists()
