"""Text columns to documents and back."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

Document = TypeVar("Document")


def to_text(value: Any) -> str:
    """JSON text of a value or message."""
    return msgspec.json.encode(value).decode()


def from_text(text: str, kind: type[Document]) -> Document:
    """A document from our own column; it was checked when it was written."""
    return msgspec.json.decode(text, type=kind)
