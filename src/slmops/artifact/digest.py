"""Digests and canonical bytes: one hash (SHA-256, lower-case hex) and one JSON form (RFC 8785) everywhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import rfc8785

from slmops.core.errors import DigestError, UsageError

#: everything that msgspec raises on bytes that are no JSON of the wanted shape: bad UTF-8 and deep nesting are not its own
UNREADABLE_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_HEX = re.compile(r"[0-9a-f]{64}")


def sha256_hex(content: bytes | bytearray | memoryview) -> str:
    """SHA-256 of bytes, lower-case hex."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the concatenation of parts, lower-case hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    """Whether a text is a lower-case hexadecimal SHA-256; guards every path made from one."""
    return _HEX.fullmatch(text) is not None  # fullmatch: "$" would let a line break through


def require_digest(content: bytes | bytearray | memoryview, expected: str, what: str) -> None:
    """Check bytes against the digest by which they were asked for.

    Raises:
        DigestError: they hash to something else; names what, and both digests.
    """
    actual = sha256_hex(content)
    if actual != expected:
        raise DigestError(
            f"{what}: expected sha256 {expected}, got {actual} ({len(content)} bytes)",
            hint="the copy is damaged or was swapped: fetch it again; nothing of it was kept",
            expected=expected,
            actual=actual,
        )


def canonical_json(value: Any) -> bytes:
    """The canonical bytes of a JSON value or msgspec struct (RFC 8785).

    Fields at their default are kept out by the structs themselves (``omit_defaults``), so a field added later
    does not change the identity of documents that do not use it.

    Raises:
        UsageError: the value has no canonical form (NaN, infinity, an integer beyond 2^53).
    """
    try:
        return rfc8785.dumps(msgspec.to_builtins(value))
    except rfc8785.CanonicalizationError as error:
        raise UsageError(
            f"value has no canonical JSON form: {error}", hint="use finite numbers and integers below 2^53"
        ) from error


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical bytes."""
    return sha256_hex(canonical_json(value))
