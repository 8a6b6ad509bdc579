"""What works on this machine, and what it can hold: for ``slmops doctor``. Reads, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from slmops.build.export.toolchain import READY, names, toolchain
from slmops.core.errors import SlmopsError
from slmops.runtimes import registry

_GPU_SIGNS = ("/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128")


def machine_facts(cache: Path) -> dict[str, Any]:
    """Cores, memory, disk, runtimes, toolchains and torch, as plain JSON values.

    Args:
        cache: the step cache's folder, whose disk counts and where toolchains are made; it need not exist.
    """
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "ram_available_bytes": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cache": str(cache),
        "disk_free_bytes": shutil.disk_usage(place).free,
        "gpu": next((sign for sign in _GPU_SIGNS if Path(sign).exists()), None),
        "torch": _version("torch"),
        "runtimes": [_runtime(name) for name in registry.names()],
        "toolchains": [_toolchain(name, cache) for name in names()],
    }


def _runtime(name: str) -> dict[str, Any]:
    try:
        return {"name": name, "version": registry.load(name).version(), "missing": None}
    except SlmopsError as error:
        return {"name": name, "version": None, "missing": error.hint}


def _toolchain(name: str, cache: Path) -> dict[str, Any]:
    wanted = toolchain(name)
    made = wanted.is_made(cache)
    size = wanted.installed_bytes
    if made:
        size = int(json.loads((wanted.folder(cache) / READY).read_text(encoding="utf-8"))["bytes"])
    return {
        "name": name,
        "purpose": wanted.purpose,
        "made": made,
        "bytes": size,
        "python": wanted.python,
        "python_found": platform.python_version().startswith(wanted.python + ".")
        or shutil.which(f"python{wanted.python}") is not None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
