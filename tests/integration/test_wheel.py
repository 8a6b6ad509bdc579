"""What a built wheel carries: an installed slmops makes the same toolchains as a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slmops.build.export.toolchain import names, toolchain

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, slmops
from slmops.build.export.toolchain import names, toolchain
print(json.dumps({"from": slmops.__file__, "digests": {name: toolchain(name).digest for name in names()}}))
"""


def test_an_installed_wheel_knows_every_toolchain_by_the_same_digest(tmp_path: Path) -> None:
    """Equal digests are equal environments: what was made from a checkout serves an installation, and the other way round."""
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(wheel, capture_output=True, text=True, check=False)
    if built.returncode and any(sign in built.stderr for sign in ("No matching distribution", "Connection")):
        pytest.skip("the build backend could not be fetched")
    assert not built.returncode, built.stderr
    (path,) = tmp_path.glob("slmops-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(installed)
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(said.stdout)
    assert found["from"].startswith(str(installed))
    assert found["digests"] == {name: toolchain(name).digest for name in names()}
    assert len(found["digests"]) >= 3
