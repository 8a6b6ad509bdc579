"""Formats: the closed list, its refusals, and the toolchains that it names."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from slmops.build.export.exported import digest_of_files
from slmops.build.export.formats import FORMATS, REFUSED, format_of, refuse_options
from slmops.build.export.tool_process import SHARED, TOOLS, digest_of_tool
from slmops.build.export.toolchain import Toolchain, ensure, names, toolchain
from slmops.core.errors import (
    BuildError,
    DocumentError,
    NetworkError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.runtime}-{form.precision}")
def test_every_format_has_its_tool_and_its_toolchain(form) -> None:
    assert (TOOLS / f"{form.tool}.py").is_file()
    made = toolchain(form.toolchain)
    assert made.versions["torch"] == "2.13.0"
    assert format_of(form.runtime, form.precision) is form


@pytest.mark.parametrize(("runtime", "precision"), REFUSED)
def test_formats_known_to_be_bad_are_refused_with_the_reason(runtime: str, precision: str) -> None:
    with pytest.raises(DocumentError) as raised:
        format_of(runtime, precision)
    if any(form.runtime == runtime for form in FORMATS):
        assert REFUSED[runtime, precision] in raised.value.message


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(DocumentError) as raised:
        format_of("onnxruntime-genai", "int3")
    assert "fp32, int8, int4" in raised.value.hint


def test_options_that_give_files_that_do_not_load_are_refused() -> None:
    with pytest.raises(DocumentError, match="exclude_embeds"):
        refuse_options("onnxruntime-genai", {"exclude_embeds": "true"})
    refuse_options("onnxruntime-genai", {"block_size": "64"})
    with pytest.raises(DocumentError, match="takes no options, got cache_length"):
        refuse_options("litert", {"cache_length": "64"})


def test_a_script_depends_on_what_it_imports() -> None:
    """Every module that a script imports from beside itself is in its digest, so in the key of what it makes."""
    beside = {path.stem for path in TOOLS.glob("*.py")}
    for form in FORMATS:
        tree = ast.parse((TOOLS / f"{form.tool}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported & beside <= {*SHARED}
    assert len({digest_of_tool(form.tool) for form in FORMATS}) == len({form.tool for form in FORMATS})


def test_locks_are_exact() -> None:
    """Every line of a lock is one exact pin, and none pulls CUDA in."""
    assert names() == ["executorch", "litert", "onnxruntime-genai"]
    for name in names():
        made = toolchain(name)
        assert all(made.versions.values())
        assert not [pin for pin in made.versions if pin.startswith(("nvidia", "triton"))]


def test_an_unknown_toolchain_names_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="none-such"):
        toolchain("none-such")


def a_toolchain(folder: Path, lock: str, *, installed_bytes: int = 1, python: str | None = None) -> Toolchain:
    folder.mkdir(exist_ok=True)
    (folder / "lock.txt").write_text(lock)
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = dict(line.split("==") for line in lock.split())
    return Toolchain("made", folder, "0" * 64, version, installed_bytes, "a test", pins)


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="needs about"):
        ensure(a_toolchain(tmp_path / "t", "", installed_bytes=1 << 60), tmp_path)


def test_a_missing_interpreter_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        ensure(a_toolchain(tmp_path / "t", "", python="2.9"), tmp_path)
    assert "install python2.9" in raised.value.hint


def test_an_environment_is_made_once_and_whole(tmp_path: Path) -> None:
    """An empty lock needs no network: the real maker runs, its own files are laid in, and a second call makes nothing."""
    wanted = a_toolchain(tmp_path / "t", "")
    (tmp_path / "t" / "site" / "laid").mkdir(parents=True)
    (tmp_path / "t" / "site" / "laid" / "__init__.py").write_text("HERE = True\n")
    python = ensure(wanted, tmp_path)
    assert python.is_file() and wanted.is_made(tmp_path)
    assert list(tmp_path.glob("toolchains/*/lib/python*/site-packages/laid/__init__.py"))
    before = (wanted.folder(tmp_path) / "ready.json").stat().st_mtime_ns
    assert ensure(wanted, tmp_path) == python
    assert (wanted.folder(tmp_path) / "ready.json").stat().st_mtime_ns == before


def test_a_package_that_cannot_be_fetched_leaves_nothing(tmp_path: Path) -> None:
    wanted = a_toolchain(tmp_path / "t", "no-such-distribution==1.0")
    with pytest.raises((NetworkError, BuildError)) as raised:
        ensure(wanted, tmp_path, index_arguments=("--no-index",))
    assert raised.value.code == "transient.network"
    assert [path.name for path in (tmp_path / "toolchains").iterdir() if path.is_dir()] == []


def test_one_digest_for_several_files() -> None:
    one = digest_of_files({"a": "1", "b": "2"})
    assert one == digest_of_files({"b": "2", "a": "1"}) != digest_of_files({"a": "2", "b": "1"})
