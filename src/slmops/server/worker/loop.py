"""The worker: one thread that lets rollouts take their turn and keeps signed metadata fresh.

It decides nothing: ``Rollouts.tick(now)`` does, and tests call that with their own time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

import structlog

from slmops.core.errors import SlmopsError
from slmops.server.ports.world import Clock
from slmops.server.services.publication import Publication
from slmops.server.services.rollouts import Rollouts

#: a turn that takes long is followed by a pause of this many times its length, so that check-ins keep the database
REST_RATIO = 4.0
#: how often the age of the signed metadata is looked at, seconds
RENEW_EVERY_S = 60.0

log = structlog.get_logger("slmops.server.worker")


class Worker:
    """The thread.

    Args:
        rollouts: whose turn it is.
        publication: whose timestamp must not expire.
        clock: wall clock.
        tick_s: pause between turns, seconds.
        observe: called after each turn with its duration in seconds and whether it went well.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        publication: Publication,
        clock: Clock,
        tick_s: float,
        observe: Callable[[float, bool], None],
    ) -> None:
        """Not started yet."""
        self._rollouts = rollouts
        self._publication = publication
        self._clock = clock
        self._tick_s = tick_s
        self._observe = observe
        self._stop = threading.Event()
        self._renewed_at: datetime | None = None
        self._thread = threading.Thread(target=self._run, name="slmops-worker", daemon=True)

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def alive(self) -> bool:
        """Whether turns are being taken."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Finish the current turn and stop."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            began_s = time.monotonic()
            well = self._turn(self._clock.now())
            took_s = time.monotonic() - began_s
            self._observe(took_s, well)
            pause_s = max(self._tick_s, REST_RATIO * took_s)

    def _turn(self, now: datetime) -> bool:
        """One turn; an error is logged and the next turn tries again: state and outbox are in the database."""
        try:
            self._rollouts.tick(now)
            if self._renewed_at is None or (now - self._renewed_at).total_seconds() > RENEW_EVERY_S:
                self._renewed_at = now
                if self._publication.renew():
                    log.info("metadata.renewed")
        except SlmopsError as error:
            log.error("tick.failed", code=error.code, detail=error.message, hint=error.hint)
            return False
        except Exception as error:
            log.error("tick.bug", exc_info=error)
            return False
        return True
