"""Waiting for a blueprint's windows, by this device's local time and the control plane's idea of what time it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from slmops.agent.ports import Clock
from slmops.core.device.windows import parse_window

log = logging.getLogger("slmops.agent")

#: the clock is looked at again after so long: it may have been corrected by hours meanwhile
_LOOK_AGAIN_S = 5.0


class Windows:
    """Waits for windows."""

    def __init__(self, clock: Clock) -> None:
        """Keep the clock."""
        self._clock = clock

    def local_time(self) -> datetime:
        """Now, in the device's time zone."""
        return self._clock.now().astimezone()

    async def wait(self, declared: Callable[[], str], purpose: str) -> None:
        """Return once a window is open; at once when none is declared.

        Args:
            declared: the window as the newest order has it, in ``core.device.windows``' grammar; empty for always.
            purpose: for the log.

        Raises:
            UsageError: the text cannot be read: a newer control plane's grammar.
        """
        said = ""
        while text := declared():
            window, local = parse_window(text), self.local_time()
            if window.is_open(local):
                return
            opens = window.next_opening(local)
            if said != text:
                log.info("%s waits for its window %s: it opens at %s", purpose, text, opens)
                said = text
            left_s = (
                (opens - local.replace(tzinfo=None)).total_seconds() if opens is not None else _LOOK_AGAIN_S
            )
            await asyncio.sleep(min(max(left_s, 0.05), _LOOK_AGAIN_S))
