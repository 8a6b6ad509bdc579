"""Evidence is about the file that ships: every measuring step hashes the file that it measured, after it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.core.errors import DigestError

#: steps that measure a variant's file, by kind; each gives ``model_sha256``
MEASURING = ("answers", "likelihood", "golden scores", "speed")


def check_shipped(shipped_sha256: str, measured: Mapping[str, Mapping[str, Any]], profile: str) -> None:
    """Every figure of a variant was measured on the very file that ships.

    Args:
        shipped_sha256: of the file in the build directory.
        measured: what each measuring step gave, by its kind.
        profile: of the variant.

    Raises:
        DigestError: a step measured another file: the cached one was changed between quantising and measuring.
    """
    for kind, value in measured.items():
        found = value["model_sha256"]
        if found != shipped_sha256:
            raise DigestError(
                f"{profile}: {kind} measured a file with sha256 {found}, the one that ships has {shipped_sha256}",
                hint="something changed the step cache's files; remove the cache folder and build again",
                expected=shipped_sha256,
                actual=found,
            )
