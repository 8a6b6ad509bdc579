"""A real (scripted) engine that stands still is found; one that works, and one that stumbles once, is not."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from slmops.agent.hangs import HangWatch
from slmops.runtimes import EngineSpec, open_engine
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model


async def _watch(watch: HangWatch, engine, ticks: int) -> int | None:  # type: ignore[no-untyped-def]
    """The tick at which a hang was seen."""
    for tick in range(ticks):
        if watch.seen(engine):
            return tick
        await asyncio.sleep(0.02)
    return None


def test_a_hang_is_seen_and_a_pause_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        model = write_fake_model(tmp_path / "m.json")
        async with open_engine(EngineSpec(FAKE_RUNTIME, model)) as engine:
            watch = HangWatch(every_s=0.05, answer_s=0.2, misses=3)
            assert await _watch(watch, engine, 25) is None
            os.kill(engine.pid, signal.SIGSTOP)
            assert await _watch(watch, engine, 10) is None  # 0.2 s: one missed answer is no hang
            os.kill(engine.pid, signal.SIGCONT)
            assert await _watch(watch, engine, 25) is None
            os.kill(engine.pid, signal.SIGSTOP)
            assert await _watch(watch, engine, 200) is not None
            os.kill(engine.pid, signal.SIGCONT)

    asyncio.run(main())
