"""The main job, end to end, as a new user runs it: ``slmops demo --fast --out FILE``."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
DEADLINE_S = 1500


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "the-demo"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def demo(work: Path) -> tuple[dict[str, Any], str]:
    """One run; its summary and what it printed. The worker that comes first runs it, the others wait for it."""
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = work / "ended.json"
        if not ended.exists():
            command = [
                *(sys.executable, "-m", "slmops.cli.main", "demo", "--fast"),
                *("--out", str(work / "summary.json"), "--work", str(work / "demo")),
            ]
            done = subprocess.run(
                command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=DEADLINE_S
            )
            ended.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
    code, printed, errors = json.loads(ended.read_text(encoding="utf-8"))
    assert code == 0, f"{printed[-6000:]}\n{errors[-6000:]}"
    return json.loads((work / "summary.json").read_text(encoding="utf-8")), printed


def test_three_variants_for_three_profiles_are_measured(demo: tuple[dict[str, Any], str]) -> None:
    variants = demo[0]["variants"]
    assert [v["profile"] for v in variants] == ["pi-zero2-512mb", "pi5-8gb", "n100-16gb"]
    for variant in variants:
        assert variant["artifact_bytes"] > 10_000_000
        assert 1 < variant["bits_per_weight"] < 17
        assert 0 <= variant["kld_mean"] < 1
        assert 0.5 < variant["same_top_ratio"] <= 1
        assert variant["decode_tps"] > 0
        assert variant["rss_bytes"] > variant["artifact_bytes"]
    assert len({v["artifact_bytes"] for v in variants}) == 3


def test_the_good_release_reaches_all_and_the_bad_one_stops_at_the_canary(
    demo: tuple[dict[str, Any], str],
) -> None:
    good, bad = demo[0]["rollouts"]
    assert (good["outcome"], good["committed"], good["untouched"]) == ("completed", 6, 0)
    assert (bad["outcome"], bad["committed"], bad["reverted"], bad["untouched"]) == ("rolled_back", 0, 1, 5)
    assert "golden" in bad["reason"]


def test_no_request_failed(demo: tuple[dict[str, Any], str]) -> None:
    requests = demo[0]["requests"]
    assert requests["failed"] == 0
    assert requests["served"] > 20
    assert all("@1.0.0+" in release for release in requests["releases"])


def test_every_device_runs_the_good_release(demo: tuple[dict[str, Any], str]) -> None:
    devices = demo[0]["devices"]
    assert len(devices) == 6
    assert all(device["release"].endswith("1.0.0") for device in devices)
    assert {device["state"] for device in devices} == {"committed", "reverted"}


def test_bytes_and_time_are_told(demo: tuple[dict[str, Any], str]) -> None:
    assert demo[0]["moved_bytes"] > 6 * 50_000_000
    assert demo[0]["seconds"] > 0
    assert "nothing to do" in demo[1]


def test_it_says_how_memory_and_cpu_are_limited_here(demo: tuple[dict[str, Any], str]) -> None:
    assert "limit: memory_bytes by " in demo[1]
    assert "limit: cpu_cores by " in demo[1]


def test_nothing_is_left_running(demo: tuple[dict[str, Any], str], work: Path) -> None:
    leftovers = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(work).encode() in command:
                leftovers.append(command)
    assert leftovers == []
