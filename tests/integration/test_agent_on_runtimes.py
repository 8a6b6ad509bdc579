"""A whole agent on each runtime of the common child: fetch, prove by the golden pack, serve, refuse, outlive a hang, revert."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.standstill import stand_still

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes import load
from slmops.testing.agent_process import AgentProcess
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SERVING, MadeRelease, SignedReleases

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
]  # a hang is one after three unanswered questions: half a minute

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runtimes"
MODELS = {"onnxruntime-genai": "genai_config.json", "executorch": "model.pte"}
QUESTIONS = {"Name three colours.": "Red, green and blue."}
#: it asks for a KV cache type that these runtimes do not have: theirs is in the file
SETTINGS = SERVING


@pytest.fixture(scope="module", params=list(MODELS))
def runtime(request: pytest.FixtureRequest) -> str:
    try:
        load(request.param)
    except RuntimeLoadError as absent:
        pytest.skip(str(absent))
    return str(request.param)


def make(releases: SignedReleases, runtime: str, version: str, *, broken: bool = False) -> MadeRelease:
    folder, name = FIXTURES / runtime, MODELS[runtime]
    parts = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != name}
    if broken:
        parts["tokenizer.json"] = b"{}"
    shape = {
        "weights_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "parameters": 53_000,
        "layers": 1,
        "k_width": 32,
        "v_width": 32,
        "hidden": 64,
        "ffn": 128,
        "vocabulary": 259,
        "context_max_tokens": 1024,
    }
    return asyncio.run(
        releases.add(
            folder / name,
            version,
            QUESTIONS,
            runtime=runtime,
            shape=shape,
            parts=parts,
            golden_from=folder / name,
        )
    )


@pytest.fixture
def plane() -> Iterator[FakeControlPlane]:
    with FakeControlPlane(SignedReleases(model="colours")) as running:
        yield running


def ask(device: AgentProcess, path: str = "chat/completions", **fields: object) -> httpx.Response:
    body = {"model": "colours", "max_tokens": 30, "temperature": 0, **fields}
    if path == "chat/completions":
        body.setdefault("messages", [{"role": "user", "content": "Name three colours."}])
    return httpx.post(f"{device.url}/{path}", json=body, timeout=120, trust_env=False)


def test_an_agent_serves_refuses_and_reverts(runtime: str, plane: FakeControlPlane, tmp_path: Path) -> None:
    good, bad = make(plane.releases, runtime, "1.0.0"), make(plane.releases, runtime, "1.1.0", broken=True)
    with AgentProcess(tmp_path / "device", plane) as device:
        device.start()
        plane.assignment = good.assignment(1, serving=SETTINGS)
        digest = plane.assignment.assignment_digest
        plane.wait_for(
            lambda p: p.last is not None and p.last.phase == "committed" and p.last.running == digest, 120
        )
        answer = ask(device)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "Red, green and blue."
        assert answer.headers["x-slmops-release"].startswith("colours@1.0.0")

        card = httpx.get(f"{device.url}/models/colours", trust_env=False).json()["slmops"]
        assert card["runtime"] == runtime
        assert card["kv_cache"] == "f32"
        assert card["capabilities"]["embeddings"] is False
        assert "tools" not in card["capabilities"]["chat_fields"]

        tool = {"type": "function", "function": {"name": "f"}}
        for refused in (ask(device, tools=[tool]), ask(device, "embeddings", input="a")):
            assert refused.status_code == 400
            assert runtime in refused.json()["error"]["message"]
        long = ask(device, messages=[{"role": "user", "content": "word " * 2000}])
        assert long.status_code == 400
        assert long.json()["error"]["code"] == "context_length_exceeded"

        # a hang: the engine stands still, is ended and started again, and the request in it is answered
        (engine,) = device.engines()
        stand_still(engine)
        assert ask(device).json()["choices"][0]["message"]["content"] == "Red, green and blue."
        assert device.engines() != [engine]

        plane.assignment = bad.assignment(2, serving=SETTINGS)
        plane.wait_for(lambda p: p.last is not None and p.last.phase == "reverted", 120)
        assert ask(device).headers["x-slmops-release"].startswith("colours@1.0.0")
