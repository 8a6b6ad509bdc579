"""Errors that were told as plain values by another process, as the class that they were."""

from __future__ import annotations

from slmops.core.errors import BuildError, SlmopsError


def class_of(code: str) -> type[SlmopsError]:
    """The error class of a code; BuildError for one that is not known here."""
    known = [SlmopsError]
    for kind in known:
        if kind.code == code:
            return kind
        known.extend(kind.__subclasses__())
    return BuildError
