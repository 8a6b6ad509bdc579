"""Error bodies of OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from slmops.artifact.digest import UNREADABLE_JSON

JSON = "application/json"


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> bytes:
    """The body alone, for streams."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def openai_error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
) -> Response:
    """A response that the official clients turn into their own exceptions."""
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
    return Response(error_body(message, kind=kind, param=param, code=code), status, headers, JSON)


def from_engine(status: int, content: bytes) -> tuple[int, bytes]:
    """Put an engine's error into OpenAI's shape and words; unknown shapes become a 502 with no engine internals."""
    try:
        body: Any = msgspec.json.decode(content)
        error = body["error"]
        message, kind = str(error["message"]), str(error.get("type", ""))
    except (*UNREADABLE_JSON, KeyError, TypeError, AttributeError):
        return 502, error_body(
            f"the engine answered {status} in a form that is not understood",
            kind="server_error",
            code="engine_error",
        )
    if kind == "exceed_context_size_error":
        return 400, error_body(message, param="messages", code="context_length_exceeded")
    if status >= 500 and message.startswith("Failed to parse"):
        status, kind = 400, "invalid_request_error"  # what could not be parsed is what the client sent
    if status < 500:
        return status, error_body(message, kind=kind or "invalid_request_error", code=kind or None)
    return status, error_body(message, kind="server_error", code=kind or "engine_error")
