"""A process that stands still: stopped by signal, and known to be stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

#: a signal that has not stopped a process after this long will not
DEADLINE_S = 30.0


def stand_still(pid: int) -> None:
    """Stop a process with ``SIGSTOP`` and return once each of its threads has stopped.

    ``kill`` returns as soon as the signal is noted. On a busy machine a thread on another core runs on for a while, and
    may answer one more question.

    Raises:
        TimeoutError: a thread still runs after ``DEADLINE_S`` seconds.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_S
    while not all(_state(thread) in "TtZX" for thread in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {DEADLINE_S:.0f} s of SIGSTOP")
        time.sleep(0.002)


def _state(thread: Path) -> str:
    """The state letter of a thread (proc(5), ``stat``: the first field behind the name, which may hold spaces)."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
