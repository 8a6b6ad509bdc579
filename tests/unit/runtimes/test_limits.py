"""Limits: the mechanism that is reported is the one that works, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.core.errors import NoMemoryError
from slmops.runtimes import EngineLimits, EngineSpec, limits, open_engine


def test_no_limits_are_no_limits() -> None:
    """Nothing asked for, nothing applied."""
    applied = limits.prepare(None)
    assert applied.reports == () == applied.folders
    assert applied.child.private_bytes is None
    assert applied.child.cgroup_procs == ()


def test_without_cgroups_memory_is_an_rlimit_and_cpu_is_not_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without writable cgroups is told so plainly."""
    monkeypatch.setattr(limits, "_own_cgroups", lambda: [])
    applied = limits.prepare(EngineLimits(memory_bytes=1 << 30, cpu_cores=0.5, nice=5))
    assert [(one.limit, one.mechanism) for one in applied.reports] == [
        ("memory_bytes", "rlimit"),
        ("cpu_cores", "none"),
        ("nice", "nice"),
    ]
    assert applied.child.private_bytes == 1 << 30


@pytest.mark.parametrize("delegated", [True, False])
def test_cgroup_v2_is_used_where_it_is_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delegated: bool
) -> None:
    """With controllers enabled beside the agent's own cgroup, an engine gets a sibling with both limits."""
    unit = tmp_path / "system.slice" / "slmops.service"
    (unit / "agent").mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    (unit / "cgroup.subtree_control").write_text("cpu memory" if delegated else "")
    if not delegated:
        (unit / "cgroup.subtree_control").unlink()
        (unit / "cgroup.subtree_control").mkdir()  # not writable, as the kernel's EBUSY
    monkeypatch.setattr(limits, "_MOUNT", tmp_path)
    monkeypatch.setattr(limits, "_own_cgroups", lambda: ["0::/system.slice/slmops.service/agent"])
    applied = limits.prepare(EngineLimits(memory_bytes=123 << 20, cpu_cores=1.5))
    mechanisms = {one.limit: one.mechanism for one in applied.reports}
    if not delegated:
        assert mechanisms == {"memory_bytes": "rlimit", "cpu_cores": "none"}
        return
    assert mechanisms == {"memory_bytes": "cgroup2", "cpu_cores": "cgroup2"}
    assert all(folder.parent == unit for folder in applied.folders)
    written = {path.name: path.read_text() for folder in applied.folders for path in folder.iterdir()}
    assert written["memory.max"] == str(123 << 20)
    assert written["cpu.max"] == "150000 100000"


def test_cgroups_of_killed_agents_are_swept(tmp_path: Path) -> None:
    """A folder whose owner is gone is removed at the next start; one whose owner lives stays."""
    gone, mine = tmp_path / "slmops-engine-999999999-0", tmp_path / "slmops-engine-1-0"
    gone.mkdir()
    mine.mkdir()
    limits._sweep(tmp_path)
    assert not gone.exists()
    assert mine.exists()


@pytest.mark.parametrize("with_cgroups", [True, False])
def test_too_little_memory_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_cgroups: bool
) -> None:
    """An engine that does not fit in its limit ends as NoMemoryError, whichever way it was limited."""
    if not with_cgroups:
        monkeypatch.setattr(limits, "_own_cgroups", lambda: [])
    model = make_tiny_gguf(tmp_path / "tiny.gguf")

    async def main() -> None:
        # a context of this size needs a KV cache far beyond the limit
        spec = EngineSpec("llama.cpp", model, context_tokens=1 << 21, slots=4)
        with pytest.raises(NoMemoryError):
            async with open_engine(spec, limits=EngineLimits(memory_bytes=96 << 20)):
                pass

    asyncio.run(main())
    for folder in Path("/sys/fs/cgroup").rglob("slmops-engine-*"):
        assert folder.name.split("-")[2] != str(os.getpid())
