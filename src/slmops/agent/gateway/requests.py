"""Reading a client's request: what is asked, what must be refused, what a runtime will not honour.

Rule: a field that the runtime cannot honour gets an explicit error (where ignoring it would change the answer's
meaning) or a warning header (where it is harmless), never silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from slmops.agent.gateway.fields import wrong_format, wrong_message, wrong_number, wrong_prompt, wrong_shape
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.runtimes import Capabilities

MAX_BODY_BYTES = 8 << 20
#: fields that change nothing in the answer; accepted and dropped without a word (never logged)
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
#: fields whose absence changes what the client gets back: refused when the runtime lacks them
MEANINGFUL = frozenset(
    {
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "audio",
        "modalities",
        "echo",
        "suffix",
        "best_of",
    }
)


class BadRequest(Exception):
    """A request that is refused, in OpenAI's terms."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        """Keep what the response needs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request that may go to the engine.

    Attributes:
        body: to forward.
        stream: the client wants server-sent events.
        ignored: fields that were dropped and are named in a warning header.
    """

    body: dict[str, Any]
    stream: bool
    ignored: tuple[str, ...]


def read_json(content: bytes | bytearray) -> dict[str, Any]:
    """The request's JSON object; its length was limited while it was read.

    Raises:
        BadRequest: it is not one.
    """
    try:
        body = msgspec.json.decode(content)
    except UNREADABLE_JSON as error:
        raise BadRequest(400, f"the request is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(400, "the request must be a JSON object")
    return body


def check_model(body: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse a model that this device does not serve.

    Raises:
        BadRequest: 400 when no model is named, 404 when it is another one.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest(400, "you must provide a model parameter", param="model")
    if model not in known:
        raise BadRequest(
            404,
            f"The model '{model}' does not exist here; this device serves {known[0]}",
            param="model",
            code="model_not_found",
        )


def parse_generation(body: dict[str, Any], fields: frozenset[str], runtime: str = "") -> Parsed:
    """Sort a generation request's fields into forwarded, ignored and refused ones.

    Args:
        body: the client's JSON.
        fields: what the runtime honours for this route.
        runtime: its name, for a refusal.
    """
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest(400, "stream must be true or false", param="stream")
    if body.get("n") not in (None, 1):
        raise BadRequest(
            400, f"n={body['n']} is not supported, only n=1", param="n", code="unsupported_value"
        )
    for problem in (wrong_number(body), wrong_shape(body)):
        if problem is not None:
            raise BadRequest(400, problem[1], param=problem[0])
    forwarded: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        if name in fields or name == "model":
            forwarded[name] = value
        elif name in HARMLESS or value is None or name == "n":
            continue
        elif name in MEANINGFUL:
            raise BadRequest(
                400,
                f"{name} is not supported by this device's runtime{_named(runtime)}",
                param=name,
                code="unsupported_parameter",
            )
        else:
            ignored.append(name)
    if "max_completion_tokens" in body and "max_completion_tokens" not in fields and "max_tokens" in fields:
        forwarded.setdefault("max_tokens", body["max_completion_tokens"])
        ignored = [name for name in ignored if name != "max_completion_tokens"]
    return Parsed(forwarded, stream, tuple(sorted(ignored)))


def _named(runtime: str) -> str:
    return f" ({runtime})" if runtime else ""


def parse_chat(
    body: dict[str, Any], capabilities: Capabilities, system_prompt: str, runtime: str = ""
) -> Parsed:
    """A chat request, with the release's system prompt where the client sent none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest(400, "messages must be a non-empty list of {role, content}", param="messages")
    for message in messages:
        if problem := wrong_message(message):
            raise BadRequest(400, problem, param="messages")
    if problem := wrong_format(body.get("response_format")):
        raise BadRequest(400, problem, param="response_format")
    if "tool_choice" in capabilities.chat_fields:
        _check_tool_choice(body, capabilities, runtime)
    parsed = parse_generation(body, capabilities.chat_fields, runtime)
    if system_prompt and not any(m["role"] in ("system", "developer") for m in messages):
        parsed.body["messages"] = [{"role": "system", "content": system_prompt}, *messages]
    return parsed


def _check_tool_choice(body: dict[str, Any], capabilities: Capabilities, runtime: str) -> None:
    choice = body.get("tool_choice")
    if choice in (None, "none", "auto"):
        return
    if choice != "required" and not isinstance(choice, dict):
        raise BadRequest(
            400, "tool_choice must be none, auto, required or the name of a function", param="tool_choice"
        )
    if not body.get("tools"):
        raise BadRequest(400, "tool_choice needs tools to choose from", param="tool_choice")
    if not capabilities.forces_tool_choice:
        raise BadRequest(
            400,
            f"this device's runtime{_named(runtime)} cannot force a tool call: "
            "use tool_choice auto, or a response_format with a json_schema",
            param="tool_choice",
            code="unsupported_value",
        )


def parse_completion(body: dict[str, Any], capabilities: Capabilities, runtime: str = "") -> Parsed:
    """A plain completion request."""
    if problem := wrong_prompt(body.get("prompt")):
        raise BadRequest(400, problem, param="prompt")
    return parse_generation(body, capabilities.completion_fields, runtime)


def parse_embeddings(
    body: dict[str, Any], capabilities: Capabilities, runtime: str = ""
) -> tuple[list[str], str]:
    """Texts to embed and the wished encoding.

    Raises:
        BadRequest: no text, token arrays, an unknown encoding, or a runtime that gives no embeddings.
    """
    if not (capabilities.embeddings and capabilities.embeddings_with_chat):
        raise BadRequest(
            400,
            f"embeddings are not supported by this device's runtime{_named(runtime)}",
            param="input",
            code="unsupported_endpoint",
        )
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadRequest(400, "input must be a non-empty string or a list of them", param="input")
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise BadRequest(
            400, f"encoding_format {encoding!r} is not supported: float or base64", param="encoding_format"
        )
    if body.get("dimensions") is not None:
        raise BadRequest(
            400,
            f"dimensions is not supported by this device's runtime{_named(runtime)}",
            param="dimensions",
            code="unsupported_parameter",
        )
    return texts, encoding
