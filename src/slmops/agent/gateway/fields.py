"""The values of a generation request: what no runtime can honour as asked is refused here, before an engine sees it.

An engine would guess, clamp or fall over (and a client's mistake would count as the device's failed request).
Source of the ranges: OpenAI's API reference, ``/v1/chat/completions`` and ``/v1/completions``.
"""

from __future__ import annotations

from typing import Any

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
#: numbers with their bounds, both allowed; the second column says whether they must be whole
_NUMBERS: dict[str, tuple[bool, float, float]] = {
    "max_tokens": (True, 1, 1 << 31),
    "max_completion_tokens": (True, 1, 1 << 31),
    "temperature": (False, 0, 2),
    "top_p": (False, 0, 1),
    "min_p": (False, 0, 1),
    "top_k": (True, -1, 1 << 31),
    "presence_penalty": (False, -2, 2),
    "frequency_penalty": (False, -2, 2),
    "repeat_penalty": (False, 0, 10),
    "seed": (True, -(1 << 63), (1 << 64) - 1),
    "top_logprobs": (True, 0, 20),
}
_OBJECTS = ("stream_options", "chat_template_kwargs", "logit_bias", "json_schema")
_FORMATS = ("text", "json_object", "json_schema")


def wrong_number(body: dict[str, Any]) -> tuple[str, str] | None:
    """The first number that is not one, or out of bounds: its name and what is wrong."""
    for name, (whole, lowest, highest) in _NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return name, f"{name} must be {'a whole number' if whole else 'a number'}"
        if not lowest <= value <= highest:
            bound = f"at least {lowest:g}" if highest >= 1 << 31 else f"between {lowest:g} and {highest:g}"
            return name, f"{name} must be {bound}, not {value}"
    return None


def wrong_shape(body: dict[str, Any]) -> tuple[str, str] | None:
    """The first field of a wrong JSON type: its name and what is wrong."""
    for name in _OBJECTS:
        value = body.get(name)
        if (
            value is not None
            and not isinstance(value, dict)
            and not (name == "logit_bias" and isinstance(value, list))
        ):
            return name, f"{name} must be an object"
    stop = body.get("stop")
    if stop is not None and not isinstance(stop, str) and not _all(stop, str):
        return "stop", "stop must be a string or a list of strings"
    grammar = body.get("grammar")
    if grammar is not None and not isinstance(grammar, str):
        return "grammar", "grammar must be a string"
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(_is_tool(tool) for tool in tools)):
        return "tools", 'tools must be a list of {"type": "function", "function": {"name", "parameters"}}'
    return None


def wrong_format(value: Any) -> str:
    """What is wrong with a ``response_format``; empty when it can be honoured."""
    if value is None:
        return ""
    if not isinstance(value, dict) or value.get("type") not in _FORMATS:
        return f"response_format.type must be one of {', '.join(_FORMATS)}"
    if value["type"] == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            return "response_format.json_schema.schema must be a JSON schema: without it nothing holds the answer to a form"
    return ""


def wrong_message(message: Any) -> str:
    """What is wrong with one message of a chat; empty when it can be read."""
    if not isinstance(message, dict):
        return "messages must be a non-empty list of {role, content}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        return f"a message's role must be one of {', '.join(sorted(ROLES))}"
    if content is None:
        return "" if role == "assistant" and message.get("tool_calls") else f"a {role} message has no content"
    if isinstance(content, str):
        return ""
    if not isinstance(content, list) or not content:
        return "a message's content must be a string or a list of text parts"
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = kind if isinstance(kind, str) and kind.isascii() and len(kind) < 40 else "unknown"
            return f"this device's model reads text only: a content part of type {what} cannot be honoured"
    return ""


def wrong_prompt(prompt: Any) -> str:
    """What is wrong with the prompt of a plain completion; empty when it can be read."""
    if isinstance(prompt, str) and prompt:
        return ""
    lists = isinstance(prompt, list) and bool(prompt)
    if lists and (_all(prompt, str) or _are_tokens(prompt) or all(_are_tokens(tokens) for tokens in prompt)):
        return ""
    return "prompt must be a non-empty string, a list of token ids, or a list of either"


def _are_tokens(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int and v >= 0 for v in values)


def _is_tool(tool: Any) -> bool:
    if (
        not isinstance(tool, dict)
        or tool.get("type") != "function"
        or not isinstance(tool.get("function"), dict)
    ):
        return False
    return isinstance(tool["function"].get("name"), str) and isinstance(
        tool["function"].get("parameters", {}), dict
    )


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
