"""What an agent process imports stays light, and names lead to runtimes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slmops.core.errors import NotFoundError, RuntimeLoadError
from slmops.runtimes import load, names
from slmops.runtimes.llama_cpp import adapter

PROGRAM = """
import sys
from slmops.runtimes import load
import slmops.runtimes.bench
load("llama.cpp")
heavy = {"numpy", "xllamacpp", "gguf", "pydantic", "yaml", "torch"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_agent_side_loads_no_binding_and_no_numpy() -> None:
    """Loading the llama.cpp runtime imports neither numpy nor xllamacpp."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_an_entry_point_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime of somebody else's is found by its entry point, and listed."""
    folder = tmp_path / "other_runtime-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-runtime\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[slmops.runtimes]\nother = slmops.testing.engine:FakeRuntime\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "other" in names()
    assert load("other").formats == frozenset({"slmops-fake"})


def test_a_missing_binding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint of a known runtime without its wheel is the pip command."""
    monkeypatch.setattr(adapter, "DISTRIBUTION", "slmops-no-such-binding")
    with pytest.raises(RuntimeLoadError) as caught:
        load("llama.cpp")
    assert caught.value.hint == 'pip install "slmops[llama-cpp]"'


def test_names_without_a_runtime_are_not_found() -> None:
    """An unknown name lists what is known."""
    with pytest.raises(NotFoundError, match=r"known are .*llama\.cpp"):
        load("tensor-engine")


@pytest.mark.parametrize(
    ("name", "why"), [("pytorch-mobile", "successor is executorch"), ("openvino", "not built here")]
)
def test_what_is_known_and_not_served_is_refused_by_name_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(NotFoundError, match=why) as raised:
        load(name)
    assert f"no engine serves runtime '{name}'" in raised.value.message
