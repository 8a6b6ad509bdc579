"""Limits for an engine's process: cgroup v2 or v1 where we may write them, else rlimits, and which it was.

Runs in the parent. A cgroup is a folder made below the parent's own; `AppliedLimits.remove` removes it.

On v2 the parent's cgroup must be delegated. systemd unit: `Delegate=memory cpu` and `DelegateSubgroup=agent`;
then the parent's own cgroup is called "agent", and engines get siblings of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from slmops.runtimes.child import ChildLimits
from slmops.runtimes.ports import AppliedLimit, EngineLimits

_MOUNT = Path("/sys/fs/cgroup")
_PREFIX = "slmops-engine"
_PERIOD_US = 100_000
_DELEGATED_NAME = "agent"
_counter = itertools.count()


@dataclass
class AppliedLimits:
    """Limits that are in force, or will be when the child has settled."""

    child: ChildLimits
    reports: tuple[AppliedLimit, ...]
    folders: tuple[Path, ...] = field(default=())

    def oom_kills(self) -> int:
        """Times that the kernel killed something in the memory cgroup."""
        total = 0
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError, ValueError):
                    lines = (folder / name).read_text(encoding="ascii").splitlines()
                    counts = dict(line.split(maxsplit=1) for line in lines)
                    total += int(counts.get("oom_kill", "0"))
        return total

    def remove(self) -> None:
        """Remove the cgroups; the child must be gone."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.folders = ()


def prepare(limits: EngineLimits | None) -> AppliedLimits:
    """Make cgroups for what can be enforced by them, and settle the rest."""
    asked = limits or EngineLimits()
    reports: list[AppliedLimit] = []
    folders: list[Path] = []
    private_bytes: int | None = None
    if asked.memory_bytes is not None:
        folder, version = _cgroup("memory")
        if folder and _write_memory(folder, version, asked.memory_bytes):
            folders.append(folder)
            reports.append(
                AppliedLimit("memory_bytes", f"cgroup{version}", "private memory and mapped model pages")
            )
        else:
            _discard(folder)
            private_bytes = asked.memory_bytes
            note = (
                "private memory only: mapped model pages are not counted, and the kernel can take those back"
            )
            reports.append(AppliedLimit("memory_bytes", "rlimit", note))
    if asked.cpu_cores is not None:
        folder, version = _cgroup("cpu")
        if folder and _write_cpu(folder, version, asked.cpu_cores):
            folders.append(folder)
            reports.append(
                AppliedLimit("cpu_cores", f"cgroup{version}", f"{asked.cpu_cores} cores per 100 ms")
            )
        else:
            _discard(folder)
            reports.append(AppliedLimit("cpu_cores", "none", "no writable cpu cgroup: not enforced"))
    if asked.nice:
        reports.append(AppliedLimit("nice", "nice", f"niceness +{asked.nice}"))
    unique = tuple(dict.fromkeys(folders))
    child = ChildLimits(tuple(str(folder / "cgroup.procs") for folder in unique), private_bytes, asked.nice)
    return AppliedLimits(child, tuple(reports), unique)


def _cgroup(controller: str) -> tuple[Path | None, int]:
    """Make a cgroup for the child under `controller`: (folder or None, cgroup version)."""
    for line in _own_cgroups():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _make(_v1_mount(controllers) / path.lstrip("/")), 1
        if number == "0" and not controllers and (_MOUNT / "cgroup.controllers").exists():
            own = _MOUNT / path.lstrip("/")
            base = own.parent if own.name == _DELEGATED_NAME else own
            return (_make(base) if _enabled(base, controller) else None), 2
    return None, 0


def _own_cgroups() -> list[str]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted(lines, key=lambda line: line.startswith("0:"))  # v1 controllers first on a hybrid system


def _v1_mount(controllers: str) -> Path:
    joint = _MOUNT / controllers
    return joint if joint.is_dir() else _MOUNT / controllers.split(",", maxsplit=1)[0]


def _enabled(base: Path, controller: str) -> bool:
    control = base / "cgroup.subtree_control"
    with contextlib.suppress(OSError):
        if controller in control.read_text(encoding="ascii").split():
            return True
        control.write_text(
            f"+{controller}", encoding="ascii"
        )  # fails with EBUSY where processes live in `base`
        return True
    return False


def _make(base: Path) -> Path | None:
    _sweep(base)
    folder = base / f"{_PREFIX}-{os.getpid()}-{next(_counter)}"
    try:
        folder.mkdir()
    except OSError:
        return None
    return folder


def _sweep(base: Path) -> None:
    """Remove cgroups of engines whose parent was killed."""
    with contextlib.suppress(OSError):
        for folder in base.glob(f"{_PREFIX}-*"):
            owner = folder.name.split("-")[2]
            if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _discard(folder: Path | None) -> None:
    if folder:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _write_memory(folder: Path, version: int, limit_bytes: int) -> bool:
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    swap = ("memory.swap.max", "0") if version == 2 else ("memory.memsw.limit_in_bytes", str(limit_bytes))
    try:
        (folder / name).write_text(str(limit_bytes), encoding="ascii")
    except OSError:
        return False
    with contextlib.suppress(OSError):  # absent without swap accounting
        (folder / swap[0]).write_text(swap[1], encoding="ascii")
    return True


def _write_cpu(folder: Path, version: int, cores: float) -> bool:
    quota_us = max(1000, round(cores * _PERIOD_US))
    try:
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}", encoding="ascii")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="ascii")
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us), encoding="ascii")
    except OSError:
        return False
    return True
