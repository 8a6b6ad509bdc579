"""The runtime `external` around a small server that may misbehave: each failure has an error of its own, nothing outlives it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.core.errors import NotFoundError, RuntimeLoadError, SlmopsError, UsageError
from slmops.runtimes import EngineSpec, load, open_engine
from slmops.runtimes.connect import engine_client
from slmops.runtimes.external.config import ENVIRONMENT_VARIABLE, ExternalConfig, read_config
from slmops.runtimes.external.llama_server import llama_server
from slmops.runtimes.external.upstream import descendants, free_port, owns_port

READY_S = 60.0
SERVER = ["--model", "{model}", "--name", "{model_name}"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "tiny.gguf")


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *extra: str, **fields: Any) -> Path:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"answers": {"colours": "red green blue"}}), encoding="utf-8")
    where = ["--socket", "{socket}"] if "--tcp" not in extra else ["--port", "{port}"]
    given = [one for one in extra if one != "--tcp"]
    module = ["-m", "slmops.testing.openai_server"]
    config = {
        "command": [sys.executable, *module, *SERVER, *where, "--answers", str(answers), *given],
        "env": {
            "OPENAI_SERVER_KEY": "{api_key}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        "start_timeout_s": 30,
        **fields,
    }
    path = tmp_path / "external.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    return path


def spec_of(model: Path, **fields: Any) -> EngineSpec:
    return EngineSpec("external", model, context_tokens=500, **fields)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


async def until_gone(pid: int) -> None:
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        await asyncio.sleep(0.01)


def failure(model: Path, **fields: Any) -> str:
    """The message of a load that must fail; nothing may be left running."""

    async def main() -> str:
        with pytest.raises(RuntimeLoadError) as caught:
            async with open_engine(spec_of(model, **fields), timeout_s=READY_S):
                pass
        assert caught.value.hint
        return caught.value.message

    return asyncio.run(main())


@pytest.mark.parametrize("where", ["--socket", "--tcp"])
def test_a_plain_server_is_served(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Chat whole and streamed, with the key that only the supervisor knows; memory is the server's, too."""
    configure(tmp_path, monkeypatch, *(["--tcp"] if where == "--tcp" else []))

    async def main() -> None:
        async with (
            open_engine(spec_of(model), timeout_s=READY_S) as engine,
            engine_client(engine.socket_path) as client,
        ):
            assert (await client.get("/health")).json() == {"status": "ok"}
            answer = (await client.post("/v1/chat/completions", json=chat("colours?"))).json()
            assert answer["choices"][0]["message"]["content"] == "red green blue"
            assert answer["model"] == "tiny"
            streamed = await client.post("/v1/chat/completions", json=chat("colours?", stream=True))
            assert streamed.text.endswith("data: [DONE]\n\n")
            processes = descendants(engine.pid)
            assert len(processes) == 2
            assert engine.rss_bytes() > engine.private_bytes() > 0
            facts = await engine.properties()
            assert (facts.vocab_tokens, facts.n_layers, facts.context_tokens) == (267, 2, 500)
            assert facts.runtime_version == load("external").version()
            with pytest.raises(UsageError, match="gives no log-probabilities"):
                await engine.score([1, 2, 3])
            with pytest.raises(UsageError, match="no token ids"):
                await engine.tokenize("hello")
        for pid in processes:
            await until_gone(pid)

    asyncio.run(asyncio.wait_for(main(), READY_S))


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        ("exit", "ended with status 7 after .* before it answered: error: no such device: gpu0"),
        ("deaf", r"was not ready on .*server.sock within 1 s \(nobody listened there\): killed"),
        ("other", "it serves another model: another-model, not 'tiny'"),
        ("cut", "a prompt of more than 500 tokens is answered with 200, not refused"),
        ("wordy", "asked for 1 token it made 4: it ignores max_tokens"),
    ],
)
def test_each_failure_has_its_own_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behave: str, said: str
) -> None:
    configure(tmp_path, monkeypatch, "--behave", behave, start_timeout_s=1 if behave == "deaf" else 30)
    message = failure(model)
    assert message.startswith("external server for 'tiny.gguf': ")
    assert re.search(said, message), message


def test_a_missing_program_is_a_named_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its runtime is only looked at, as the agent does to report what it can start."""
    path = configure(tmp_path, monkeypatch)
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "command": ["/opt/no/such-server", *SERVER, "{port}"]}))
    with pytest.raises(RuntimeLoadError, match=r"'/opt/no/such-server' is not there"):
        load("external")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with pytest.raises(RuntimeLoadError, match="declares no external server"):
        load("external")


def test_a_late_server_is_waited_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tmp_path, monkeypatch, "--behave", "late")

    async def main() -> None:
        began_s = time.monotonic()
        async with open_engine(spec_of(model), timeout_s=0.1):  # the owner's longer time holds
            assert time.monotonic() - began_s >= 1.0

    asyncio.run(main())


def test_a_hanging_server_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine counts as dead, so that the agent starts it anew; its log says why and holds no prompt."""
    configure(tmp_path, monkeypatch, "--behave", "hang", hang_timeout_s=0.5)

    async def main() -> None:
        async with (
            open_engine(spec_of(model), timeout_s=READY_S) as engine,
            engine_client(engine.socket_path) as client,
        ):
            processes = descendants(engine.pid)
            with pytest.raises(httpx.TransportError):
                await client.post("/v1/chat/completions", json=chat("colours?"))
            while engine.alive():
                await asyncio.sleep(0.02)
            assert "did not answer /health within 0.5 s: it hangs, killed" in engine.log_tail()
            for pid in processes:
                await until_gone(pid)

    asyncio.run(asyncio.wait_for(main(), READY_S))


def test_no_prompt_stays_in_the_log(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that writes what it is asked does not get it into our log, unless its owner wants that."""

    async def log_after_a_question() -> str:
        async with (
            open_engine(spec_of(model), timeout_s=READY_S) as engine,
            engine_client(engine.socket_path) as client,
        ):
            for _ in range(2):  # the second answer comes after the first question was written
                await client.post("/v1/chat/completions", json=chat("my secret colours"))
            await asyncio.sleep(0.2)
            return engine.log_tail()

    configure(tmp_path, monkeypatch)
    assert "secret" not in asyncio.run(log_after_a_question())
    configure(tmp_path, monkeypatch, keep_log=True)
    assert "secret" in asyncio.run(log_after_a_question())


def test_a_wrapper_and_its_server_die_with_a_killed_parent(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the process that started the engine ends supervisor, wrapper script and server."""
    configure(tmp_path, monkeypatch, "--behave", "child")
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from slmops.runtimes import EngineSpec, load

        async def main():
            engine = await load("external").start(
                EngineSpec("external", Path(sys.argv[1]), context_tokens=500), Path(sys.argv[2])
            )
            await engine.wait_ready(60)
            print(engine.pid, flush=True)
            sys.stdin.read()

        asyncio.run(main())
        """
    )
    workdir = tmp_path / "work"
    workdir.mkdir()
    command = [sys.executable, "-c", program, str(model), str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        processes = descendants(pid)
        assert len(processes) == 3
        parent.kill()

    async def main() -> None:
        for one in processes:
            await until_gone(one)

    asyncio.run(asyncio.wait_for(main(), READY_S))


def test_a_killed_supervisor_takes_the_server_along(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, monkeypatch)

    async def main() -> None:
        async with open_engine(spec_of(model), timeout_s=READY_S) as engine:
            processes = descendants(engine.pid)
            os.kill(engine.pid, signal.SIGKILL)
            for pid in processes:
                await until_gone(pid)
            assert not engine.alive()

    asyncio.run(asyncio.wait_for(main(), READY_S))


def test_a_port_that_another_process_has_is_not_ours() -> None:
    """A stranger that took the port first is told from the server by who holds the listening socket."""
    port = free_port()
    program = f"import socket,sys; s=socket.create_server(('127.0.0.1',{port})); print('up',flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        assert owns_port([stranger.pid], port)
        assert not owns_port([os.getpid()], port)
        stranger.kill()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"command": []}, "command is empty"),
        ({"command": ["s", "--port", "{port}"]}, r"no \{model\}"),
        ({"command": ["s", "{model}"]}, r"either \{port\} or \{socket\}"),
        ({"command": ["s", "{model}", "{port}", "{socket}"]}, r"either \{port\} or \{socket\}"),
        ({"command": ["s", "{model}", "{port}", "{home}"]}, r"unknown placeholder \{home\}"),
        ({"command": ["{model}", "{port}"]}, "must not be a placeholder"),
        (
            {"command": ["s", "{model}", "{port}", "--api-key={api_key}"]},
            "everybody on the machine can read it",
        ),
        ({"command": "s -m {model}"}, "array"),
        ({"command": ["s", "{model}", "{port}"], "commnad": 1}, "commnad"),
        ({"command": ["s", "{model}", "{port}"], "schema": 99}, "schema 99 is newer"),
        ({"command": ["s", "{model}", "{port}"], "hang_timeout_s": -1}, "must be seconds"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    path = tmp_path / "external.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        read_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_config(tmp_path / "absent.json")


def test_a_release_cannot_add_arguments(model: Path) -> None:
    """Values stay inside the argument where the owner put them: no shell, no second filling, no options."""
    config = ExternalConfig(
        command=("sh", "--name={model_name}", "{model_name}", "{model}", "{port}"), like="openai"
    )
    values = {"model": "/m.gguf", "port": "1", "model_name": "a; rm -rf / {port} $(id)"}
    arguments = config.arguments(spec_of(model), values)
    assert arguments[1:] == ["--name=a; rm -rf / {port} $(id)", "a; rm -rf / {port} $(id)", "/m.gguf", "1"]
    with pytest.raises(UsageError, match="as an option"):
        config.arguments(spec_of(model), {**values, "model_name": "--rpc=evil:1"})


def test_what_is_not_declared_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KV-cache type, embeddings or a template that the server cannot be given: an error, not a shrug."""
    configure(tmp_path, monkeypatch)
    runtime = load("external")
    assert not runtime.capabilities.score
    assert "tools" not in runtime.capabilities.chat_fields
    for fields, said in (
        ({"kv_cache": "q8_0"}, "kv_cache"),
        ({"embeddings": True}, "no embeddings"),
        ({"chat_template": "{{ x }}"}, "chat template"),
        ({"slots": 0}, "slots"),
    ):
        with pytest.raises(UsageError, match=said):
            asyncio.run(runtime.start(spec_of(model, **fields), tmp_path))


def test_other_routes_are_not_reached(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the engine's surface passes: not a server's own administration."""
    configure(tmp_path, monkeypatch)

    async def main() -> None:
        async with (
            open_engine(spec_of(model), timeout_s=READY_S) as engine,
            engine_client(engine.socket_path) as client,
        ):
            for path, status in (("/slots", 404), ("/props", 404), ("/v1/models", 200)):
                assert (await client.get(path)).status_code == status
            embeddings = await client.post("/v1/embeddings", json={"input": ["a"]})
            assert embeddings.status_code == 501
            with pytest.raises(SlmopsError):
                await engine.embed(["a"])

    asyncio.run(main())


def test_the_howto_starts_the_server_that_the_matrix_shows(tmp_path: Path) -> None:
    """The file to copy is accepted, declares what docs/reference/runtimes.md says, and fills in the same values."""
    howto = Path(__file__).parents[3] / "docs" / "howto" / "bring-your-own-server.md"
    shown = howto.read_text(encoding="utf-8").split("```json")[1].split("```")[0]
    (tmp_path / "external.json").write_text(shown, encoding="utf-8")
    config, stock = read_config(tmp_path / "external.json"), llama_server()
    assert config.capabilities() == stock.capabilities()
    for placeholder in ("{kv_cache}", "{slots}", "{total_context_tokens}", "{max_requests}", "{socket}"):
        assert placeholder in config.command
        assert placeholder in stock.command
