"""Real processes of a fleet on this machine: a control plane and agents. All of them are stopped with it, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.errors import BusyError, DeadlineError

_STOP_S = 15.0
_PR_SET_PDEATHSIG = 1
#: found before any fork: a child between fork and exec only calls it
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_in_order() -> None:
    """Let a command that is told to stop, or whose terminal is closed, take its processes with it.

    Whatever closed the terminal may signal again: the first time decides, the rest must not cut the clean-up short.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _as_interrupt)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """In the child: the kernel tells it to stop when we are killed and can clean up nothing."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def slmops_command(*arguments: str) -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "slmops.cli.main", *arguments]


@dataclass
class Processes:
    """Started processes, by name, with their logs."""

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``slmops ...`` in the background; its output goes to ``logs/NAME.log``."""
        return self.start_command(name, slmops_command(*arguments))

    def start_command(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """The same for any command.

        Args:
            name: of the process.
            command: arguments, the program first.
            environment: of it; None for ours.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # the kernel means the thread that started it: only the main one lives as long as we do
                preexec_fn=_end_with_parent  # noqa: PLW1509 - it calls one function that was found before
                if threading.current_thread() is threading.main_thread()
                else None,
            )
        self.running[name] = process
        return process

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run a command to its end; its output goes to ``logs/NAME.log``.

        Raises:
            BusyError: it failed; with the end of its log.
        """
        self.start_command(name, command, environment).wait()
        process = self.running.pop(name)
        if process.returncode:
            raise BusyError(
                f"{name} ended with code {process.returncode}: {self.tail(name)}",
                hint=f"see {self.logs / name}.log",
            )

    def check(self) -> None:
        """Refuse to go on when one of them has died.

        Raises:
            BusyError: names it, with the end of its log.
        """
        for name, process in self.running.items():
            if process.poll() is not None:
                raise BusyError(
                    f"{name} ended with code {process.returncode}: {self.tail(name)}",
                    hint=f"see {self.logs / name}.log",
                )

    def tail(self, name: str) -> str:
        """The last lines of a log."""
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:].strip()

    def stop(self, name: str) -> None:
        """Stop one of them; safe when there is none of this name."""
        process = self.running.pop(name, None)
        if process is not None:
            _stop([process])

    def stop_all(self) -> None:
        """Stop everything. Agents first, so that their engines go with them."""
        _stop(list(reversed(self.running.values())))
        self.running.clear()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask, then kill."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_on_port(
    processes: Processes, name: str, arguments: Sequence[str], ready: str, *, preferred: int
) -> str:
    """Start a server on the preferred loopback port, or on any free one when somebody has that; returns its URL.

    The port is not probed first: between the probe and the server's start another program can take it. The URL is what our
    own process says, because whoever has the port would answer, too.

    Args:
        processes: that it joins.
        name: of the process.
        arguments: of ``slmops``, without ``--listen``.
        ready: how the line begins with which it says that it is ready; the URL follows.
        preferred: port.

    Raises:
        BusyError: it ended for another reason than a taken port.
        DeadlineError: it was not ready in time.
    """
    for port in (preferred, 0):
        process = processes.start(name, *arguments, "--listen", f"127.0.0.1:{port}")
        try:
            return wait_for_line(name, ready, processes)
        except BusyError:
            if port == 0 or process.poll() != BusyError.exit_code:
                raise
            del processes.running[name]
    raise BusyError("no loopback port is free", hint="close some programs")


def wait_for_line(name: str, begins: str, processes: Processes, timeout_s: float = 60.0) -> str:
    """The rest of the line with which a process says that it is ready.

    Raises:
        BusyError: a process ended meanwhile.
        DeadlineError: it did not say so in time.
    """
    deadline = time.monotonic() + timeout_s
    log = processes.logs / f"{name}.log"
    while time.monotonic() < deadline:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(begins):
                return line.removeprefix(begins).strip()
        processes.check()
        time.sleep(0.1)
    raise DeadlineError(f"{name} was not ready within {timeout_s:.0f} s", hint=f"see {log}")


def wait_for_run_file(folder: Path, processes: Processes, timeout_s: float = 60.0) -> str:
    """The URL under which an agent serves, from its run file."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        processes.check()
        try:
            return str(msgspec.json.decode((folder / "run.json").read_bytes(), type=dict[str, object])["url"])
        except (FileNotFoundError, *UNREADABLE_JSON):
            time.sleep(0.1)
    raise DeadlineError(
        f"the agent in {folder} did not start within {timeout_s:.0f} s",
        hint=f"see the logs in {processes.logs}",
    )
