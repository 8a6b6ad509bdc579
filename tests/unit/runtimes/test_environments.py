"""A runtime in an environment of its own."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from slmops.core.errors import VersionMismatchError
from slmops.runtimes.environments import VARIABLE, find


def environment(folder: Path, **versions: str) -> Path:
    """An environment as ``python -m venv`` and pip leave it, as far as it is looked at."""
    packages = folder / "lib" / "python3.11" / "site-packages"
    for name, version in versions.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def test_what_is_installed_here_runs_here() -> None:
    place = find("llama.cpp", ("xllamacpp", "httpx"))
    assert (place.python, place.version) == (sys.executable, metadata.version("xllamacpp"))


def test_what_is_not_is_looked_for_in_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = metadata.version("slmops")
    made = environment(tmp_path / "b" / "engine-x", engine_x="7.1", slmops=ours)
    environment(tmp_path / "b" / "engine-y", engine_y="1.0", slmops="0.0.1")
    environment(tmp_path / "a" / "engine-x", slmops=ours)  # without the binding: looked further
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert find("engine-x", ("engine_x",)).python == str(made / "bin" / "python")
    assert find("engine-x", ("engine_x",)).version == "7.1"
    with pytest.raises(metadata.PackageNotFoundError, match="engine_x"):
        find("engine-x", ("engine_x", "engine_z"))
    with pytest.raises(VersionMismatchError, match=r"slmops 0\.0\.1"):
        find("engine-y", ("engine_y",))
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(metadata.PackageNotFoundError, match="engine_x"):
        find("engine-x", ("engine_x",))
