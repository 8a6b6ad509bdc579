"""``/v1/responses``: the part of OpenAI's Responses API that a device can keep, on top of chat.

Kept: text in and out, earlier turns given in ``input``, ``instructions``, sampling, ``max_output_tokens``,
``text.format``, streaming events. A device remembers nothing, runs nothing and looks nothing up: everything that would
need that (``previous_response_id``, ``conversation``, ``background``, ``tools``, ``store: true``) is refused by name.

Source of names and events: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from slmops.agent.gateway.requests import BadRequest

#: field to the values that mean "not wanted"; any other value is refused
_REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "reasoning": (None, {}),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
_CHAT_NAMES = {"max_output_tokens": "max_tokens"}
_OWN = frozenset({"input", "instructions", "text", *_REFUSED, *_CHAT_NAMES})
_PARTS = ("input_text", "output_text", "text")
_DONE = b"[DONE]"


def to_chat(body: dict[str, Any]) -> dict[str, Any]:
    """The chat request that means the same.

    Raises:
        BadRequest: something that a device does not do.
    """
    for name, unwanted in _REFUSED.items():
        if body.get(name) not in unwanted:
            raise BadRequest(
                400,
                f"{name} is not supported by /v1/responses on this device, which keeps and runs nothing"
                + (": leave it out, or use /v1/chat/completions" if name.startswith("tool") else ""),
                param=name,
                code="unsupported_parameter",
            )
    chat = {_CHAT_NAMES.get(name, name): value for name, value in body.items() if name not in _OWN}
    if (most := body.get("max_output_tokens")) is not None:
        chat["max_tokens"] = most
    messages = _messages(body.get("input"))
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise BadRequest(400, "instructions must be a string", param="instructions")
        messages.insert(0, {"role": "system", "content": instructions})
    chat["messages"] = messages
    if (form := _format(body.get("text"))) is not None:
        chat["response_format"] = form
    return chat


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRequest(400, "input must be a non-empty string or a list of messages", param="input")
    messages = []
    for item in given:
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            kind = item.get("type") if isinstance(item, dict) else type(item).__name__
            raise BadRequest(
                400,
                f"input items of type {str(kind)[:40]} cannot be honoured: messages only",
                param="input",
                code="unsupported_value",
            )
        content = item.get("content")
        if isinstance(content, list):
            content = [
                {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in _PARTS else part
                for part in content
            ]
        messages.append({"role": item.get("role"), "content": content})
    return messages


def _format(text: Any) -> dict[str, Any] | None:
    """``response_format`` for ``text.format``; None for plain text."""
    if text is None:
        return None
    if not isinstance(text, dict) or set(text) - {"format", "verbosity"} or text.get("verbosity") is not None:
        raise BadRequest(
            400, "text: only text.format is supported", param="text", code="unsupported_parameter"
        )
    form = text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return None if form is None or form == {"type": "text"} else form
    inner = {name: value for name, value in form.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}


class Answer:
    """One response while it is made."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body
        self._id = f"resp_{secrets.token_hex(12)}"
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._created_at = int(time.time())
        self._sequence = -1
        self._text = ""
        self._finish = "stop"
        self._usage: dict[str, int] | None = None

    def whole(self, content: bytes) -> bytes:
        """The response for a whole chat answer."""
        answer = msgspec.json.decode(content)
        choice = answer["choices"][0]
        self._text = choice["message"].get("content") or ""
        self._finish = choice.get("finish_reason") or "stop"
        self._usage = answer.get("usage")
        return msgspec.json.encode(self._response(self._status))

    async def events(self, parts: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        """The events for a chat's stream; an error inside it goes out as it came."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=_part(""))
        rest = b""
        async for part in parts:
            *lines, rest = (rest + bytes(part)).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:") or line[5:].strip() == _DONE:
                    continue
                chunk = msgspec.json.decode(line[5:])
                if "error" in chunk:
                    yield self._event("error", **chunk["error"])
                    return
                if delta := self._take(chunk):
                    yield self._event("response.output_text.delta", **self._place, delta=delta, logprobs=[])
        status = self._status
        done = _part(self._text)
        yield self._event("response.output_text.done", **self._place, text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=done)
        yield self._event("response.output_item.done", output_index=0, item=self._item(status, [done]))
        yield self._event(f"response.{status}", response=self._response(status))

    def _take(self, chunk: dict[str, Any]) -> str:
        """Keep what a chunk says; gives its text."""
        self._usage = chunk.get("usage") or self._usage
        delta = ""
        for choice in chunk.get("choices", ()):
            delta += (choice.get("delta") or {}).get("content") or ""
            self._finish = choice.get("finish_reason") or self._finish
        self._text += delta
        return delta

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._item_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _response(self, status: str) -> dict[str, Any]:
        body, usage = self._body, self._usage
        over = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": body["model"],
            "output": [self._item(status, [_part(self._text)])] if over else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.get("temperature"),
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "usage": _usage(usage) if usage and over else None,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        if kind == "error":
            event["type"] = "error"
        return f"event: {kind}\n".encode("ascii") + b"data: " + msgspec.json.encode(event) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
