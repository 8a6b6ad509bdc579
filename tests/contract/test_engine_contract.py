"""One suite for every engine: what the agent and build may rely on, on the fake and on llama.cpp alike."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.standstill import stand_still
from tests.support.stock_server import write_stock_config

from slmops.core.errors import NotFoundError, RuntimeLoadError, SlmopsError, UsageError
from slmops.runtimes import Engine, EngineLimits, EngineSpec, Runtime, load, open_engine
from slmops.runtimes.bench import bench_engine
from slmops.runtimes.connect import engine_client
from slmops.runtimes.depth_bench import bench_depths
from slmops.runtimes.external.config import ENVIRONMENT_VARIABLE
from slmops.testing.engine import FAKE_RUNTIME, write_fake_model

READY_S = 120.0
#: Only a guard against hanging for ever: nothing is decided by it.
GUARD_S = 300.0
PATH = "/v1/completions"
QUESTION = [{"role": "user", "content": "Name three colours."}]


@dataclass(frozen=True)
class Harness:
    """What differs between runtimes: the model and how to read the count of tokens generated so far."""

    spec: EngineSpec
    broken: Callable[[Path, str], Path]
    predicted_tokens: Callable[[str], int]
    #: an engine slow enough that a question can come in the middle of its work
    slow: EngineSpec
    #: a prompt of this text takes the slow engine a while and still fits
    long_text: str = "word " * 700

    @property
    def runtime(self) -> Runtime:
        return load(self.spec.runtime)


def _llama_predicted(text: str) -> int:
    (line,) = [line for line in text.splitlines() if line.startswith("llamacpp:tokens_predicted_total ")]
    return int(float(line.split()[1]))


FIXTURES = Path(__file__).parents[1] / "fixtures" / "runtimes"
#: fixtures for runtimes of the common child, and the file of each that a spec names
TOKEN_LOOP = {
    "onnxruntime-genai": "genai_config.json",
    "executorch": "model.pte",
    "executorch-8da4w": "model.pte",
    "litert": "model.tflite",
    "litert-lm": "model.litertlm",
}


@pytest.fixture(
    params=[
        "fake",
        pytest.param("llama.cpp", marks=pytest.mark.model),
        *TOKEN_LOOP,
        pytest.param("external", marks=pytest.mark.model),
        pytest.param("external-tcp", marks=pytest.mark.model),
    ]
)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Harness:
    if request.param in TOKEN_LOOP:
        return token_loop_harness(request.param, tmp_path)
    if request.param == "fake":
        model = write_fake_model(tmp_path / "model.json", {"colours": "Red, green and blue."})
        slow = write_fake_model(tmp_path / "slow.json", prefill_s=0.5, token_s=0.005, load_s=1.0)
        spec = EngineSpec(FAKE_RUNTIME, model, context_tokens=512)

        def broken(folder: Path, how: str) -> Path:
            content = model.read_bytes()
            path = folder / f"{how}.json"
            path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"not a model at all")
            return path

        return Harness(
            spec,
            broken,
            lambda text: int(json.loads(text)["predicted_tokens"]),
            replace(spec, model_path=slow, context_tokens=4096),
        )
    small_model: Path = request.getfixturevalue("small_model")
    if request.param.startswith("external"):
        config = write_stock_config(tmp_path / "external.json", tcp=request.param.endswith("tcp"))
        request.getfixturevalue("monkeypatch").setenv(ENVIRONMENT_VARIABLE, str(config))
    spec = EngineSpec(request.param.partition("-")[0], small_model, context_tokens=512)

    def broken_gguf(folder: Path, how: str) -> Path:
        path = folder / f"{how}.gguf"
        with small_model.open("rb") as source:
            path.write_bytes(source.read(20_000_000) if how == "truncated" else b"not a model at all")
        return path

    slow_spec = replace(spec, context_tokens=2048, batch_tokens=128, ubatch_tokens=128)
    return Harness(spec, broken_gguf, _llama_predicted, slow_spec)


def token_loop_harness(fixture: str, tmp_path: Path) -> Harness:
    """A committed model of some 0.2 to 0.8 MB that was trained to name three colours."""
    runtime = fixture.removesuffix("-8da4w")
    try:
        kv_cache = min(load(runtime).capabilities.kv_cache_types)
    except RuntimeLoadError as absent:
        pytest.skip(str(absent))
    folder = FIXTURES / fixture
    spec = EngineSpec(runtime, folder / TOKEN_LOOP[fixture], context_tokens=512, kv_cache=kv_cache)

    def broken(where: Path, how: str) -> Path:
        copy = where / how
        shutil.copytree(folder, copy)
        largest = max((path for path in copy.iterdir()), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        largest.write_bytes(content[: len(content) // 2] if how == "truncated" else b"not a model at all")
        return copy / TOKEN_LOOP[fixture]

    slow = replace(spec, context_tokens=1024, batch_tokens=1)  # a forward pass for each token of a prompt
    return Harness(spec, broken, lambda text: int(json.loads(text)["predicted_tokens"]), slow, "word " * 180)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, GUARD_S))


@asynccontextmanager
async def opened(spec: EngineSpec, workdir: Path) -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    async with open_engine(spec, workdir=workdir, timeout_s=READY_S) as engine, client_of(engine) as client:
        yield engine, client


def client_of(engine: Engine) -> httpx.AsyncClient:
    return engine_client(engine.socket_path)


def chat_body(**fields: object) -> dict[str, object]:
    return {"messages": QUESTION, "max_tokens": 24, "temperature": 0, **fields}


async def stream_lines(client: httpx.AsyncClient, body: dict[str, object]) -> list[str]:
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines()]
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def listening_inodes() -> set[str]:
    """Inodes of every listening TCP socket of this machine's network namespace."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(fields[9])
    return inodes


def socket_inodes(pid: int) -> set[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except OSError:
            continue
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def test_answers_carry_the_name_that_the_spec_gives(harness: Harness, workdir: Path) -> None:
    """In the list of models, in whole answers and in every part of a stream; not the file's name."""

    async def main() -> None:
        spec = replace(harness.spec, model_alias="home-intents")
        async with opened(spec, workdir) as (_, client):
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "home-intents"
            body = chat_body()
            assert (await client.post("/v1/chat/completions", json=body)).json()["model"] == "home-intents"
            lines = await stream_lines(client, body)
            assert {json.loads(line)["model"] for line in lines[:-1]} == {"home-intents"}
            plain = {"prompt": "a", "max_tokens": 2}
            assert (await client.post("/v1/completions", json=plain)).json()["model"] == "home-intents"

    asyncio.run(main())


def test_answers_chats_and_reads_back_what_it_loaded(harness: Harness, workdir: Path) -> None:
    """A ready engine answers /health and /v1/models, chats whole and streamed alike, and states its facts."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, client):
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == harness.spec.model_path.stem
            whole = (await client.post("/v1/chat/completions", json=chat_body())).json()
            text = whole["choices"][0]["message"]["content"]
            assert text
            assert 0 < whole["usage"]["completion_tokens"] <= 24
            lines = await stream_lines(client, chat_body())
            assert lines[-1] == "[DONE]"
            parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
            assert "".join(part["delta"].get("content") or "" for part in parts) == text
            assert parts[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
            facts = await engine.properties()
            assert facts.context_tokens == harness.spec.context_tokens
            assert facts.slots == min(harness.spec.slots, harness.runtime.capabilities.max_slots or 99)
            assert facts.runtime_version == harness.runtime.version()
            assert min(facts.n_layers, facts.n_kv_heads, facts.n_embd, facts.model_bytes) > 0
            assert engine.rss_bytes() >= engine.private_bytes() > 0
            assert engine.peak_rss_bytes() >= engine.rss_bytes()

    run(main())


def test_streams_and_questions_alternate(harness: Harness, workdir: Path) -> None:
    """A question right after a stream's end is answered: connections are not reused."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            for _ in range(12):
                assert (await stream_lines(client, chat_body(max_tokens=1)))[-1] == "[DONE]"
                assert (await client.get("/health")).status_code == 200

    run(main())


def test_listens_on_unix_sockets_of_its_own_only(harness: Harness, workdir: Path) -> None:
    """No TCP port is opened, and nobody but the owner can reach the sockets."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, client):
            await client.post("/v1/chat/completions", json=chat_body())
            assert socket_inodes(engine.pid)
            assert not socket_inodes(engine.pid) & listening_inodes()
            for path in engine.socket_path.parent.glob("*.sock"):
                assert path.stat().st_mode & 0o077 == 0

    run(main())


def test_health_is_503_while_loading(harness: Harness, workdir: Path) -> None:
    """A prober can tell loading from dead: connection refused, then 503, then 200."""

    async def main() -> None:
        engine = await harness.runtime.start(harness.slow, workdir)
        try:
            seen: list[int] = []
            async with client_of(engine) as client:
                while seen[-1:] != [200]:
                    assert engine.alive(), engine.log_tail()
                    try:
                        seen.append((await client.get("/health")).status_code)
                    except httpx.TransportError:
                        await asyncio.sleep(0)
            assert set(seen) == {503, 200}
            assert seen == sorted(seen, reverse=True)
        finally:
            await engine.stop()

    run(main())


def test_health_answers_in_the_middle_of_a_prefill(harness: Harness, workdir: Path) -> None:
    """A long prompt does not make the engine look dead."""

    async def main() -> None:
        async with opened(harness.slow, workdir) as (_, client):
            body = chat_body(messages=[{"role": "user", "content": harness.long_text}], max_tokens=1)
            work = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            answers = 0
            while not work.done():
                assert (await client.get("/health")).status_code == 200
                answers += not work.done()
                await asyncio.sleep(0.01)
            assert work.result().status_code == 200
            assert answers >= 1

    run(main())


def test_schema_is_kept(harness: Harness, workdir: Path) -> None:
    """A json_schema response format gives JSON that fits, whatever the model would rather say."""
    schema = {
        "type": "object",
        "properties": {"intent": {"enum": ["HassTurnOn", "HassTurnOff"]}, "level": {"type": "boolean"}},
        "required": ["intent", "level"],
        "additionalProperties": False,
    }

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            wanted = {"type": "json_schema", "json_schema": {"name": "intent", "schema": schema}}
            body = chat_body(response_format=wanted, max_tokens=256)
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            value = json.loads(answer["choices"][0]["message"]["content"])
            assert value["intent"] in ("HassTurnOn", "HassTurnOff")
            assert isinstance(value["level"], bool)
            assert set(value) == {"intent", "level"}

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_overflow_is_an_error_not_a_truncation(harness: Harness, workdir: Path, stream: bool) -> None:
    """A prompt beyond the context is a 400 that says both numbers, also for streams; the engine goes on."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            long = [{"role": "user", "content": "word " * 1000}]
            response = await client.post("/v1/chat/completions", json=chat_body(messages=long, stream=stream))
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["type"] == "exceed_context_size_error"
            assert error["n_prompt_tokens"] > error["n_ctx"] == harness.spec.context_tokens
            assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200

    run(main())


def test_each_slot_has_the_whole_context(harness: Harness, workdir: Path) -> None:
    """Two requests that each fill most of the context run together: slots do not share one pool."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, client):
            words = "word " * 60
            while len(await engine.tokenize(words)) < 380:
                words += "word "
            ids = [await engine.tokenize(f"{name} {words}") for name in ("first", "second")]
            bodies = [{"prompt": part, "max_tokens": 8, "temperature": 0, "ignore_eos": True} for part in ids]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            assert [answer.status_code for answer in answers] == [200, 200]
            assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [8, 8]

    run(main())


def test_requests_beyond_the_slots_wait(harness: Harness, workdir: Path) -> None:
    """Five requests at two slots all succeed, with what each would get alone."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            alone = (await client.post("/v1/chat/completions", json=chat_body(max_tokens=6))).json()
            work = [client.post("/v1/chat/completions", json=chat_body(max_tokens=6)) for _ in range(5)]
            answers = await asyncio.gather(*work)
            assert [answer.status_code for answer in answers] == [200] * 5
            usages = {answer.json()["usage"]["completion_tokens"] for answer in answers}
            assert usages == {alone["usage"]["completion_tokens"]}

    run(main())


def test_health_answers_while_requests_wait(harness: Harness, workdir: Path) -> None:
    """With as many requests in flight as an engine takes, /health and tokenising still find a thread."""

    async def main() -> None:
        spec = replace(harness.slow, slots=1)
        async with opened(spec, workdir) as (engine, client):
            body = chat_body(max_tokens=24)
            work = [
                asyncio.create_task(client.post("/v1/chat/completions", json=body))
                for _ in range(spec.max_requests)
            ]
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            assert (await client.get("/health")).status_code == 200
            assert await engine.tokenize("hello")
            assert not all(one.done() for one in work)
            assert {answer.status_code for answer in await asyncio.gather(*work)} == {200}

    run(main())


def test_a_client_that_leaves_frees_its_slot(harness: Harness, workdir: Path) -> None:
    """Generation stops when the stream's reader disconnects: far fewer tokens are made than asked for."""

    async def main() -> None:
        asked = 900
        async with opened(replace(harness.slow, slots=1), workdir) as (engine, client):
            ids = await engine.apply_template(QUESTION)
            body = {"prompt": ids, "max_tokens": asked, "ignore_eos": True, "stream": True, "temperature": 0}
            async with client_of(engine) as leaver, leaver.stream("POST", PATH, json=body) as response:
                lines = response.aiter_lines()
                while not (await anext_(lines)).startswith("data: "):
                    pass
            after = {"prompt": ids, "max_tokens": 2, "ignore_eos": True, "temperature": 0}
            assert (await client.post("/v1/completions", json=after)).status_code == 200
            assert harness.predicted_tokens((await client.get("/metrics")).text) < asked / 2

    run(main())


async def anext_(lines: AsyncIterator[str]) -> str:
    async for line in lines:
        return line
    raise AssertionError("the stream ended before its first event")


def test_score_is_teacher_forced(harness: Harness, workdir: Path) -> None:
    """Scoring the engine's own greedy answer finds each token to be the argmax; others score lower."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, client):
            prompt = await engine.apply_template(QUESTION)
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
            text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            answer = await engine.tokenize(text)
            score = await engine.score([*prompt, *answer], start=len(prompt), top_k=3)
            assert score.start == len(prompt)
            assert list(score.greedy_ids) == answer
            assert score.logprobs == score.greedy_logprobs
            assert max(score.logprobs) <= 0
            for row, greedy, value in zip(score.top, score.greedy_ids, score.greedy_logprobs, strict=True):
                assert row[0] == (greedy, pytest.approx(value))
                assert [other for _, other in row] == sorted((other for _, other in row), reverse=True)
            other = await engine.tokenize("zebra quantum!")
            worse = await engine.score([*prompt, *other], start=len(prompt))
            assert worse.mean_nll > score.mean_nll
            assert worse.top == ()
            assert await engine.score([*prompt, *answer], start=len(prompt), top_k=3) == score

    run(main())


def test_tokens_that_are_no_whole_characters_are_scored_like_any_other(
    harness: Harness, workdir: Path
) -> None:
    """Byte-level vocabularies cut rare characters into pieces; a golden pack's text has some."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, _):
            tokens = await engine.tokenize("the ferry Åland, 東京, 🙂!")
            score = await engine.score(tokens, top_k=2)
            assert len(score.logprobs) == len(tokens) - 1
            assert all(value <= 0 for value in score.logprobs)
            best = zip(score.logprobs, score.greedy_logprobs, strict=True)
            assert all(value <= greedy + 1e-3 for value, greedy in best)
            assert all(len(row) == 2 for row in score.top)

    run(main())


def test_score_refuses_what_it_cannot_score(harness: Harness, workdir: Path) -> None:
    """Too long, too short, unknown tokens and a wrong start are usage errors, and the engine lives on."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, _):
            vocabulary = (await engine.properties()).vocab_tokens
            wrong_ids = (([5] * 600, 1), ([5], 1), ([5, vocabulary], 1), ([5, -1], 1))
            for ids, start in (*wrong_ids, ([5, 6], 2), ([5, 6], 0)):
                with pytest.raises(UsageError):
                    await engine.score(ids, start=start)
            assert len((await engine.score([5, 6, 7])).logprobs) == 2

    run(main())


def test_tokens_round_trip(harness: Harness, workdir: Path) -> None:
    """Text survives tokenising, and a template ends where the assistant speaks."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, _):
            text = "Zwölf Boxkämpfer, 3 < 4 — ok?"
            assert await engine.detokenize(await engine.tokenize(text)) == text
            rendered = await engine.detokenize(await engine.apply_template(QUESTION))
            assert "Name three colours." in rendered
            assert rendered.endswith("<|im_start|>assistant\n")

    run(main())


def test_embeddings_when_asked_for(harness: Harness, workdir: Path) -> None:
    """An engine with embeddings gives unit vectors and still chats; one without says so."""
    can = harness.runtime.capabilities
    assert can.embeddings == can.embeddings_with_chat

    async def main() -> None:
        if not can.embeddings:
            with pytest.raises(UsageError, match="embeddings are not supported"):
                await harness.runtime.start(replace(harness.spec, embeddings=True), workdir)
        else:
            await with_embeddings()
        async with opened(harness.spec, workdir) as (engine, client):
            with pytest.raises(UsageError, match="embeddings"):
                await engine.embed(["hello"])
            response = await client.post("/v1/embeddings", json={"input": ["hello"]})
            assert response.status_code == 501

    async def with_embeddings() -> None:
        async with opened(replace(harness.spec, embeddings=True), workdir) as (engine, client):
            rows = await engine.embed(["turn on the lamp", "switch the lamp on", "a stock market crash"])
            assert len(rows) == 3
            for row in rows:
                assert sum(value * value for value in row) == pytest.approx(1.0, abs=1e-3)
            assert rows[0] != rows[1]
            assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200

    run(main())


@pytest.mark.parametrize("how", ["truncated", "foreign"])
def test_a_broken_file_is_a_named_error(harness: Harness, workdir: Path, tmp_path: Path, how: str) -> None:
    """A file that is no model, or half of one, gives RuntimeLoadError and leaves nothing behind."""
    path = harness.broken(tmp_path, how)

    async def main() -> None:
        with pytest.raises(RuntimeLoadError) as caught:
            async with open_engine(
                replace(harness.spec, model_path=path), workdir=workdir, timeout_s=READY_S
            ):
                pass
        assert path.name in caught.value.message
        assert caught.value.hint
        assert list(workdir.iterdir()) == []

    run(main())


def test_a_missing_file_is_a_named_error(harness: Harness, workdir: Path) -> None:
    """A path that does not exist is refused before anything is spawned."""

    async def main() -> None:
        with pytest.raises(RuntimeLoadError, match=r"absent\.bin"):
            await harness.runtime.start(replace(harness.spec, model_path=workdir / "absent.bin"), workdir)

    run(main())


def test_stop_leaves_nothing(harness: Harness, workdir: Path) -> None:
    """After stop there is no process, no socket and no thread of ours on its pipe; stop may be repeated."""

    async def main() -> None:
        engine = await harness.runtime.start(harness.spec, workdir)
        await engine.wait_ready(READY_S)
        assert engine.alive()
        assert engine.socket_path.is_socket()
        await engine.stop()
        assert not engine.alive()
        assert engine.exit_code() is not None
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)
        assert list(workdir.iterdir()) == []
        assert engine.rss_bytes() == 0 < engine.peak_rss_bytes()
        await engine.stop()

    run(main())


def test_stop_in_the_middle_of_work(harness: Harness, workdir: Path) -> None:
    """Stopping does not wait for a generation that is under way."""

    async def main() -> None:
        engine = await harness.runtime.start(harness.slow, workdir)
        await engine.wait_ready(READY_S)
        async with client_of(engine) as client:
            body = chat_body(stream=True, max_tokens=1500)
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                await engine.stop()
        assert not engine.alive()

    run(main())


def test_a_killed_child_is_seen(harness: Harness, workdir: Path) -> None:
    """After SIGKILL `alive` is False, questions end in a named error, and stop cleans up."""

    async def main() -> None:
        engine = await harness.runtime.start(harness.spec, workdir)
        await engine.wait_ready(READY_S)
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: not engine.alive())
        assert engine.exit_code() == -signal.SIGKILL
        with pytest.raises(SlmopsError):
            await engine.score([5, 6, 7])
        await engine.stop()
        assert list(workdir.iterdir()) == []

    run(main())


def test_a_crash_in_the_middle_of_a_stream_is_seen(harness: Harness, workdir: Path) -> None:
    """The reader's stream breaks off without its end mark, and the engine is known to be dead."""

    async def main() -> None:
        async with opened(harness.slow, workdir) as (engine, client):
            lines: list[str] = []
            body = chat_body(stream=True, max_tokens=900, ignore_eos=True)
            with pytest.raises(httpx.TransportError):
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        lines.append(line)
                        if len(lines) == 3:
                            os.kill(engine.pid, signal.SIGKILL)
            assert "data: [DONE]" not in lines
            await until(lambda: not engine.alive())
            assert not await engine.healthy(5.0)

    run(main())


def test_a_hang_is_told_from_work(harness: Harness, workdir: Path) -> None:
    """A working engine answers in the middle of a prompt; one that stands still does not, and can still be stopped."""

    async def main() -> None:
        engine = await harness.runtime.start(harness.slow, workdir)
        await engine.wait_ready(READY_S)
        async with client_of(engine) as client:
            body = chat_body(messages=[{"role": "user", "content": harness.long_text}], max_tokens=2)
            work = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            assert await engine.healthy(30.0)
            stand_still(engine.pid)
            assert not await engine.healthy(0.3)
            assert engine.alive()
            os.kill(engine.pid, signal.SIGCONT)
            assert (await work).status_code == 200
            assert await engine.healthy(30.0)
        stand_still(engine.pid)
        await engine.stop(grace_s=0.1)
        assert not engine.alive()

    run(main())


def test_memory_is_given_back(harness: Harness, workdir: Path) -> None:
    """What an engine took is gone with its process: a second one starts from where the first did."""

    async def main() -> None:
        sizes = []
        for _ in range(2):
            async with opened(harness.spec, workdir) as (engine, client):
                await client.post("/v1/chat/completions", json=chat_body())
                sizes.append(engine.private_bytes())
            assert not Path(f"/proc/{engine.pid}").exists()
        assert sizes[1] == pytest.approx(sizes[0], rel=0.25)

    run(main())


@pytest.fixture
def orphan_maker(harness: Harness, workdir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts an engine, prints its pid, and waits."""
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from slmops.runtimes import EngineSpec, load

        async def main():
            runtime, model, kv_cache, workdir = sys.argv[1:]
            spec = EngineSpec(runtime, Path(model), context_tokens=512, kv_cache=kv_cache)
            engine = await load(runtime).start(spec, Path(workdir))
            await engine.wait_ready(120)
            print(engine.pid, flush=True)
            sys.stdin.read()

        asyncio.run(main())
        """
    )
    spec = harness.spec
    arguments = [spec.runtime, str(spec.model_path), spec.kv_cache, str(workdir)]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_killed_parent_leaves_no_engine(orphan_maker: subprocess.Popen[str]) -> None:
    """SIGKILL of the agent ends its engines: the kernel and the closed pipe both see to it."""
    assert orphan_maker.stdout is not None
    pid = int(orphan_maker.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    orphan_maker.kill()
    orphan_maker.wait()

    def gone() -> bool:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        return status.rpartition(")")[2].split()[0] in "ZX"  # a zombie waits for init, it runs no more

    run(until(gone))


def test_a_long_workdir_still_works(harness: Harness, tmp_path: Path) -> None:
    """A folder too deep for a socket's name gets its sockets elsewhere, and they go when the engine goes."""
    deep = tmp_path / ("d" * 100) / "engine"
    deep.mkdir(parents=True)

    async def main() -> None:
        engine = await harness.runtime.start(harness.spec, deep)
        try:
            await engine.wait_ready(READY_S)
            assert engine.socket_path.parent != deep
            assert len(await engine.tokenize("hello")) > 0
        finally:
            await engine.stop()
        assert not engine.socket_path.parent.exists()

    run(main())


def test_stale_sockets_do_not_stop_a_start(harness: Harness, workdir: Path) -> None:
    """What a killed engine left in the folder is replaced."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(workdir / "engine.sock"))
    (workdir / "score.sock").touch()

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            assert (await client.get("/health")).status_code == 200

    run(main())


def test_limits_say_how_they_are_enforced(harness: Harness, workdir: Path) -> None:
    """Every limit that was asked for is reported with its mechanism, and the child really carries it."""
    limits = EngineLimits(memory_bytes=2 << 30, cpu_cores=1.5, nice=3)

    async def main() -> None:
        engine = await harness.runtime.start(harness.spec, workdir, limits)
        try:
            await engine.wait_ready(READY_S)
            applied = {one.limit: one.mechanism for one in engine.limits_applied}
            assert set(applied) == {"memory_bytes", "cpu_cores", "nice"}
            assert os.getpriority(os.PRIO_PROCESS, engine.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 3
            if applied["memory_bytes"] == "rlimit":
                lines = Path(f"/proc/{engine.pid}/limits").read_text().splitlines()
                (line,) = [line for line in lines if line.startswith("Max data size")]
                assert line.split()[3] == str(2 << 30)
            else:
                assert "slmops-engine" in Path(f"/proc/{engine.pid}/cgroup").read_text()
        finally:
            await engine.stop()

    run(main())


def test_bench_measures_the_child(harness: Harness, workdir: Path) -> None:
    """The bench gives positive speeds and the memory of the very process that served."""

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, _):
            result = await bench_engine(engine, prompt_tokens=32, decode_tokens=8, repeats=2)
            assert min(result.prefill_tps, result.decode_tps, result.ttft_s) > 0
            assert result.peak_rss_bytes == engine.peak_rss_bytes()
            assert len(result.repeats) == 2
            with pytest.raises(UsageError):
                await bench_engine(engine, prompt_tokens=510, decode_tokens=8)

    run(main())


def test_depths_are_measured_or_said_to_be_impossible(harness: Harness) -> None:
    """One form for every runtime: speeds at each depth that fits, a reason at one that does not, memory in two parts."""

    async def main() -> None:
        asked = {"depths_tokens": (0, 256, 2048), "prompt_tokens": 64, "decode_tokens": 8, "repeats": 2}
        found = await bench_depths(replace(harness.spec, batch_tokens=64), **asked)  # type: ignore[arg-type]
        shallow, deep, beyond = found.depths
        for one in (shallow, deep):
            assert min(one.prefill_tps, one.decode_tps, one.ttft_s, one.busy_ratio) >= 0
            assert len(one.repeats) == 2
        assert "not measured: needs 2120 tokens" in beyond.reason
        assert not beyond.repeats
        assert found.peak_rss_bytes >= found.anonymous_bytes > 0
        assert found.file_backed_bytes > 0
        assert (found.energy_j is None) == found.energy.startswith("not measured")
        assert json.loads(found.to_json())["depths"][2]["reason"] == beyond.reason
        if harness.spec.runtime != FAKE_RUNTIME:
            assert all(run.cached_tokens >= 192 for run in deep.repeats)  # whole pieces of 64
            assert all(run.cached_tokens == 0 for run in shallow.repeats)

    run(main())


def test_unknown_runtimes_are_named_errors() -> None:
    """A wrong name says what there is; a wrong target says what it is not."""
    with pytest.raises(NotFoundError, match=r"llama\.cpp"):
        load("llama.cp")
    with pytest.raises(NotFoundError):
        load("slmops.testing.engine:NoSuchRuntime")
    with pytest.raises(NotFoundError, match="expected a slmops"):
        load("pathlib:PurePath")
