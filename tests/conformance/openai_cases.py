"""What clients of OpenAI's API ask of a device: one case a field or behaviour, asked by three real clients.

A case asks for something whose effect can be seen in the answer. Its outcome is one of:

- ``honoured``: the effect is there; ``refused``: an error in OpenAI's shape that names the field;
- ``warned``: the answer came, and the header ``X-Slmops-Ignored`` names the field as dropped;
- ``silent``: the answer came without the effect and without a word. That is a fault, whatever the field is.

Needs ``openai``; ``litellm`` and ``langchain-openai`` (both MIT) for their cases, which are left out without them.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

QUESTION = [{"role": "user", "content": "Name three colours."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "turn_on",
        "description": "Turn a lamp on.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]},
    },
}
Act = Callable[["Clients"], bool]


@dataclass(frozen=True)
class Outcome:
    """How one case ended; ``words`` is the refusal's message or what was seen."""

    client: str
    case: str
    outcome: str
    words: str = ""


@dataclass(frozen=True)
class Case:
    """One thing that is asked; ``act`` tells whether its effect was seen."""

    client: str
    name: str
    act: Act


class Clients:
    """The clients on one device."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.http = httpx.Client(trust_env=False, timeout=180.0)
        self.openai = openai.OpenAI(base_url=url, api_key="none", http_client=self.http, max_retries=0)
        self.ignored = ""

    def close(self) -> None:
        self.http.close()

    def chat(self, **fields: Any) -> Any:
        """A whole answer; keeps the warning header."""
        asked = {"model": self.model, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **fields}
        extra = asked.pop("extra_body", None)
        raw = self.openai.chat.completions.with_raw_response.create(**asked, extra_body=extra)
        self.ignored = raw.headers.get("X-Slmops-Ignored", "")
        return raw.parse()

    def text(self, **fields: Any) -> str:
        return str(self.chat(**fields).choices[0].message.content)

    def completion(self, **fields: Any) -> Any:
        asked = {"model": self.model, "prompt": "Name three", "max_tokens": 8, "temperature": 0, **fields}
        raw = self.openai.completions.with_raw_response.create(**asked)
        self.ignored = raw.headers.get("X-Slmops-Ignored", "")
        return raw.parse()

    def lines(self, path: str, body: dict[str, Any]) -> list[str]:
        """A stream's lines as they are."""
        with self.http.stream("POST", f"{self.url}{path}", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise openai.APIStatusError(
                    response.json()["error"]["message"], response=response, body=response.json()
                )
            return [line for line in response.iter_lines() if line]

    def chat_lines(self, **fields: Any) -> list[dict[str, Any]]:
        body = {"model": self.model, "messages": QUESTION, "max_tokens": 6, "temperature": 0, "stream": True}
        lines = self.lines("/chat/completions", {**body, **fields})
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def raw_chat(self, **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **fields}
        response = self.http.post(f"{self.url}/chat/completions", json=body)
        self.ignored = response.headers.get("X-Slmops-Ignored", "")
        if response.status_code != 200:
            raise openai.APIStatusError(
                response.json()["error"]["message"], response=response, body=response.json()
            )
        return dict(response.json())


def cases() -> Iterator[Case]:
    """Every case whose client is installed."""
    for name, act in {**_CHAT, **_STREAMS, **_COMPLETIONS, **_EMBEDDINGS, **_RESPONSES, **_OTHER}.items():
        yield Case("openai", name, act)
    if importlib.util.find_spec("litellm"):
        for name, act in _LITELLM.items():
            yield Case("litellm", name, act)
    if importlib.util.find_spec("langchain_openai"):
        for name, act in _LANGCHAIN.items():
            yield Case("langchain-openai", name, act)


def run_case(case: Case, clients: Clients) -> Outcome:
    """Ask, and say how it ended; what is neither an answer nor an error of the API is raised."""
    clients.ignored = ""
    try:
        seen = case.act(clients)
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status not in (400, 404):
            raise
        words = getattr(error, "message", None) or str(error)
        with contextlib.suppress(AttributeError, TypeError, KeyError):
            words = error.body.get("message") or error.body["error"]["message"]  # type: ignore[attr-defined]
        return Outcome(case.client, case.name, "refused", str(words).splitlines()[0][:200])
    if seen:
        return Outcome(case.client, case.name, "honoured")
    if clients.ignored:
        return Outcome(case.client, case.name, "warned", f"X-Slmops-Ignored: {clients.ignored}")
    return Outcome(case.client, case.name, "silent")


# ---- chat -----------------------------------------------------------------------------------------------------------


def _stops(clients: Clients) -> bool:
    whole = clients.text()
    word = whole.split()[1][:3]
    stopped = clients.chat(stop=[word])
    return stopped.choices[0].finish_reason == "stop" and word not in stopped.choices[0].message.content


def _seed(clients: Clients) -> bool:
    def said(seed: int) -> str:
        return clients.text(temperature=1.5, seed=seed, max_tokens=16)

    first = said(1)
    return said(1) == first and any(said(seed) != first for seed in range(2, 8))


def _logprobs(clients: Clients) -> bool:
    content = clients.chat(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    best = [one.top_logprobs[0].logprob for one in content]
    return all(len(one.top_logprobs) == 3 and one.logprob <= 1e-3 for one in content) and all(
        math.isclose(one.logprob, top, abs_tol=1e-3) for one, top in zip(content, best, strict=True)
    )


def _bias(clients: Clients) -> bool:
    """A token that is made impossible does not come first any more."""
    plain = clients.chat(max_tokens=1).choices[0].message.content
    ids = {str(token): -100 for token in range(0, 1000)}
    return bool(clients.chat(max_tokens=1, logit_bias=ids).choices[0].message.content != plain or not plain)


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return set(json.loads(text)) == {"colour"}
    return False


def _schema(clients: Clients) -> bool:
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    return _is_json(clients.text(response_format=wanted, max_tokens=48))


def _json_object(clients: Clients) -> bool:
    answer = clients.chat(response_format={"type": "json_object"}, max_tokens=96)
    choice = answer.choices[0]
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(choice.message.content), dict)
    return choice.finish_reason == "length" and choice.message.content.lstrip().startswith("{")


def _tools_auto(clients: Clients) -> bool:
    """Tools are taken: the answer is a call in the right shape, or text."""
    message = clients.chat(tools=[TOOL], tool_choice="auto", max_tokens=64).choices[0].message
    calls = message.tool_calls or []
    return bool(message.content) or all(call.function.name == "turn_on" for call in calls)


def _forced(choice: Any) -> Act:
    def act(clients: Clients) -> bool:
        message = clients.chat(tools=[TOOL], tool_choice=choice, max_tokens=64).choices[0].message
        return bool(message.tool_calls) and message.tool_calls[0].function.name == "turn_on"

    return act


def _penalty(name: str) -> Act:
    def act(clients: Clients) -> bool:
        """Greedy text that repeats itself changes under a strong penalty."""
        asked = [{"role": "user", "content": "Say: la la la la la la la la la la la la"}]
        plain = clients.text(messages=asked, max_tokens=48)
        return clients.text(messages=asked, max_tokens=48, **{name: 2.0}) != plain

    return act


def _limits(name: str) -> Act:
    def act(clients: Clients) -> bool:
        body = {name: 2} if name == "max_tokens" else {"max_tokens": openai.omit, name: 2}
        answer = clients.chat(**body)
        return bool(answer.usage.completion_tokens == 2 and answer.choices[0].finish_reason == "length")

    return act


def _ignored(**fields: Any) -> Act:
    """The field has no effect that could be seen: it must be named or refused."""

    def act(clients: Clients) -> bool:
        clients.raw_chat(**fields)
        return False

    return act


def _accepted(**fields: Any) -> Act:
    """The field changes nothing in an answer by its nature: taking it is all that can be asked."""

    def act(clients: Clients) -> bool:
        return bool(clients.raw_chat(**fields)["choices"])

    return act


_CHAT: dict[str, Act] = {
    "chat: max_tokens": _limits("max_tokens"),
    "chat: max_completion_tokens": _limits("max_completion_tokens"),
    "chat: temperature 0 repeats": lambda c: c.text() == c.text(),
    "chat: top_p 0 takes the likeliest": lambda c: c.text(temperature=1.0, top_p=0.0001) == c.text(),
    "chat: seed": _seed,
    "chat: stop": _stops,
    "chat: n = 2": lambda c: len(c.chat(n=2).choices) == 2,
    "chat: presence_penalty": _penalty("presence_penalty"),
    "chat: frequency_penalty": _penalty("frequency_penalty"),
    "chat: logit_bias": _bias,
    "chat: logprobs, top_logprobs": _logprobs,
    "chat: response_format json_object": _json_object,
    "chat: response_format json_schema": _schema,
    "chat: tools, tool_choice auto": _tools_auto,
    "chat: tool_choice none": lambda c: (
        not c.chat(tools=[TOOL], tool_choice="none").choices[0].message.tool_calls
    ),
    "chat: tool_choice required": _forced("required"),
    "chat: tool_choice of one function": _forced({"type": "function", "function": {"name": "turn_on"}}),
    "chat: functions (old)": _ignored(functions=[TOOL["function"]]),
    "chat: reasoning_effort": _ignored(reasoning_effort="low"),
    "chat: modalities, audio": _ignored(modalities=["text", "audio"], audio={"voice": "a", "format": "wav"}),
    "chat: prediction": _ignored(prediction={"type": "content", "content": "Red"}),
    "chat: an unknown field": _ignored(no_such_field=1),
    "chat: image content": lambda c: bool(
        c.text(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        )
    ),
    "chat: text parts as content": lambda c: (
        c.text(messages=[{"role": "user", "content": [{"type": "text", "text": "Name three colours."}]}])
        == c.text()
    ),
    "chat: user, metadata, store": _accepted(user="u", metadata={"a": "b"}, store=False),
}


# ---- streams --------------------------------------------------------------------------------------------------------


def _stream_text(clients: Clients) -> bool:
    parts = clients.chat_lines(max_tokens=24)
    said = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
    return said == clients.text()


def _stream_finish(clients: Clients) -> bool:
    reasons = [c["finish_reason"] for part in clients.chat_lines() for c in part["choices"]]
    return reasons[-1] == "length" and not any(reasons[:-1])


def _stream_usage(clients: Clients) -> bool:
    parts = clients.chat_lines(stream_options={"include_usage": True})
    return parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 6


def _stream_done(clients: Clients) -> bool:
    body = {"model": clients.model, "messages": QUESTION, "max_tokens": 2, "stream": True}
    return clients.lines("/chat/completions", body)[-1] == "data: [DONE]"


def _stream_role(clients: Clients) -> bool:
    first = clients.chat_lines()[0]
    return (
        first["object"] == "chat.completion.chunk" and first["choices"][0]["delta"].get("role") == "assistant"
    )


_STREAMS: dict[str, Act] = {
    "stream: the parts make the whole answer": _stream_text,
    "stream: one finish_reason, in the last part": _stream_finish,
    "stream: first part carries the role": _stream_role,
    "stream: usage chunk when asked for": _stream_usage,
    "stream: no usage when not asked for": lambda c: not any(part.get("usage") for part in c.chat_lines()),
    "stream: ends with [DONE]": _stream_done,
}


# ---- completions, embeddings, responses -----------------------------------------------------------------------------


def _completion_logprobs(clients: Clients) -> bool:
    found = clients.completion(logprobs=2).choices[0].logprobs
    return found is not None and (bool(found.token_logprobs) or bool(getattr(found, "content", None)))


_COMPLETIONS: dict[str, Act] = {
    "completions: prompt as text": lambda c: bool(c.completion().choices[0].text),
    "completions: prompt as token ids": lambda c: bool(c.completion(prompt=[5, 6, 7]).choices[0].text),
    "completions: logprobs": _completion_logprobs,
    "completions: echo": lambda c: c.completion(echo=True).choices[0].text.startswith("Name three"),
    "completions: suffix": lambda c: bool(c.completion(suffix=" end").choices[0].text) and False,
    "completions: best_of": lambda c: bool(c.completion(best_of=2).choices[0].text) and False,
}


def _base64(clients: Clients) -> bool:
    asked = {"model": clients.model, "input": "a lamp"}
    plain = clients.openai.embeddings.create(**asked, encoding_format="float").data[0].embedding
    body = {**asked, "encoding_format": "base64"}
    coded = clients.http.post(f"{clients.url}/embeddings", json=body).json()["data"][0]["embedding"]
    raw = base64.b64decode(coded)
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    return len(values) == len(plain) and all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(values, plain, strict=True)
    )


def _embed(clients: Clients) -> bool:
    """Through the client's default, which asks for base64 and decodes it."""
    rows = clients.openai.embeddings.create(model=clients.model, input=["a lamp", "a dog"]).data
    return len(rows) == 2 and rows[0].embedding != rows[1].embedding


_EMBEDDINGS: dict[str, Act] = {
    "embeddings: a list of texts": _embed,
    "embeddings: base64 equals float": _base64,
    "embeddings: dimensions": lambda c: (
        len(c.openai.embeddings.create(model=c.model, input="a", dimensions=8).data[0].embedding) == 8
    ),
}


def _respond(clients: Clients, **fields: Any) -> Any:
    asked = {
        "model": clients.model,
        "input": "Name three colours.",
        "temperature": 0,
        "max_output_tokens": 24,
    }
    return clients.openai.responses.create(**{**asked, **fields})


def _response_text(clients: Clients) -> bool:
    answer = _respond(clients)
    return answer.output_text == clients.text() and answer.usage.output_tokens > 0


def _response_incomplete(clients: Clients) -> bool:
    answer = _respond(clients, max_output_tokens=2)
    return answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"


def _response_stream(clients: Clients) -> bool:
    events = list(_respond(clients, stream=True))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    numbers = [event.sequence_number for event in events]
    last = events[-1]
    return (
        events[0].type == "response.created"
        and last.type in ("response.completed", "response.incomplete")
        and numbers == list(range(len(events)))
        and said == last.response.output_text == clients.text()
    )


def _response_schema(clients: Clients) -> bool:
    form = {"type": "json_schema", "name": "colour", "schema": SCHEMA, "strict": True}
    return _is_json(_respond(clients, text={"format": form}, max_output_tokens=48).output_text)


def _response_turns(clients: Clients) -> bool:
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"role": "user", "content": "Name three colours."},
    ]
    told = clients.text(
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            *QUESTION,
        ]
    )
    return _respond(clients, input=turns).output_text == told


_RESPONSES: dict[str, Act] = {
    "responses: text in, text out, usage": _response_text,
    "responses: earlier turns in input": _response_turns,
    "responses: instructions": lambda c: (
        _respond(c, instructions="Answer in one word.").output_text
        == c.text(messages=[{"role": "system", "content": "Answer in one word."}, *QUESTION])
    ),
    "responses: incomplete at max_output_tokens": _response_incomplete,
    "responses: streaming events": _response_stream,
    "responses: text.format json_schema": _response_schema,
    "responses: tools": lambda c: bool(_respond(c, tools=[{"type": "web_search"}]).output_text) and False,
    "responses: previous_response_id": lambda c: bool(_respond(c, previous_response_id="resp_1")) and False,
    "responses: store": lambda c: _respond(c, store=True).store is True,
    "responses: reasoning": lambda c: bool(_respond(c, reasoning={"effort": "low"})) and False,
}


# ---- models, errors -------------------------------------------------------------------------------------------------


def _raises(kind: type[openai.APIStatusError], **fields: Any) -> Act:
    """The client's own class of error, and OpenAI's shape inside it."""

    def act(clients: Clients) -> bool:
        try:
            clients.chat(**fields)
        except kind as error:
            return bool(error.body and error.body["message"])  # type: ignore[index,call-overload]
        return False

    return act


_OTHER: dict[str, Act] = {
    "models: list and retrieve": lambda c: (
        [one.id for one in c.openai.models.list()] == [c.model]
        and c.openai.models.retrieve(c.model).id == c.model
    ),
    "errors: another model is 404": _raises(openai.NotFoundError, model="gpt-5"),
    "errors: a prompt beyond the context is 400": _raises(
        openai.BadRequestError, messages=[{"role": "user", "content": "word " * 4000}]
    ),
    "errors: a wrong value is 400": _raises(openai.BadRequestError, temperature=7),
}


# ---- litellm --------------------------------------------------------------------------------------------------------


def _litellm(clients: Clients, **fields: Any) -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it fetches one at import
    import litellm

    litellm.suppress_debug_info = True
    asked = {
        "model": f"openai/{clients.model}",
        "api_base": clients.url,
        "api_key": "none",
        "messages": QUESTION,
        "max_tokens": 24,
        "temperature": 0,
        "num_retries": 0,
    }
    return litellm.completion(**{**asked, **fields})


def _litellm_stream(clients: Clients) -> bool:
    parts = list(_litellm(clients, stream=True, stream_options={"include_usage": True}))
    said = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    usage = [part.usage for part in parts if getattr(part, "usage", None)]
    return said == clients.text() and usage[-1].completion_tokens > 0


def _litellm_schema(clients: Clients) -> bool:
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    answer = _litellm(clients, response_format=wanted, max_tokens=48)
    return _is_json(answer.choices[0].message.content)


def _litellm_embed(clients: Clients) -> bool:
    import litellm

    answer = litellm.embedding(
        model=f"openai/{clients.model}", api_base=clients.url, api_key="none", input=["a lamp"]
    )
    return len(answer.data[0]["embedding"]) > 0


_LITELLM: dict[str, Act] = {
    "completion": lambda c: _litellm(c).choices[0].message.content == c.text(),
    "streaming, with usage": _litellm_stream,
    "json_schema": _litellm_schema,
    "tools": lambda c: bool(_litellm(c, tools=[TOOL], max_tokens=48).choices[0].message),
    "embedding": _litellm_embed,
}


# ---- LangChain ------------------------------------------------------------------------------------------------------


def _langchain(clients: Clients, **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    asked = {"temperature": 0, "max_tokens": 24, "max_retries": 0, "http_client": clients.http}
    return ChatOpenAI(model=clients.model, base_url=clients.url, api_key="none", **{**asked, **fields})


def _langchain_structured(clients: Clients) -> bool:
    schema = {"title": "colour", "description": "A colour.", **SCHEMA}
    model = _langchain(clients, max_tokens=48).with_structured_output(schema, method="json_schema")
    return set(model.invoke("Name a colour.")) == {"colour"}


def _langchain_embed(clients: Clients) -> bool:
    from langchain_openai import OpenAIEmbeddings

    model = OpenAIEmbeddings(
        model=clients.model, base_url=clients.url, api_key="none", check_embedding_ctx_length=False
    )
    return len(model.embed_query("a lamp")) > 0


_LANGCHAIN: dict[str, Act] = {
    "invoke": lambda c: _langchain(c).invoke("Name three colours.").content == c.text(),
    "stream": lambda c: (
        "".join(str(part.content) for part in _langchain(c).stream("Name three colours.")) == c.text()
    ),
    "with_structured_output (json_schema)": _langchain_structured,
    "bind_tools": lambda c: _langchain(c).bind_tools([TOOL]).invoke("Turn on the kitchen lamp.") is not None,
    "use_responses_api": lambda c: (
        _langchain(c, use_responses_api=True, store=False).invoke("Name three colours.").text == c.text()
    ),
    "OpenAIEmbeddings": _langchain_embed,
}
