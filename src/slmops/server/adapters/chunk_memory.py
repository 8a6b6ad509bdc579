"""Blobs in memory: for tests, with the directory's contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

from slmops.artifact.digest import is_digest, sha256_hex
from slmops.core.errors import NoSpaceError, UsageError
from slmops.server.adapters.chunk_directory import PIECE_BYTES, check_digest, not_here


class ChunkMemory:
    """``ChunkStore`` in a dictionary.

    Args:
        capacity_bytes: what it holds before it is "full".
    """

    def __init__(self, capacity_bytes: int = 1 << 30) -> None:
        """Begin empty."""
        self.blobs: dict[str, bytes] = {}
        self.capacity_bytes = capacity_bytes

    def size(self, sha256: str) -> int | None:
        """Bytes of a blob; None when it is not here."""
        blob = self.blobs.get(sha256)
        return None if blob is None else len(blob)

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those that are not here, in order, each once."""
        return [sha256 for sha256 in dict.fromkeys(digests) if sha256 not in self.blobs]

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes of a blob in pieces."""
        if sha256 not in self.blobs:
            raise not_here(sha256)
        blob = self.blobs[sha256][offset : None if length is None else offset + length]
        return iter([blob[at : at + PIECE_BYTES] for at in range(0, len(blob), PIECE_BYTES)])

    def upload(self, sha256: str, expected_bytes: int | None = None) -> MemoryUpload:
        """Begin to take a blob in."""
        if not is_digest(sha256):
            raise UsageError(
                f"{sha256!r} is not a SHA-256 in lower-case hex", hint="name a blob by its digest"
            )
        self.require_room(expected_bytes or 0)
        return MemoryUpload(self, sha256)

    def require_room(self, size_bytes: int) -> None:
        """Refuse what does not fit any more."""
        free = self.capacity_bytes - sum(map(len, self.blobs.values()))
        if size_bytes > free:
            raise NoSpaceError(f"{size_bytes} bytes came, {free} are free", hint="nothing was kept")


class MemoryUpload:
    """``Upload`` into a byte array."""

    def __init__(self, store: ChunkMemory, sha256: str) -> None:
        """Nothing is visible before the commit."""
        self._store = store
        self._sha256 = sha256
        self._content = bytearray()

    def __enter__(self) -> MemoryUpload:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what was not committed."""
        self._content.clear()

    def write(self, piece: bytes) -> None:
        """Add bytes."""
        self._store.require_room(len(self._content) + len(piece))
        self._content += piece

    def commit(self) -> None:
        """Verify the digest and make the blob visible."""
        check_digest(sha256_hex(self._content), self._sha256, len(self._content))
        self._store.blobs[self._sha256] = bytes(self._content)
