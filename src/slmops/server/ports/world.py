"""Time, names, blobs, signed metadata, the check-in journal and the bell that wakes whoever waits for events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Protocol

from slmops.server.ports.rows import CheckinWrite


class Clock(Protocol):
    """Wall clock."""

    def now(self) -> datetime:
        """UTC-aware."""


class Names(Protocol):
    """Chance, where the control plane needs it."""

    def rollout_id(self) -> str:
        """A new rollout's id."""

    def secret(self) -> str:
        """256 unguessable bits, URL-safe."""

    def jitter(self) -> float:
        """Uniform in 0..1, to spread polls."""


class Upload(Protocol):
    """One blob on its way in. Leaving the context without ``commit`` leaves nothing behind."""

    def __enter__(self) -> Upload:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what was not committed."""

    def write(self, piece: bytes) -> None:
        """Add bytes.

        Raises:
            NoSpaceError: the disk is full.
        """

    def commit(self) -> None:
        """Verify the digest and make the blob visible, durably.

        Raises:
            DigestError: the bytes do not hash to the name.
            NoSpaceError: the disk is full.
        """


class ChunkStore(Protocol):
    """Immutable blobs by SHA-256."""

    def size(self, sha256: str) -> int | None:
        """Bytes of a blob; None when it is not here."""

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those that are not here, in order, each once."""

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes of a blob in pieces.

        Raises:
            NotFoundError: it is not here.
        """

    def upload(self, sha256: str, expected_bytes: int | None = None) -> Upload:
        """Begin to take a blob in.

        Args:
            sha256: its name; must be a digest.
            expected_bytes: announced size, so that a full disk refuses before the first byte.
        """


class MetadataStore(Protocol):
    """Published TUF metadata, by file name."""

    def get(self, name: str) -> bytes | None:
        """One file."""

    def latest_version(self, role: str) -> int:
        """Highest N for which ``N.role.json`` exists; 0 for none."""

    def publish(self, files: dict[str, bytes]) -> None:
        """Write versioned files first and ``timestamp.json`` last, durably: readers see the old or the new state."""


class CheckinJournal(Protocol):
    """Group commit: many check-ins share one flush."""

    async def append(self, checkin: CheckinWrite | None) -> None:
        """Return after the check-in, and all before it, are on disk; None waits for those before it."""


class Bell(Protocol):
    """Wakes whoever waits for events."""

    def ring(self) -> None:
        """Something was committed; safe from any thread."""
