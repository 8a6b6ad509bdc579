"""The lab over a tiny build: real agents of two classes behind a bad network, and its report in the release's evidence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.release import Workspace, create_release, init_keys

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)


def slmops(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slmops.cli.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of a tiny model for two profiles."""
    folder = tmp_path_factory.mktemp("lab")
    make_tiny_gguf(folder / "tiny.gguf")
    examples = [json.dumps({"prompt": f"turn on {i}", "answer": {"on": i}}) for i in range(6)]
    (folder / "e.jsonl").write_text("\n".join(examples), encoding="utf-8")
    done = slmops(
        folder,
        "build",
        "run",
        "--base",
        "tiny.gguf",
        "--examples",
        "e.jsonl",
        "--profile",
        "pi5-8gb",
        "--profile",
        "pi-zero2-512mb",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_each_variant_is_proved_on_its_class_and_the_release_carries_it(
    project: Path, tmp_path: Path
) -> None:
    done = slmops(
        project, "lab", "run", "build/tiny", "--network", "flaky", "--context-tokens", "128", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(d["profile"], d["outcome"], d["failed"]) for d in report["devices"]] == [
        ("pi5-8gb", "committed", 0),
        ("pi-zero2-512mb", "committed", 0),
    ]
    assert all(d["golden_kept"] == d["golden_prompts"] > 0 for d in report["devices"])
    assert all(d["asked"] > 0 and d["speed"]["decode_tps"] > 0 for d in report["devices"])
    assert all(set(d["limits"]) == {"memory_bytes", "cpu_cores"} for d in report["devices"])
    assert all(d["network"]["broken"] + d["network"]["cut"] > 0 for d in report["devices"])
    workspace = Workspace(tmp_path / "keys")
    init_keys(workspace, tmp_path / "server", "pass", NOW)
    bundle = create_release(
        project / "build" / "tiny",
        version="1.0.0",
        workspace=workspace,
        passphrase="pass",
        waivers={},
        out_dir=tmp_path / "release",
        created=NOW,
    )
    evidence = json.loads((bundle.path / "evidence.json").read_bytes())
    assert evidence["lab"]["entries_of_other_variants"] == 0
    assert {d["variant_sha256"] for d in evidence["lab"]["devices"]} == {
        entry.sha256 for entry in bundle.release.variants
    }
    assert {v["profile"] for v in evidence["variants"]} == {"pi5-8gb", "pi-zero2-512mb"}


def test_a_device_that_cannot_hold_it_is_a_finding_with_its_reason(project: Path) -> None:
    """The exit code says so, the report has the numbers, and the other class was asked all the same."""
    done = slmops(
        project, "lab", "run", "build/tiny", "--context-tokens", "65536", "--out", "other.json", "--json"
    )
    assert done.returncode == 5
    devices = json.loads((project / "other.json").read_text(encoding="utf-8"))["devices"]
    assert [d["outcome"] for d in devices] == ["refused", "refused"]
    assert all("context: 65536 tokens asked" in d["reason"] for d in devices)
    assert "not every device serves" in done.stderr


def test_a_mistyped_class_or_network_is_refused_before_anything_starts(project: Path) -> None:
    done = slmops(project, "lab", "run", "build/tiny", "--profile", "pi9")
    assert (done.returncode, "it has: pi-zero2-512mb, pi5-8gb" in done.stderr) == (2, True)
    done = slmops(project, "lab", "run", "build/tiny", "--network", "5g")
    assert (done.returncode, "not understood" in done.stderr) == (2, True)


def _naming(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_lab_that_is_killed_in_the_middle_leaves_no_process(
    project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    keep = tmp_path / "kept"
    command = [sys.executable, "-m", "slmops.cli.main", "lab", "run", "build/tiny", "--keep", str(keep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as lab:
        end = time.monotonic() + 120
        while not list(keep.glob("devices/*/run.json")) and time.monotonic() < end:
            assert lab.poll() is None
            time.sleep(0.05)
        assert len(_naming(keep)) >= 3  # the lab, a control plane, an agent
        lab.send_signal(number)
        lab.wait(60)
    end = time.monotonic() + 60
    while _naming(keep) and time.monotonic() < end:
        time.sleep(0.1)
    assert _naming(keep) == []
