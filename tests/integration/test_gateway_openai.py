"""The device's API as the official ``openai`` client sees it, with the real engine and the real small model."""

from __future__ import annotations

import asyncio
import json
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from slmops.artifact.gguf_layout import parse_gguf
from slmops.protocol.messages import ServingSettings
from slmops.testing.agent_process import AgentProcess
from slmops.testing.control_plane import FakeControlPlane
from slmops.testing.releases import SignedReleases

pytestmark = [pytest.mark.model, pytest.mark.e2e]

SERVING = ServingSettings(
    context_tokens=256, kv_cache="q8_0", parallel=2, micro_batch_tokens=64, system_prompt="default"
)
QUESTIONS = {"What is the capital of France?": "The capital of France is Paris."}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def device(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    releases = SignedReleases(model="smol")
    with small_model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        shape = parse_gguf(content).shape()
    made = asyncio.run(
        releases.add(
            small_model,
            "1.0.0",
            QUESTIONS,
            runtime="llama.cpp",
            artifact_format="gguf",
            tolerance=0.5,
            prompts={"default": "You are brief."},
            shape={name: getattr(shape, name) for name in shape.__dataclass_fields__},
        )
    )
    with (
        FakeControlPlane(releases) as plane,
        AgentProcess(tmp_path_factory.mktemp("gateway") / "device", plane) as agent,
    ):
        agent.start()
        plane.assignment = made.assignment(1, serving=SERVING)
        plane.wait_for(lambda p: p.last is not None and p.last.phase == "committed", 120)
        yield agent


@pytest.fixture
def client(device: AgentProcess) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(base_url=device.url, api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


def test_lists_and_retrieves_its_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.models.retrieve("smol").owned_by == "slmops"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_chats_and_says_which_release_answered(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="smol", messages=QUESTION, max_tokens=24, temperature=0
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == "smol"
    assert raw.headers["X-Slmops-Release"].startswith("smol@1.0.0+")


def test_streams_what_it_would_have_answered(client: openai.OpenAI) -> None:
    """Greedy, so the stream's text equals the whole answer's; usage comes last when asked for."""
    whole = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reasons, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert len(reasons) == 1
    assert usage is not None and usage.completion_tokens > 0


def test_completes_plain_text_with_and_without_streaming(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smol", prompt="Once upon a", max_tokens=8, temperature=0)
    pieces = client.completions.create(
        model="smol", prompt="Once upon a", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in pieces if c.choices) == whole.choices[0].text != ""


def test_answers_in_the_form_of_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        max_tokens=60,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "capital", "schema": schema, "strict": True},
        },
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


def test_embeds_text(client: openai.OpenAI) -> None:
    """One unit vector for each text, near for near meanings (the client asks for base64 by default)."""
    vectors = [
        item.embedding
        for item in client.embeddings.create(
            model="smol", input=["a red car", "a red car", "stock exchange"]
        ).data
    ]
    assert abs(sum(x * x for x in vectors[0]) - 1) < 1e-3
    dot = [sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:]]
    assert dot[0] > 0.999 > dot[1]


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_400_and_never_cut(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="smol", messages=[{"role": "user", "content": "word " * 600}], stream=stream
        )
    assert caught.value.code == "context_length_exceeded"


def test_what_the_runtime_cannot_honour_is_refused_or_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smol", messages=QUESTION, n=2)
    assert caught.value.param == "n"
    raw = client.chat.completions.with_raw_response.create(
        model="smol", messages=QUESTION, max_tokens=2, extra_body={"made_up_field": 1}
    )
    assert raw.headers["X-Slmops-Ignored"] == "made_up_field"
    assert (
        "X-Slmops-Ignored"
        not in client.chat.completions.with_raw_response.create(
            model="smol", messages=QUESTION, max_tokens=2, user="u"
        ).headers
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "model"),
        (b'{"model": "smol"}', "messages"),
        (b'{"model": "smol", "messages": []}', "messages"),
    ],
)
def test_malformed_requests_get_an_openai_error(device: AgentProcess, body: bytes, param: str | None) -> None:
    response = httpx.post(f"{device.url}/chat/completions", content=body, trust_env=False)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_health_answers_during_a_long_prefill(device: AgentProcess, client: openai.OpenAI) -> None:
    base = device.url.removesuffix("/v1")
    done = threading.Event()

    def prefill() -> None:
        client.chat.completions.create(
            model="smol", messages=[{"role": "user", "content": "word " * 180}], max_tokens=1
        )
        done.set()

    thread = threading.Thread(target=prefill)
    thread.start()
    answered = 0
    while not done.is_set():
        response = httpx.get(f"{base}/health", timeout=5.0, trust_env=False)
        assert response.json()["status"] == "ok"
        answered += 1
    thread.join()
    assert answered > 0


def test_metrics_count_and_hold_nothing_of_a_prompt(device: AgentProcess, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "xyzzy-secret"}], max_tokens=2
    )
    text = httpx.get(device.url.removesuffix("/v1") + "/metrics", trust_env=False).text
    assert 'slmops_requests_total{route="chat",status="2xx"}' in text
    assert "gen_ai_server_request_duration_seconds_bucket" in text
    assert "xyzzy" not in text
    assert "xyzzy" not in device.text()


def test_a_client_that_hangs_up_frees_the_engine(device: AgentProcess, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    health = device.url.removesuffix("/v1") + "/health"
    for _ in range(200):
        if httpx.get(health, trust_env=False).json()["in_flight"] == 0:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the request of a client that is gone still runs")
