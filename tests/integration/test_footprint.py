"""What a device installs and loads is a closed list: it cannot grow by accident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

#: third-party top-level modules that the agent may load, and nothing else
ALLOWED = {
    "_cffi_backend",  # cryptography
    "anyio",
    "certifi",
    "click",
    "cryptography",
    "h11",
    "httpcore",
    "httpx",
    "idna",
    "jwt",
    "msgspec",
    "prometheus_client",
    "rfc8785",
    "securesystemslib",
    "sniffio",
    "starlette",
    "tuf",
    "typing_extensions",
    "urllib3",
    "uvicorn",
    "websockets",
}
if sys.version_info < (3, 11):
    ALLOWED |= {"exceptiongroup"}  # anyio's stand-in for what later Pythons have built in
#: memory of a process that has imported everything the agent uses, TUF client included; measured 49 MB
CEILING_BYTES = 64 << 20

PROGRAM = """
import json, sys
for optional in ("rich", "pygments"):  # httpx loads them for its own command line where they happen to be installed
    sys.modules[optional] = None
before = set(sys.modules)
import slmops.agent.main, slmops.cli.agent.group, slmops.artifact.trust, tuf.ngclient
tops = {name.split(".")[0] for name in set(sys.modules) - before}
third = sorted(t for t in tops if t not in sys.stdlib_module_names and t != "slmops" and not t.startswith("__"))
third = [t for t in third if "site-packages" in (getattr(sys.modules.get(t), "__file__", "") or "")]
pages = int(open("/proc/self/statm").read().split()[1])
import os
print(json.dumps({"modules": third, "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE")}))
"""


def _measure() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_the_agent_loads_a_closed_list_of_modules_in_little_memory() -> None:
    measured = _measure()
    assert set(measured["modules"]) <= ALLOWED  # type: ignore[call-overload]
    assert int(str(measured["rss_bytes"])) < CEILING_BYTES


def test_the_base_install_has_no_other_requirement() -> None:
    """Pyproject's dependencies are the device's: adding one is a decision (ADR 0008)."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    block = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")]
    names = {
        line.strip().strip('",').split(">")[0] for line in block.splitlines() if line.strip().startswith('"')
    }
    assert names == {
        "click",
        "cryptography",
        "httpx",
        "msgspec",
        "prometheus-client",
        "pyjwt",
        "rfc8785",
        "starlette",
        "tuf",
        "uvicorn",
    }
