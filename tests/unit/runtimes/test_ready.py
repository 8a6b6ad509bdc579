"""Ready means that every question can be asked: a child opens two sockets, one after the other."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from pathlib import Path

import pytest

from slmops.core.errors import HealthCheckError
from slmops.runtimes import EngineSpec
from slmops.runtimes.limits import AppliedLimits, ChildLimits
from slmops.runtimes.process import EngineProcess, Sockets
from slmops.runtimes.unix_http import Request, Response, UnixHttpServer

PROPERTIES = {
    "train_context_tokens": 64,
    "context_tokens": 64,
    "n_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "n_embd": 8,
    "head_dim": 8,
    "vocab_tokens": 300,
    "parameters": 1,
    "model_bytes": 1,
    "description": "a model",
    "bos_token": -1,
    "eos_token": -1,
    "chat_template": "",
    "slots": 1,
    "runtime_version": "1",
}


class LateChild:
    """Answers on its first socket at once, and opens the second one later."""

    def __init__(self, workdir: Path, late_s: float | None) -> None:
        workdir.mkdir()
        self.sockets = Sockets.within(workdir)
        self.servers = [UnixHttpServer(self.sockets.engine, self.answer)]
        self.sleeper = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        limits = AppliedLimits(ChildLimits(), ())
        spec = EngineSpec("llama.cpp", workdir / "m.gguf")
        self.engine = EngineProcess(spec, self.sleeper, self.sockets, limits)
        self.opened_at_s = 0.0
        self.serve(self.servers[0])
        if late_s is not None:
            self.timer = threading.Timer(late_s, self.open_second)
            self.timer.start()

    def open_second(self) -> None:
        self.opened_at_s = time.monotonic()
        self.servers.append(UnixHttpServer(self.sockets.score, self.answer))
        self.serve(self.servers[1])

    @staticmethod
    def serve(server: UnixHttpServer) -> None:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @staticmethod
    def answer(request: Request) -> Response:
        return Response(value=PROPERTIES if request.path == "/properties" else {})

    async def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        await self.engine.stop()


def test_an_engine_is_ready_when_its_second_socket_is_open(tmp_path: Path) -> None:
    """A healthy first socket alone is not enough: on a busy machine the first question was refused then."""

    async def main() -> None:
        child = LateChild(tmp_path / "e", late_s=0.3)
        try:
            await child.engine.wait_ready(10.0)
            assert 0 < child.opened_at_s <= time.monotonic()
            assert (await child.engine.properties()).vocab_tokens == 300
        finally:
            await child.close()

    asyncio.run(main())


def test_an_engine_that_never_opens_it_is_not_ready(tmp_path: Path) -> None:
    async def main() -> None:
        child = LateChild(tmp_path / "e", late_s=None)
        try:
            with pytest.raises(HealthCheckError, match=r"not ready within 0\.2 s"):
                await child.engine.wait_ready(0.2)
        finally:
            await child.close()

    asyncio.run(main())
