"""Devices in containers: the image of deploy/containers enrols, fetches, serves, within limits that podman enforces.

Skipped where there is no podman or no image; ``make test-containers`` builds the images first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.integration.test_lab import project, slmops  # noqa: F401 - a fixture

IMAGE = "localhost/slmops-agent-llama-cpp"
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def podman(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *arguments], check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    if podman("image", "exists", IMAGE).returncode:
        pytest.skip(f"no image {IMAGE}: make test-containers builds it")


def test_an_agent_in_a_container_serves_within_its_limits(project: Path) -> None:  # noqa: F811
    done = slmops(
        project,
        "lab", "run", "build/tiny", "--profile", "pi5-8gb", "--image", IMAGE, "--out", "container.json", "--json",
        "--keep", "kept-by-this-test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert (device["outcome"], device["failed"]) == ("committed", 0)
    assert device["asked"] > 0
    assert IMAGE in device["limits"]["container"]
    left = podman("ps", "--all", "--format", "{{.Names}}").stdout
    assert "kept-by-this-test" not in left  # other tests may have containers of their own now


def test_the_memory_limit_is_the_kernels() -> None:
    """What takes more than the limit is killed, whatever it is."""
    take = "x = bytearray(200 << 20); print(len(x))"
    shell = ("--rm", "--entrypoint", "/opt/slmops/bin/python")
    assert podman("run", *shell, "--memory", "400m", IMAGE, "-c", take).returncode == 0
    assert (
        podman("run", *shell, "--memory", "64m", "--memory-swap", "64m", IMAGE, "-c", take).returncode == 137
    )


def test_the_container_runs_as_nobody_and_holds_no_build_tools() -> None:
    assert podman("run", "--rm", "--entrypoint", "id", IMAGE, "-u").stdout.strip() == "65532"
    shown = podman("run", "--rm", IMAGE, "--version")
    assert shown.returncode == 0
    assert "slmops" in shown.stdout


def test_a_missing_image_is_named_before_anything_starts(project: Path) -> None:  # noqa: F811
    done = slmops(project, "lab", "run", "build/tiny", "--image", "localhost/no-such-image")
    assert done.returncode == 2
    assert "deploy/containers/build.sh" in done.stderr
