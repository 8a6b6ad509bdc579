"""What a runtime declares is what it does: every declared field has a proof here, and every other one is refused or named.

The capability matrix (docs/reference/runtimes.md, ``/v1/models/{id}``) is made from the declarations; this suite makes them true.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.test_engine_contract import (  # noqa: F401 - fixtures
    Harness,
    harness,
    opened,
    run,
    workdir,
)
from tests.support.tiny_model import make_tiny_adapter, make_tiny_gguf

from slmops.agent.gateway.requests import (
    HARMLESS,
    MEANINGFUL,
    BadRequest,
    parse_chat,
    parse_completion,
    parse_embeddings,
)
from slmops.core.device.fit import RUNTIME_MEMORY
from slmops.core.errors import UsageError
from slmops.runtimes import AdapterSpec, Capabilities, EngineSpec
from slmops.runtimes.external.llama_server import llama_server
from slmops.runtimes.matrix import matrix_of, matrix_table
from slmops.runtimes.registry import BUILT_IN, DECLARED_BY_OWNER, load, load_unchecked
from slmops.testing.engine import FAKE_RUNTIME

ROOT = Path(__file__).parents[2]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTION = "Name three colours."
#: `external` declares what its owner says, and proves it at load: here, that it is llama.cpp's own server
DECLARED = sorted(BUILT_IN)
WILD = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Ask:
    """One engine, asked by one route."""

    def __init__(
        self, client: httpx.AsyncClient, route: str, declared: frozenset[str], prompt: list[int]
    ) -> None:
        self.client, self.route, self.declared, self.prompt = client, route, declared, prompt

    def body(self, **fields: Any) -> dict[str, Any]:
        """A request; fields of a wild temperature that the runtime does not have are left out."""
        base: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
        asked: Any = [{"role": "user", "content": QUESTION}]
        base |= {"messages": asked} if self.route == CHAT else {"prompt": self.prompt}
        return {
            name: value
            for name, value in (base | fields).items()
            if name not in WILD or name in self.declared
        }

    async def answer(self, **fields: Any) -> dict[str, Any]:
        response = await self.client.post(self.route, json=self.body(**fields))
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def text(self, **fields: Any) -> str:
        return self.text_of((await self.answer(**fields))["choices"][0])

    def text_of(self, choice: dict[str, Any]) -> str:
        return str(choice["message"]["content"] if self.route == CHAT else choice["text"])

    async def events(self, **fields: Any) -> list[dict[str, Any]]:
        body = self.body(stream=True, **fields)
        async with self.client.stream("POST", self.route, json=body) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


Proof = Callable[[Ask], Awaitable[None]]


async def accepted(ask: Ask) -> None:
    await ask.answer(user="someone", model="anything")


async def answers_the_prompt(ask: Ask) -> None:
    other = [{"role": "user", "content": "Count."}]
    prompt = {"messages": other} if ask.route == CHAT else {"prompt": "xyz"}
    assert await ask.text(**prompt) != await ask.text()


async def limits_tokens(ask: Ask) -> None:
    answer = await ask.answer(max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


async def limits_completion_tokens(ask: Ask) -> None:
    answer = await ask.answer(max_tokens=None, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


async def is_greedy_at_zero(ask: Ask) -> None:
    assert len({await ask.text(seed=seed) for seed in (1, 2, 3)}) == 1


async def seeds_repeat(ask: Ask) -> None:
    texts = [await ask.text(**WILD, seed=seed) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    if "top_k" in ask.declared:  # a scripted model says one thing whatever the seed
        assert len(set(texts)) == 3


def narrows(**fields: float) -> Proof:
    async def proof(ask: Ask) -> None:
        wide = WILD | {"seed": 7}
        assert await ask.text(**wide) != await ask.text(**(wide | fields)) == await ask.text()

    return proof


async def narrows_scripted_or_real(ask: Ask) -> None:
    if "top_k" in ask.declared:
        await narrows(top_p=1e-6)(ask)
    else:
        assert await ask.text(top_p=0.5) == await ask.text()


def penalises(name: str) -> Proof:
    async def proof(ask: Ask) -> None:
        assert await ask.text(**{name: 100.0}) != await ask.text()

    return proof


async def biases(ask: Ask) -> None:
    answer = await ask.text(max_tokens=1)
    response = await ask.client.post("/tokenize", json={"content": answer})
    (first, *_) = response.json()["tokens"]
    assert not (await ask.text(logit_bias={str(first): -100})).startswith(answer)


async def stops(ask: Ask) -> None:
    whole = await ask.text()
    stop = whole[4:9]  # in the middle of words, across tokens' borders
    answer = await ask.answer(stop=[stop, "never said"])
    assert ask.text_of(answer["choices"][0]) == whole[: whole.find(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    streamed = [event["choices"][0] for event in await ask.events(stop=stop) if event["choices"]]
    said = [one.get("text") if ask.route == PLAIN else one["delta"].get("content") for one in streamed]
    assert "".join(part or "" for part in said) == whole[: whole.find(stop)]


async def streams(ask: Ask) -> None:
    events = await ask.events()
    said = [
        e["choices"][0].get("text") if ask.route == PLAIN else e["choices"][0]["delta"].get("content")
        for e in events
    ]
    assert "".join(part or "" for part in said) == await ask.text()
    assert len(events) > 3


async def streams_usage(ask: Ask) -> None:
    *_, last = await ask.events(stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] > 0
    if (
        ask.route == CHAT
    ):  # llama.cpp puts the usage of plain completions into the last part, asked for or not
        assert last["choices"] == []
        assert not any(event.get("usage") for event in await ask.events())


async def gives_logprobs(ask: Ask) -> None:
    if ask.route == CHAT:
        choice = (await ask.answer(logprobs=True, top_logprobs=2, max_tokens=4))["choices"][0]
        rows = choice["logprobs"]["content"]
        assert len(rows) == 4
        for row in rows:
            assert row["logprob"] <= 0
            assert len(row["top_logprobs"]) == 2
            assert row["top_logprobs"][0]["token"] == row["token"]  # greedy
        assert "".join(row["token"] for row in rows) == ask.text_of(choice)
    else:
        choice = (await ask.answer(logprobs=2, max_tokens=4))["choices"][0]
        assert choice["logprobs"]
    assert not (await ask.answer(max_tokens=4))["choices"][0].get("logprobs")


def holds_form(fields: dict[str, Any]) -> Proof:
    async def proof(ask: Ask) -> None:
        value = json.loads(await ask.text(max_tokens=200, **fields))
        assert value["on"] in (True, False)

    return proof


SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


async def holds_grammar(ask: Ask) -> None:
    assert await ask.text(grammar='root ::= "yes" | "no"') in ("yes", "no")


async def goes_on_after_the_end(ask: Ask) -> None:
    assert (await ask.answer(ignore_eos=True, max_tokens=90))["usage"]["completion_tokens"] == 90


async def gives_several(ask: Ask) -> None:
    assert len((await ask.answer(n=2))["choices"]) == 2


#: field to its proof; a text names the test that proves it, because it needs an engine of its own
PROOFS: dict[str, Proof | str] = {
    "chat_template_kwargs": "tests/contract/test_capabilities.py::test_template_variables_reach_the_template",
    "frequency_penalty": penalises("frequency_penalty"),
    "grammar": holds_grammar,
    "ignore_eos": goes_on_after_the_end,
    "json_schema": holds_form({"json_schema": SCHEMA}),
    "logit_bias": biases,
    "logprobs": gives_logprobs,
    "lora": "tests/contract/test_capabilities.py::test_an_adapters_scale_is_chosen_by_the_request",
    "max_completion_tokens": limits_completion_tokens,
    "max_tokens": limits_tokens,
    "messages": answers_the_prompt,
    "min_p": narrows(min_p=1.0),
    "model": accepted,
    "n": gives_several,
    "parallel_tool_calls": "tests/contract/test_capabilities.py::test_tools_reach_the_template",
    "presence_penalty": penalises("presence_penalty"),
    "prompt": answers_the_prompt,
    "repeat_penalty": penalises("repeat_penalty"),
    "response_format": holds_form(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
    ),
    "seed": seeds_repeat,
    "stop": stops,
    "stream": streams,
    "stream_options": streams_usage,
    "temperature": is_greedy_at_zero,
    "tool_choice": "tests/contract/test_capabilities.py::test_tools_reach_the_template",
    "tools": "tests/contract/test_capabilities.py::test_tools_reach_the_template",
    "top_k": narrows(top_k=1),
    "top_logprobs": gives_logprobs,
    "top_p": narrows_scripted_or_real,
    "user": accepted,
}


def declared(name: str) -> Capabilities:
    """Read without its binding: what it declares does not hang on what is installed."""
    if name in DECLARED_BY_OWNER:
        return llama_server().capabilities()
    return load_unchecked(name).capabilities


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_every_declared_field_is_honoured(harness: Harness, workdir: Path, route: str) -> None:  # noqa: F811
    """Each proof changes one field and sees its meaning in the answer; all failures are told together."""
    can = harness.runtime.capabilities
    fields = can.chat_fields if route == CHAT else can.completion_fields
    failures: dict[str, str] = {}

    async def main() -> None:
        async with opened(harness.spec, workdir) as (engine, client):
            prompt = await engine.apply_template([{"role": "user", "content": QUESTION}])
            ask = Ask(client, route, fields, prompt)
            for name in sorted(fields):
                proof = PROOFS[name]
                if isinstance(proof, str):
                    continue
                try:
                    await proof(ask)
                except (AssertionError, ValueError, KeyError) as failed:
                    failures[name] = f"{type(failed).__name__}: {str(failed)[:300]}"

    run(main())
    assert failures == {}


def test_template_variables_reach_the_template(harness: Harness, workdir: Path) -> None:  # noqa: F811
    """``chat_template_kwargs`` are variables of the template, also of one that the spec gives."""
    if "chat_template_kwargs" not in harness.runtime.capabilities.chat_fields:
        pytest.skip("this runtime does not declare chat_template_kwargs")
    template = "{{ greeting }}{% for m in messages %}{{ m['content'] }}{% endfor %}"

    async def main() -> None:
        async with opened(replace(harness.spec, chat_template=template), workdir) as (_, client):
            sizes = []
            for greeting in ("", "Good morning to you! "):
                body = {
                    "messages": [{"role": "user", "content": "hello"}],
                    "max_tokens": 1,
                    "chat_template_kwargs": {"greeting": greeting},
                }
                sizes.append((await client.post(CHAT, json=body)).json()["usage"]["prompt_tokens"])
            assert sizes[1] > sizes[0]

    run(main())


def test_tools_reach_the_template(harness: Harness, workdir: Path) -> None:  # noqa: F811
    """A template that speaks of tools gets them, unless ``tool_choice`` is none."""
    if "tools" not in harness.runtime.capabilities.chat_fields:
        pytest.skip("this runtime does not declare tools")
    template = (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tool = {"name": "turn_on", "description": "light", "parameters": {"type": "object", "properties": {}}}

    async def main() -> None:
        async with opened(replace(harness.spec, chat_template=template), workdir) as (_, client):
            sizes = {}
            for choice in ("absent", "none", "auto"):
                body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
                if choice != "absent":
                    body |= {"tools": [{"type": "function", "function": tool}], "tool_choice": choice}
                    body["parallel_tool_calls"] = False
                sizes[choice] = (await client.post(CHAT, json=body)).json()["usage"]["prompt_tokens"]
            assert sizes["auto"] > sizes["absent"]

    run(main())


def test_an_adapters_scale_is_chosen_by_the_request(workdir: Path, tmp_path: Path) -> None:  # noqa: F811
    """``lora`` with scale 0 gives the base model's answer, with scale 1 another (llama.cpp)."""
    base = make_tiny_gguf(tmp_path / "base.gguf", seed=3)
    adapter = AdapterSpec(make_tiny_adapter(tmp_path / "adapter.gguf", size=0.5))
    spec = EngineSpec("llama.cpp", base, context_tokens=256, slots=1)

    async def texts(spec: EngineSpec, scales: list[float | None]) -> list[str]:
        said = []
        async with opened(spec, workdir) as (_, client):
            for scale in scales:
                body: dict[str, Any] = {
                    "prompt": "Hello",
                    "max_tokens": 16,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                body |= {} if scale is None else {"lora": [{"id": 0, "scale": scale}]}
                said.append((await client.post(PLAIN, json=body)).json()["choices"][0]["text"])
        return said

    async def main() -> None:
        (plain,) = await texts(spec, [None])
        off, on = await texts(replace(spec, adapters=(adapter,)), [0.0, 1.0])
        assert off == plain != on

    run(main())


@pytest.mark.parametrize("runtime", DECLARED)
def test_every_declared_field_has_a_proof(runtime: str) -> None:
    """A field cannot enter the matrix without a proof; a proof that lives elsewhere exists there."""
    can = declared(runtime)
    assert can.chat_fields | can.completion_fields <= set(PROOFS)
    for proof in PROOFS.values():
        if isinstance(proof, str):
            path, _, name = proof.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("runtime", DECLARED)
def test_what_is_not_declared_is_refused_by_name_or_named(runtime: str) -> None:
    """The gateway refuses what would change the answer, with the runtime and the field, and names the rest in a header."""
    can = declared(runtime)
    values: dict[str, Any] = {
        "tools": [],
        "logprobs": True,
        "tool_choice": "auto",
        "logit_bias": {},
        "response_format": None,
    }
    everything = set(PROOFS) | MEANINGFUL
    for route, fields in ((CHAT, can.chat_fields), (PLAIN, can.completion_fields)):
        for name in sorted(everything - fields - {"messages", "prompt", "n", "max_completion_tokens"}):
            value = values.get(name) or (
                1 if name.endswith(("_k", "_p", "penalty", "logprobs")) else {"type": "text"}
            )
            value = "x" if name in ("grammar", "tool_choice", "suffix") else [] if name == "tools" else value
            body: dict[str, Any] = {"model": "m", name: value}

            def parse(body: dict[str, Any] = body, route: str = route) -> Any:
                if route == CHAT:
                    asked = {"messages": [{"role": "user", "content": "a"}], **body}
                    return parse_chat(asked, can, "", runtime)
                return parse_completion({"prompt": "a", **body}, can, runtime)

            if name in MEANINGFUL:
                with pytest.raises(BadRequest) as refused:
                    parse()
                assert refused.value.param == name
                if refused.value.code == "unsupported_parameter":
                    assert runtime in refused.value.message
                    assert name in refused.value.message
            elif name not in HARMLESS:
                assert name in parse().ignored


@pytest.mark.parametrize("runtime", DECLARED)
def test_embeddings_are_given_or_refused_by_name(runtime: str) -> None:
    can = declared(runtime)
    if can.embeddings and can.embeddings_with_chat:
        assert parse_embeddings({"input": "a"}, can, runtime) == (["a"], "float")
    else:
        with pytest.raises(BadRequest, match=f"not supported by this device's runtime \\({runtime}\\)"):
            parse_embeddings({"input": "a"}, can, runtime)


def test_a_spec_beyond_the_capabilities_is_refused(harness: Harness, workdir: Path, tmp_path: Path) -> None:  # noqa: F811
    """KV cache types, adapters and embeddings that a runtime does not declare never reach a child."""
    can = harness.runtime.capabilities

    async def refused(**fields: Any) -> None:
        with pytest.raises(UsageError) as caught:
            await harness.runtime.start(replace(harness.spec, **fields), workdir)
        assert list(workdir.iterdir()) == []
        assert caught.value.hint

    async def main() -> None:
        if harness.spec.runtime != FAKE_RUNTIME:  # the fake allocates nothing, whatever the type
            await refused(kv_cache="no_such_type")
        if not can.adapters:
            await refused(adapters=(AdapterSpec(tmp_path / "a.gguf"),))
        if not can.embeddings:
            await refused(embeddings=True)

    asyncio.run(main())


def test_unknown_fields_are_refused_by_the_engine_too(harness: Harness, workdir: Path) -> None:  # noqa: F811
    """A client on the engine's own socket meets a 400 with the field's name (engines of the common child)."""
    if harness.spec.runtime in (FAKE_RUNTIME, "llama.cpp"):
        pytest.skip("this engine leaves the refusal to the gateway")

    async def main() -> None:
        async with opened(harness.spec, workdir) as (_, client):
            body = {"messages": [{"role": "user", "content": "a"}], "tools": [], "dry_multiplier": 0.8}
            response = await client.post(CHAT, json=body)
            assert response.status_code == 400
            assert "dry_multiplier" in response.json()["error"]["message"]

    run(main())


def test_the_matrix_shows_every_difference() -> None:
    """One row for each field that any runtime has; a runtime without it shows a dash."""
    runtimes = {name: declared(name) for name in DECLARED}
    table = matrix_table(runtimes)
    assert table.splitlines()[0].count("|") == len(runtimes) + 2
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines()[2:]}
    at = list(runtimes).index("onnxruntime-genai")
    assert rows["`/v1/chat/completions` `tools`"][at].strip() == "–"
    assert rows["`/v1/chat/completions` `grammar`"][at].strip() == "yes"
    assert rows["`embeddings`"][at].strip() == "–"
    assert matrix_of(runtimes["executorch"])["max_slots"] == 1
    assert load(FAKE_RUNTIME).capabilities.kv_cache_for("q8_0") == "q8_0"
    assert runtimes["executorch"].kv_cache_for("q8_0") == "f32"


def test_admission_counts_the_cache_that_a_runtime_makes() -> None:
    """The arithmetic's fixed KV type and number of conversations are those that the adapter declares."""
    for name in set(DECLARED) & set(RUNTIME_MEMORY):
        can, how = declared(name), RUNTIME_MEMORY[name]
        assert how.kv_type == (next(iter(can.kv_cache_types)) if len(can.kv_cache_types) == 1 else None)
        assert how.max_parallel == can.max_slots
