"""A device of the local fleet in a container: the same agent, with the limits of its profile enforced by the container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slmops.core.errors import NotFoundError

ENGINE = "podman"
#: the device's folder inside the container
FOLDER = "/var/lib/slmops"


def require(image: str) -> None:
    """See that there is an engine, and the image.

    Raises:
        NotFoundError: not so; says how to get it.
    """
    if shutil.which(ENGINE) is None:
        raise NotFoundError(f"{ENGINE} is not installed", hint=f"apt install {ENGINE}; or leave --image away")
    found = subprocess.run([ENGINE, "image", "exists", image], check=False, capture_output=True)
    if found.returncode:
        raise NotFoundError(
            f"there is no image {image!r} here", hint="build it: deploy/containers/build.sh llama-cpp"
        )


def run_command(
    name: str, folder: Path, image: str, arguments: Sequence[str], *, ram_bytes: int, cpu_cores: float | None
) -> list[str]:
    """The command line that runs ``slmops ARGUMENTS`` in a container, attached.

    The network is the host's: control plane and gateway stay on loopback.

    Args:
        name: of the container.
        folder: the device's, mounted as :data:`FOLDER`.
        image: with slmops as its entry point.
        arguments: of slmops.
        ram_bytes: memory limit; swap is not allowed.
        cpu_cores: CPU limit; None for none.
    """
    cores = [] if cpu_cores is None else ["--cpus", f"{cpu_cores:g}"]
    return [
        ENGINE,
        "run",
        "--rm",
        "--replace",
        "--name",
        name,
        "--network",
        "host",
        "--memory",
        str(ram_bytes),
        "--memory-swap",
        str(ram_bytes),
        *cores,
        "--user",
        f"{os.getuid()}:{os.getgid()}",
        "--volume",
        f"{folder}:{FOLDER}",
        "--env",
        "SLMOPS_ENROLL_TOKEN",
        image,
        *arguments,
    ]


def remove(name: str) -> None:
    """Remove a container, running or not; safe when there is none."""
    subprocess.run([ENGINE, "rm", "--force", "--time", "5", name], check=False, capture_output=True)
