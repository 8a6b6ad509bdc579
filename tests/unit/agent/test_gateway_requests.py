"""What a client's request may say: values that nothing can honour are refused by name, never guessed at."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.agent.facts import rounded_disk
from slmops.agent.gateway.app import ignored_header
from slmops.agent.gateway.openai_errors import from_engine
from slmops.agent.gateway.requests import BadRequest, parse_chat, parse_completion
from slmops.runtimes.llama_cpp.adapter import CAPABILITIES

USER = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def chat(**fields: Any) -> dict[str, Any]:
    return parse_chat({"model": "m", "messages": USER, **fields}, CAPABILITIES, "").body


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
        {"response_format": {"type": "xml"}},
        {"response_format": "json_object"},
        {"tool_choice": "required"},
        {"tool_choice": "required", "tools": [TOOL]},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [TOOL]},
        {"tool_choice": "always", "tools": [TOOL]},
        {"tools": "x"},
        {"tools": [{}]},
        {"messages": [{"role": ["x"], "content": "a"}]},
        {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": ["x"]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"max_completion_tokens": 0},
        {"temperature": 99},
        {"temperature": "hot"},
        {"top_p": 1.1},
        {"presence_penalty": -3},
        {"stop": 5},
        {"stop": [1]},
        {"stream_options": "x"},
        {"json_schema": "x"},
        {"grammar": 1},
    ],
    ids=repr,
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        chat(**fields)
    assert refused.value.status == 400
    assert refused.value.param in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": SCHEMA},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"tool_choice": "auto", "tools": [TOOL]},
        {"tool_choice": "none"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
        {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, *USER]},
        {"max_tokens": 1, "temperature": 0, "top_p": 1, "seed": 7, "stop": ["x"], "top_k": -1},
        {"temperature": 2.0, "max_tokens": None},
    ],
    ids=repr,
)
def test_what_can_be_honoured_is_forwarded_as_it_is(fields: dict[str, Any]) -> None:
    assert {name: chat(**fields)[name] for name in fields} == fields


@pytest.mark.parametrize("prompt", ["Once", ["Once", "upon"], [1, 2], [[1], [2, 3]]])
def test_prompts_of_plain_completions(prompt: object) -> None:
    assert parse_completion({"model": "m", "prompt": prompt}, CAPABILITIES).body["prompt"] == prompt


@pytest.mark.parametrize("prompt", [None, "", [], [1, "a"], [True], [[]], [-1], {"a": 1}])
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(BadRequest, match="prompt"):
        parse_completion({"model": "m", "prompt": prompt}, CAPABILITIES)


def test_the_header_of_ignored_fields_stays_small() -> None:
    """A client may send thousands of fields of any length and any letters."""
    assert ignored_header(("made_up",)) == "made_up"
    names = (*(f"field_{i:05}" for i in range(5000)), "x" * 100, "ä", "line\nbreak")
    header = ignored_header(names)
    assert header.startswith("field_00000, ") and header.endswith("and 4987 more")
    assert len(header) < 1000 and header.isascii() and header.isprintable()


def test_what_an_engine_could_not_parse_is_the_clients_mistake() -> None:
    """Counted as the client's, not as a failed request of the device."""
    status, _ = from_engine(
        500, b'{"error": {"message": "Failed to parse tools: x", "type": "server_error"}}'
    )
    assert status == 400
    status, _ = from_engine(500, b'{"error": {"message": "out of memory", "type": "server_error"}}')
    assert status == 500


@pytest.mark.parametrize(
    ("free", "shown"),
    [(0, 0), (500_000, 500_000), (50 << 20, 50 << 20), ((200 << 20) + 5, 200 << 20), (1 << 30, 1 << 30)],
)
def test_little_free_disk_is_not_rounded_to_none(free: int, shown: int) -> None:
    assert rounded_disk(free) == shown
