"""Problem documents (RFC 9457) back into the error classes that they were made from."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.errors import (
    AuthError,
    BusyError,
    NetworkError,
    NotFoundError,
    SlmopsError,
    TransientError,
    UsageError,
)
from slmops.protocol.messages import Problem


def _family(root: type[SlmopsError]) -> Iterator[type[SlmopsError]]:
    yield root
    for child in root.__subclasses__():
        yield from _family(child)


def error_class(code: str) -> type[SlmopsError] | None:
    """The class with this code, or with the longest known prefix of it (a newer server may be more precise).

    None when not even the first word is known.
    """
    known = {kind.code: kind for kind in _family(SlmopsError) if kind.__module__ == SlmopsError.__module__}
    parts = code.split(".")
    for length in range(len(parts), 0, -1):
        found = known.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None


_BY_STATUS: dict[int, type[SlmopsError]] = {
    401: AuthError,
    403: AuthError,
    404: NotFoundError,
    429: BusyError,
    503: BusyError,
}


def error_from(status: int, content: bytes, content_type: str, what: str) -> SlmopsError:
    """The error that a response stands for.

    Args:
        status: HTTP status, 400 or above.
        content: the body.
        content_type: as sent; only ``application/problem+json`` is taken for a problem document.
        what: method and path, for answers that are not ours.
    """
    if content_type.startswith("application/problem+json"):
        try:
            problem = msgspec.json.decode(content, type=Problem)
        except UNREADABLE_JSON as error:
            return NetworkError(
                f"{what}: problem document cannot be read: {error}",
                hint="is there a proxy in between?",
                status=status,
            )
        kind = error_class(problem.code) or SlmopsError
        fields = dict(problem.fields)
        if problem.code != kind.code:
            fields["server_code"] = problem.code
        return kind(problem.detail, hint=problem.hint, **fields)
    kind = _BY_STATUS.get(status) or (UsageError if status < 500 else TransientError)
    return kind(
        f"{what}: answered {status} without a problem document",
        hint="is this address a slmops control plane, or a proxy before it?",
        status=status,
    )
