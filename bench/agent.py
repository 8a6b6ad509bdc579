"""Promise: an idle agent without a model takes <= 60 MB and <= 0.5 % of a core. Peer: an empty Starlette application."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from device_world import print_results, result, world

IDLE_S = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
_PEER = """
import uvicorn
from starlette.applications import Starlette
uvicorn.run(Starlette(), host="127.0.0.1", port=0, log_config=None)
"""


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    peer = subprocess.Popen([sys.executable, "-c", _PEER])
    try:
        with world() as (_, plane, agent):
            plane.poll_s = 30.0  # a device's usual pace
            agent.start()
            assert agent.process is not None
            plane.wait_for(lambda p: p.last is not None)
            time.sleep(5)
            pids = {"ours": agent.process.pid, "peer": peer.pid}
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            time.sleep(IDLE_S)
            share = {name: (cpu_s(pid) - before[name]) / IDLE_S for name, pid in pids.items()}
            memory = {name: rss_bytes(pid) / 1e6 for name, pid in pids.items()}
    finally:
        peer.terminate()
        peer.wait()
    print_results(
        "agent",
        [
            result(
                "idle memory without a model",
                memory["ours"],
                memory["peer"],
                "an empty Starlette application",
                "MB",
                memory["ours"] / memory["peer"],
                "<= 60 MB",
                memory["ours"] <= 60,
            ),
            result(
                "idle CPU",
                share["ours"] * 100,
                share["peer"] * 100,
                "an empty Starlette application",
                "% of a core",
                share["ours"] / max(share["peer"], 1e-4),
                "<= 0.5 %",
                share["ours"] <= 0.005,
            ),
        ],
    )


if __name__ == "__main__":
    main()
