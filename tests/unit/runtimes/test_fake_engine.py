"""The scripted engine plays its faults as told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import HealthCheckError, RuntimeLoadError
from slmops.runtimes import AdapterSpec, Engine, EngineSpec, load, open_engine
from slmops.runtimes.connect import engine_client
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model

BODY = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 50}


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


async def ask(socket: Path, **fields: object) -> str:
    async with engine_client(socket) as client:
        response = await client.post("/v1/chat/completions", json={**BODY, **fields})
        return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize(("fault", "reason"), [("refuse", "scripted"), ("crash", "exit status -11")])
def test_load_faults(tmp_path: Path, fault: str, reason: str) -> None:
    """A refusal and a crash while loading are both RuntimeLoadError, with what happened."""
    model = write_fake_model(tmp_path / "m.json", faults={"load": fault})

    async def main() -> None:
        with pytest.raises(RuntimeLoadError, match=reason):
            async with open_engine(EngineSpec(FAKE_RUNTIME, model)):
                pass

    run(main())


def test_a_load_that_hangs_is_a_health_error(tmp_path: Path) -> None:
    """An engine that is alive but never ready is told from one that refused."""
    model = write_fake_model(tmp_path / "m.json", faults={"load": "hang"})

    async def main() -> None:
        engine = await load(FAKE_RUNTIME).start(EngineSpec(FAKE_RUNTIME, model), tmp_path)
        try:
            with pytest.raises(HealthCheckError, match="not ready within"):
                await engine.wait_ready(timeout_s=0.3)
            assert engine.alive()
        finally:
            await engine.stop()

    run(main())


def test_a_crash_comes_on_its_request(tmp_path: Path) -> None:
    """The second request kills the child; the first was answered."""
    model = write_fake_model(tmp_path / "m.json", {"hello": "Hi."}, faults={"crash_on_request": 2})

    async def main() -> None:
        async with open_engine(EngineSpec(FAKE_RUNTIME, model)) as engine:
            assert await ask(engine.socket_path) == "Hi."
            with pytest.raises(RuntimeLoadError, match="exit status -9"):
                await engine.score([1, 2, 3])
            assert not engine.alive()

    run(main())


def test_a_hang_leaves_health_alone(tmp_path: Path) -> None:
    """A hung request does not take /health with it: the agent must find out by deadline."""
    model = write_fake_model(tmp_path / "m.json", faults={"hang_on_request": 1})

    async def main() -> None:
        async with open_engine(EngineSpec(FAKE_RUNTIME, model)) as engine:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ask(engine.socket_path), 0.3)
            await engine.wait_ready(60)

    run(main())


def test_an_engine_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """Started from a worker thread, an engine is not killed by the kernel when that thread ends."""
    model = write_fake_model(tmp_path / "m.json", {"hello": "Hi."})
    started: list[Engine] = []

    async def start() -> None:
        engine = await load(FAKE_RUNTIME).start(EngineSpec(FAKE_RUNTIME, model), tmp_path)
        started.append(engine)
        await engine.wait_ready(60)

    thread = threading.Thread(target=lambda: asyncio.run(start()))
    thread.start()
    thread.join()
    (engine,) = started

    async def main() -> None:
        try:
            assert await ask(engine.socket_path) == "Hi."
            assert engine.alive()
        finally:
            await engine.stop()

    run(main())


def test_garbage_and_adapters_change_answers(tmp_path: Path) -> None:
    """From its request on, output is garbage; an adapter's answers go first unless its scale is zero."""
    model = write_fake_model(tmp_path / "m.json", {"hello": "Hi."}, faults={"garbage_from_request": 2})
    adapter = tmp_path / "fi.json"
    adapter.write_text(json.dumps({"slmops_fake": 1, "answers": {"hello": "Hei."}}))

    async def main() -> None:
        for scale, expected in ((1.0, "Hei."), (0.0, "Hi.")):
            spec = EngineSpec(FAKE_RUNTIME, model, adapters=(AdapterSpec(adapter, scale),))
            async with open_engine(spec) as engine:
                assert await ask(engine.socket_path) == expected
                assert "####" in await ask(engine.socket_path)

    run(main())


def test_confidence_shows_in_scores(tmp_path: Path) -> None:
    """A worse variant of the same answers has a higher negative log-likelihood."""
    nll = []

    async def main() -> None:
        for confidence in (0.9, 0.6):
            model = write_fake_model(tmp_path / f"{confidence}.json", {"hello": "Hi."}, confidence=confidence)
            async with open_engine(EngineSpec(FAKE_RUNTIME, model)) as engine:
                prompt = await engine.apply_template([{"role": "user", "content": "hello"}])
                score = await engine.score([*prompt, *b"Hi."], start=len(prompt))
                assert list(score.greedy_ids) == list(b"Hi.")
                nll.append(score.mean_nll)

    run(main())
    assert nll[0] < nll[1]
