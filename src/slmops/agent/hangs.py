"""An engine that lives and does not answer: found by asking ``/health``, which every engine answers in the middle of work.

Owns: the asking and the count. Does not own: what is done about it (:mod:`slmops.agent.serving` ends it, and it is
restarted as after a crash).
"""

from __future__ import annotations

import asyncio
import time

from slmops.runtimes import Engine

#: between two questions, seconds
EVERY_S = 5.0
#: an answer that takes longer is none; a slow device computes a piece of a prompt in less
ANSWER_S = 10.0
#: so many questions without an answer in a row are a hang: one may fall into a moment when the machine swaps
MISSES = 3


class HangWatch:
    """Asks engines how they are, one question at a time each, without ever waiting for an answer itself."""

    def __init__(self, every_s: float = EVERY_S, answer_s: float = ANSWER_S, misses: int = MISSES) -> None:
        """Ask every ``every_s`` seconds and call ``misses`` unanswered questions a hang."""
        self._every_s, self._answer_s, self._misses = every_s, answer_s, misses
        self._asked: dict[int, tuple[asyncio.Task[bool] | None, float, int]] = {}

    def seen(self, engine: Engine) -> bool:
        """Whether this engine hangs; call it often, from the event loop."""
        now = time.monotonic()
        question, at, missed = self._asked.get(engine.pid, (None, now, 0))
        if question is None:
            if now - at >= self._every_s or engine.pid not in self._asked:
                question = asyncio.create_task(engine.healthy(self._answer_s))
        elif question.done():
            answered = not question.cancelled() and question.exception() is None and question.result()
            missed = 0 if answered else missed + 1
            question, at = None, now
        self._asked = {pid: state for pid, state in self._asked.items() if pid == engine.pid or state[0]}
        self._asked[engine.pid] = (question, at, missed)
        if missed < self._misses:
            return False
        del self._asked[engine.pid]
        return True
