"""Pinned environments for exporters: made on demand into the cache, whole or not at all, found again by their lock's digest.

    toolchains/<name>/lock.txt         exact pins of everything; installed without looking at dependencies
    toolchains/<name>/toolchain.json   python version, size when installed, what it is for
    toolchains/<name>/site/            files that are laid beside the installed ones (a module that upstream forgot to require)
    <cache>/toolchains/<name>-<digest> the environment; ``ready.json`` in it is written last

Why no resolving: a plain ``pip install torch`` pulls gigabytes of CUDA in. A complete lock with ``--no-deps`` gives the
CPU part alone, and the same part next year.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slmops
from slmops.build.cache import Cache
from slmops.core.errors import BuildError, NetworkError, NoSpaceError, NotFoundError, UsageError

LOCK, FACTS, SITE, READY = "lock.txt", "toolchain.json", "site", "ready.json"
#: raise it when environments must be made in another way: it is part of their names
_MAKER = 1
_INSTALL_LIMIT_S = 3600
_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Toolchain:
    """One pinned environment.

    Attributes:
        name: its folder under ``toolchains/``.
        source: that folder; ``digest``: of everything in it.
        python: ``3.11``; ``installed_bytes``: about what it takes on the disk; ``purpose``: in words.
        versions: of its distributions, by name.
    """

    name: str
    source: Path
    digest: str
    python: str
    installed_bytes: int
    purpose: str
    versions: dict[str, str]

    def folder(self, cache: Path) -> Path:
        """Where the environment lies, or would."""
        return cache / "toolchains" / f"{self.name}-{self.digest[:12]}"

    def interpreter(self, cache: Path) -> Path:
        """Its python."""
        return self.folder(cache) / "bin" / "python"

    def is_made(self, cache: Path) -> bool:
        """Whether the environment is there, whole."""
        return (self.folder(cache) / READY).is_file()


def names() -> list[str]:
    """Every toolchain that this installation knows."""
    root = _root()
    return sorted(path.parent.name for path in root.glob(f"*/{LOCK}")) if root.is_dir() else []


def toolchain(name: str) -> Toolchain:
    """A toolchain by name.

    Raises:
        NotFoundError: there is none of this name.
    """
    source = _root() / name
    if not (source / LOCK).is_file():
        raise NotFoundError(
            f"toolchain {name!r} is not known: {source / LOCK} does not exist",
            hint=f"known are {', '.join(names()) or 'none: use a checkout of slmops, or a complete wheel'}",
        )
    facts: dict[str, Any] = json.loads((source / FACTS).read_text(encoding="utf-8"))
    digest = hashlib.sha256(f"{_MAKER}\0{sys.platform}\0{os.uname().machine}\0".encode())
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".md"):
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(source)).encode() + b"\0" + path.read_bytes() + b"\0")
    pins = (line.partition("==") for line in _pins(source))
    return Toolchain(
        name,
        source,
        digest.hexdigest(),
        facts["python"],
        int(facts["installed_bytes"]),
        facts["purpose"],
        {pin: version for pin, _, version in pins},
    )


def ensure(
    wanted: Toolchain,
    cache: Path,
    progress: Callable[[str], None] = lambda note: None,
    *,
    index_arguments: tuple[str, ...] = (),
) -> Path:
    """Make an environment unless it is there, and give its interpreter.

    Args:
        wanted: the toolchain.
        cache: the step cache's folder.
        progress: told what is being done.
        index_arguments: passed on to pip.

    Raises:
        UsageError: no interpreter of the version that it needs.
        NoSpaceError: not enough disk for it.
        NetworkError: pip could not fetch something; BuildError: pip failed otherwise.
    """
    target = wanted.folder(cache)
    if wanted.is_made(cache):
        return wanted.interpreter(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target.parent / f".{target.name}.lock"):
        if wanted.is_made(cache):  # another build made it meanwhile
            return wanted.interpreter(cache)
        free = shutil.disk_usage(target.parent).free
        if free < wanted.installed_bytes * 3 // 2:
            raise NoSpaceError(
                f"toolchain {wanted.name} needs about {wanted.installed_bytes >> 20} MB in {target.parent} "
                f"(half as much again while it is made), {free >> 20} MB are free",
                hint="free some space, or point --cache (SLMOPS_CACHE) to another disk",
                path=str(target.parent),
                free_bytes=free,
            )
        python = _python(wanted)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _make(wanted, python, made, progress, index_arguments)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(target)  # a half-removed one
            os.replace(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return wanted.interpreter(cache)


def _make(
    wanted: Toolchain,
    python: str,
    folder: Path,
    progress: Callable[[str], None],
    index_arguments: tuple[str, ...],
) -> None:
    progress(f"toolchain {wanted.name}: making the environment")
    _run([python, "-m", "venv", str(folder)], wanted, "making the environment")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["--disable-pip-version-check", "--no-input", *index_arguments]
    torch = [pin for pin in _pins(wanted.source) if pin.startswith("torch==")]
    if torch:
        progress(f"toolchain {wanted.name}: installing {torch[0]}")
        _run([*pip, *torch], wanted, f"installing {torch[0]}")
    progress(f"toolchain {wanted.name}: installing {len(wanted.versions)} distributions")
    _run([*pip, "--requirement", str(wanted.source / LOCK)], wanted, "installing its lock")
    site = wanted.source / SITE
    if site.is_dir():
        (packages,) = (folder / "lib").glob("python*/site-packages")
        shutil.copytree(site, packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    ready = {"name": wanted.name, "digest": wanted.digest, "bytes": _size(folder)}
    (folder / READY).write_text(json.dumps(ready) + "\n", encoding="utf-8")


def _run(command: list[str], wanted: Toolchain, what: str) -> None:
    with tempfile.TemporaryFile() as log:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=_INSTALL_LIMIT_S,
            )
            return
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            tail = log.read().decode("utf-8", "replace").strip()
            cause: Exception = error
    last = tail.splitlines()[-1] if tail else str(cause)
    if "No space left" in tail:
        raise NoSpaceError(
            f"toolchain {wanted.name}: {what}: the disk is full: {last}",
            hint="free some space, or point --cache (SLMOPS_CACHE) and TMPDIR to another disk",
        ) from cause
    if any(sign in tail for sign in _NETWORK_SIGNS):
        raise NetworkError(
            f"toolchain {wanted.name}: {what}: a package could not be fetched: {last}",
            hint="connect to a package index (pip's own settings and PIP_INDEX_URL are honoured) and build again: "
            "what is done is cached",
        ) from cause
    raise BuildError(
        f"toolchain {wanted.name}: {what} failed: {last}",
        hint=f"see toolchains/{wanted.name}/README.md; the pins are in its {LOCK}",
        log=tail,
    ) from cause


_NETWORK_SIGNS = (
    "NewConnectionError",
    "Could not find a version",
    "ConnectTimeout",
    "ReadTimeout",
    "Connection refused",
    "Temporary failure in name resolution",
    "Max retries exceeded",
)


def _python(wanted: Toolchain) -> str:
    """An interpreter of the toolchain's version: this one, or the one of that name on PATH."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == wanted.python:
        return getattr(sys, "_base_executable", sys.executable)
    found = shutil.which(f"python{wanted.python}")
    if found is None:
        raise UsageError(
            f"toolchain {wanted.name} needs Python {wanted.python}, which is not on PATH",
            hint=f"install python{wanted.python}, or run slmops with it",
        )
    return found


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with path.open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pins(source: Path) -> list[str]:
    lines = (
        line.partition("#")[0].strip() for line in (source / LOCK).read_text(encoding="utf-8").splitlines()
    )
    return [line for line in lines if line]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _root() -> Path:
    """``toolchains/``: inside the installed wheel, else in the checkout."""
    inside = Path(slmops.__file__).parent / "toolchains"
    return inside if inside.is_dir() else Path(slmops.__file__).parents[2] / "toolchains"


def cache_folder(folder: Path | None = None) -> Path:
    """The folder that toolchains are made in: the step cache's."""
    return Cache(folder).folder
