"""A real (scripted) engine that stands still is found; one that works, and one that stumbles once, is not."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.standstill import stand_still

from slmops.agent.hangs import HangWatch
from slmops.runtimes import Engine, EngineSpec, open_engine
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model


class Asked:
    """The engine, and what it answered so far."""

    def __init__(self, engine: Engine) -> None:
        self.pid = engine.pid
        self.answers: list[bool] = []
        self._engine = engine

    async def healthy(self, timeout_s: float) -> bool:
        self.answers.append(await self._engine.healthy(timeout_s))
        return self.answers[-1]


async def _hangs(watch: HangWatch, engine: Any, until: Callable[[], bool] = lambda: False) -> bool:
    """Whether a hang was seen before ``until``: counted in answers, not in seconds, for busy machines."""
    while not until():
        if watch.seen(engine):
            return True
        await asyncio.sleep(0.02)
    return False


def test_a_hang_is_seen_and_a_pause_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        model = write_fake_model(tmp_path / "m.json")
        async with open_engine(EngineSpec(FAKE_RUNTIME, model)) as engine:
            asked = Asked(engine)
            watch = HangWatch(every_s=0.05, answer_s=1.0, misses=3)
            assert not await _hangs(watch, asked, until=lambda: len(asked.answers) >= 3)
            assert all(asked.answers)
            stand_still(engine.pid)
            assert not await _hangs(
                watch, asked, until=lambda: not asked.answers[-1]
            )  # one missed answer is no hang
            os.kill(engine.pid, signal.SIGCONT)
            assert not await _hangs(watch, asked, until=lambda: asked.answers[-1])
            stand_still(engine.pid)
            assert await _hangs(watch, asked)
            assert asked.answers[-3:] == [False] * 3
            os.kill(engine.pid, signal.SIGCONT)

    asyncio.run(asyncio.wait_for(main(), 120))
