"""The cache believes nothing that it has not checked, and never holds a failure or half of a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from slmops.build.cache import Cache, StepResult
from slmops.core.errors import UsageError


def keep(cache: Cache, key: str, content: bytes, value: Any = None) -> StepResult:
    work = cache.work_folder()
    (work / "out.bin").write_bytes(content)
    (work / ".scratch").write_bytes(b"not kept")
    return cache.keep(key, work, value, run="m:f", params={}, inputs={}, tools={}, seconds=1.0)


def test_a_result_is_found_again_with_its_files(tmp_path: Path) -> None:
    """Value and files come back; scratch files do not; the stored file is read-only."""
    cache = Cache(tmp_path / "c")
    kept = keep(cache, "k1", b"weights", {"n": 1})
    found = Cache(tmp_path / "c").find("k1")
    assert found == kept
    assert list(kept.files) == ["out.bin"]
    path = cache.path(kept.files["out.bin"].sha256)
    assert path.read_bytes() == b"weights"
    assert path.stat().st_mode & 0o222 == 0


def test_unknown_keys_and_damaged_records_are_misses(tmp_path: Path) -> None:
    """A record that cannot be read, or that was renamed, is no result."""
    cache = Cache(tmp_path)
    keep(cache, "k1", b"x")
    assert cache.find("k2") is None
    (tmp_path / "steps" / "k2.json").write_bytes((tmp_path / "steps" / "k1.json").read_bytes())
    assert cache.find("k2") is None
    (tmp_path / "steps" / "k1.json").write_text('{"key": "k1"')
    assert cache.find("k1") is None


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "gone"])
def test_a_file_that_was_changed_is_made_again(tmp_path: Path, damage: str) -> None:
    """Changed bytes in a cached file make the step a miss, not a wrong result."""
    cache = Cache(tmp_path)
    path = cache.path(keep(cache, "k1", b"weights").files["out.bin"].sha256)
    path.chmod(0o644)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"WEIGHTS" if damage == "other bytes" else b"w")
        os.utime(path, ns=(1, 1))
    assert cache.find("k1") is None


def test_a_touched_but_equal_file_is_still_good(tmp_path: Path) -> None:
    """A copy of the cache (new times, same bytes) keeps its worth."""
    cache = Cache(tmp_path)
    kept = keep(cache, "k1", b"weights")
    os.utime(cache.path(kept.files["out.bin"].sha256), ns=(1, 1))
    assert cache.find("k1") == kept


def test_equal_files_of_two_steps_are_stored_once(tmp_path: Path) -> None:
    """Content decides the place."""
    cache = Cache(tmp_path)
    first, second = keep(cache, "k1", b"same"), keep(cache, "k2", b"same")
    assert first.files == second.files
    assert len([path for path in (tmp_path / "objects").rglob("*") if path.is_file()]) == 1


def test_sweep_removes_folders_of_dead_steps_only(tmp_path: Path) -> None:
    """A killed step's folder goes; one whose process lives stays."""
    cache = Cache(tmp_path)
    alive = cache.work_folder()
    child = os.fork()
    if child == 0:
        (cache.work_folder() / "half-written").touch()
        os._exit(0)
    os.waitpid(child, 0)
    (dead,) = (folder for folder in (tmp_path / "work").iterdir() if folder != alive)
    cache.sweep()
    assert not dead.exists()
    assert alive.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The error says which folder, and how to choose another."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="SLMOPS_CACHE"):
        Cache(tmp_path / "file" / "cache")


def test_the_environment_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$SLMOPS_CACHE, else .slmops-cache in the current folder."""
    monkeypatch.setenv("SLMOPS_CACHE", str(tmp_path / "a"))
    assert Cache().folder == tmp_path / "a"
    monkeypatch.delenv("SLMOPS_CACHE")
    monkeypatch.chdir(tmp_path)
    assert Cache().folder == tmp_path / ".slmops-cache"
