"""The demo's processes: a control plane finds a port even when its usual one is taken."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest

from slmops.cli.demo.scenario import DemoOptions, Scenario
from slmops.cli.local_fleet.processes import Processes, slmops_command, start_on_port
from slmops.cli.server.run import READY
from slmops.core.errors import BusyError
from slmops.release import Workspace, init_keys

pytestmark = pytest.mark.e2e

EXAMPLE = Path(__file__).parents[2] / "examples" / "home-intents"


def test_a_taken_port_is_left_to_its_owner_and_another_one_is_used(tmp_path: Path) -> None:
    data = tmp_path / "server"
    init_keys(Workspace(tmp_path / "keys"), data, "a passphrase for this test", datetime.now(timezone.utc))
    processes = Processes(tmp_path / "logs")
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken = owner.getsockname()[1]
        try:
            url = start_on_port(
                processes, "server", ("server", "run", "--data-dir", str(data)), READY, preferred=taken
            )
            assert url != f"http://127.0.0.1:{taken}"
            assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
            processes.check()
        finally:
            processes.stop_all()


def test_a_server_that_ends_for_another_reason_is_not_tried_again(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "logs")
    arguments = ("server", "run", "--data-dir", str(tmp_path / "nothing-here"))
    with pytest.raises(BusyError, match="ended with code 2"):
        start_on_port(processes, "server", arguments, READY, preferred=0)
    log = (tmp_path / "logs" / "server.log").read_text(encoding="utf-8")
    assert log.count("error[") == 1
    processes.running.clear()


def test_a_second_demo_in_the_same_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    """The first one keeps its files; when it has ended, the folder is free."""
    options = DemoOptions(project=tmp_path, work=tmp_path / "demo", fast=True)
    first = Scenario(options)
    kept = tmp_path / "demo" / "run" / "operator-token"
    kept.write_text("t", encoding="ascii")
    with pytest.raises(BusyError, match="another demo is running"):
        Scenario(options)
    assert kept.read_text(encoding="ascii") == "t"
    first.close()
    Scenario(options).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_told_to_stop_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    """Also when its terminal is closed: it ends by itself, and the folder is free again."""
    work = tmp_path / "demo"
    project = shutil.copytree(EXAMPLE, tmp_path / "project", ignore=shutil.ignore_patterns("data"))
    demo = subprocess.Popen(
        slmops_command("demo", "--fast", "--work", str(work), "--project", str(project)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert demo.stdout is not None
    with demo.stdout:
        for line in demo.stdout:
            if b"model and task" in line:
                break
        demo.send_signal(number)
        assert demo.wait(60) == 130
    Scenario(DemoOptions(project=tmp_path, work=work, fast=True)).close()
