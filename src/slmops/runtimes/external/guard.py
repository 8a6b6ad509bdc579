"""Ends the user's server when its supervisor is gone, however that went.

A server started by a wrapper script is not our child: the kernel's parent-death signal would reach the wrapper only.
So a tiny process of its own waits on a pipe whose other end only the supervisor holds, and then kills the server's
whole process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct

_NUMBER = struct.Struct("<q")


class Guard:
    """The waiting process; make it before anything large is loaded."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        child = os.fork()
        if child == 0:
            _detach(reader, self._writer)
        os.close(reader)
        os.waitpid(child, 0)

    def watch(self, group: int) -> None:
        """Kill this process group when we are gone."""
        os.write(self._writer, _NUMBER.pack(group))


def _detach(reader: int, writer: int) -> None:
    """In the child: become nobody's child, wait, kill, end. Never returns."""
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(writer)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        group = 0
        while content := os.read(reader, _NUMBER.size):
            (group,) = _NUMBER.unpack(content)
        if group > 1:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)
