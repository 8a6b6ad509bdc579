"""Where a runtime's binding is installed: here, or in a Python environment of its own.

Bindings do not all go together: one needs torch, another pins a numpy that a third refuses. An engine is a child process
anyway, so it may run in another environment than its parent: ``SLMOPS_RUNTIMES`` names a folder (or several, with ``:``
between them) that holds such environments by runtime name, each with slmops of the same version and the runtime's extra::

    python -m venv /opt/slmops/runtimes/executorch
    /opt/slmops/runtimes/executorch/bin/pip install "slmops[executorch]"
    SLMOPS_RUNTIMES=/opt/slmops/runtimes slmops agent run
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from slmops.core.errors import VersionMismatchError

VARIABLE = "SLMOPS_RUNTIMES"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a runtime's child runs.

    Attributes:
        python: interpreter of the environment; ``version``: of the binding there.
    """

    python: str
    version: str


def find(runtime: str, distributions: Sequence[str]) -> Place:
    """The environment that has everything that a runtime's child needs: this one, if it has, else one of its own.

    Args:
        runtime: its name.
        distributions: packages that must be there; the first one is the binding.

    Raises:
        importlib.metadata.PackageNotFoundError: neither has them; names the first that is missing here.
        VersionMismatchError: the runtime's own environment has another slmops.
    """
    try:
        return Place(sys.executable, _version_of_all(distributions, None))
    except metadata.PackageNotFoundError:
        for folder in os.environ.get(VARIABLE, "").split(os.pathsep):
            environment = Path(folder) / runtime
            python = environment / "bin" / "python"
            if not folder or not python.exists():
                continue
            packages = [str(path) for path in environment.glob("lib/python3.*/site-packages")]
            try:
                version = _version_of_all(distributions, packages)
                other = _version_of_all(["slmops"], packages)
            except metadata.PackageNotFoundError:
                continue
            if other != metadata.version("slmops"):
                raise VersionMismatchError(
                    f"{environment} has slmops {other}, this is {metadata.version('slmops')}",
                    hint=f"update it: {python} -m pip install --upgrade slmops",
                ) from None
            return Place(str(python), version)
        raise


def _version_of_all(distributions: Sequence[str], packages: list[str] | None) -> str:
    """Version of the first of them, all being there."""
    first, *_ = [_version(name, packages) for name in distributions]
    return first


def _version(name: str, packages: list[str] | None) -> str:
    if packages is None:
        return metadata.version(name)
    for found in metadata.distributions(name=name, path=packages):
        return found.version
    raise metadata.PackageNotFoundError(name)
