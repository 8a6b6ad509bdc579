"""What every engine child does first: die with its parent, stay in its limits, keep its sockets private.

Runs in the child process only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1

#: Exit status of a child that could not load its model; the reason is the end of its log.
EXIT_LOAD_FAILED = 3
#: Exit status of a child whose parent is gone.
EXIT_ORPHANED = 4


@dataclass(frozen=True)
class ChildLimits:
    """Limits that the child puts on itself (a cgroup has been made by the parent).

    Attributes:
        cgroup_procs: files to write the own process id into.
        private_bytes: `RLIMIT_DATA`.
        nice: added niceness.
    """

    cgroup_procs: tuple[str, ...] = ()
    private_bytes: int | None = None
    nice: int | None = None


@dataclass(frozen=True)
class ChildConfig:
    """What `EngineProcess.spawn` wrote.

    Attributes:
        spec: fields of `EngineSpec`; paths as text.
        engine_socket, score_socket: where to listen.
        extra: the runtime's own fields.
    """

    spec: dict[str, Any]
    engine_socket: Path
    score_socket: Path
    extra: dict[str, Any]


def begin() -> ChildConfig:
    """Read the configuration from stdin and `settle`. The first thing that a child does."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            os._exit(EXIT_ORPHANED)
        line += part
    config = json.loads(line)
    sockets = {name: Path(path) for name, path in config.pop("sockets").items()}
    asked = config.pop("limits")
    limits = ChildLimits(tuple(asked["cgroup_procs"]), asked["private_bytes"], asked["nice"])
    settle(config.pop("parent_pid"), config.pop("die_with_thread"), limits, list(sockets.values()))
    return ChildConfig(config.pop("spec"), sockets["engine"], sockets["score"], config)


def settle(parent_pid: int, die_with_thread: bool, limits: ChildLimits, sockets: Sequence[Path]) -> None:
    """Tie this process to its parent and to its limits. Call before anything large is loaded.

    Two ties, because each has a hole: the kernel's parent-death signal also works on a hung child, but fires
    when the parent's *thread* ends; the end of the stdin pipe needs a running interpreter here.

    Args:
        parent_pid: the process that must stay alive.
        die_with_thread: use the parent-death signal (the parent started us from its main thread).
        limits: what to apply.
        sockets: files to remove when orphaned.
    """
    os.umask(0o077)
    for path in limits.cgroup_procs:
        Path(path).write_text(str(os.getpid()), encoding="ascii")
    if limits.private_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.private_bytes, limits.private_bytes))
    if limits.nice:
        os.nice(limits.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold prompts
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal's ^C is for the parent, which stops us in order
    if die_with_thread and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        _leave(sockets)
    threading.Thread(target=_watch_parent, args=(tuple(sockets),), daemon=True, name="parent-watch").start()


def _watch_parent(sockets: Sequence[Path]) -> None:
    while True:
        with contextlib.suppress(InterruptedError):
            if not os.read(0, 1):  # end of file: the parent, who alone holds the other end, is gone
                _leave(sockets)


def _leave(sockets: Sequence[Path]) -> None:
    for path in sockets:
        with contextlib.suppress(OSError):
            path.unlink()
    os._exit(EXIT_ORPHANED)
