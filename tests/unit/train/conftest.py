"""The engine, in this process, on a Unix socket: what tokenizer and forward pass are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest


class Engine:
    """One llama.cpp server and its socket."""

    def __init__(self, model: Path, socket: Path, adapter: Path | None) -> None:
        """Load the model with one thread."""
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.hostnames = [str(socket)]
        params.n_ctx = 256
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.verbosity = -1
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine", timeout=60
        )

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST and return the JSON reply."""
        reply = self._http.post(path, json=body)
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer

    def top_logprobs(self, tokens: list[int], count: int) -> dict[int, float]:
        """Return the likeliest next tokens with their natural log-probabilities."""
        body = {"prompt": tokens, "n_predict": 1, "n_probs": count, "temperature": 0, "cache_prompt": False}
        (position,) = self.post("/completion", body)["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}

    def close(self) -> None:
        """Close the connection and end the server."""
        self._http.close()
        del self._server


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Give a function (model, adapter=None) -> Engine; every engine ends with the test."""
    engines: list[Engine] = []

    def start(model: Path, adapter: Path | None = None) -> Engine:
        engines.append(Engine(model, tmp_path / f"e{len(engines)}.sock", adapter))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
