"""Blobs in a folder: ``chunks/ab/abcdef...``; a file that is visible there is whole and hashes to its name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from slmops.artifact.digest import is_digest
from slmops.core.errors import DigestError, NoSpaceError, NotFoundError, UsageError
from slmops.server.adapters.durable import FULL, no_space, sync_folder

PIECE_BYTES = 1 << 20


class ChunkDirectory:
    """``ChunkStore`` on a folder.

    Args:
        folder: made when it is not there; leftovers of uploads that a crash broke off are removed.
        reserve_bytes: disk that uploads must leave free, for the database and its log.
    """

    def __init__(self, folder: Path, reserve_bytes: int = 64 << 20) -> None:
        """Open and tidy up."""
        self._folder = folder
        self._incoming = folder / "incoming"
        self._reserve_bytes = reserve_bytes
        self._incoming.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def size(self, sha256: str) -> int | None:
        """Bytes of a blob; None when it is not here."""
        if not is_digest(sha256):
            return None
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those that are not here, in order, each once."""
        return [sha256 for sha256 in dict.fromkeys(digests) if self.size(sha256) is None]

    def read(self, sha256: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes of a blob in pieces."""
        if not is_digest(sha256):
            raise not_here(sha256)
        try:
            file = self._path(sha256).open("rb")
        except FileNotFoundError as error:
            raise not_here(sha256) from error
        return _pieces(file, offset, length)

    def upload(self, sha256: str, expected_bytes: int | None = None) -> DirectoryUpload:
        """Begin to take a blob in."""
        if not is_digest(sha256):
            raise UsageError(
                f"{sha256!r} is not a SHA-256 in lower-case hex", hint="name a blob by its digest"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if (expected_bytes or 0) + self._reserve_bytes > free:
            raise NoSpaceError(
                f"{expected_bytes or 0} bytes are announced and {self._reserve_bytes} must stay free, "
                f"the disk has {free}",
                hint="free disk in the server's data folder; nothing was written",
                needed_bytes=expected_bytes or 0,
                free_bytes=free,
            )
        return DirectoryUpload(self._incoming, self._path(sha256), sha256)

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256


def not_here(sha256: str) -> NotFoundError:
    """The error for a blob that the store does not have."""
    return NotFoundError(f"no blob has sha256 {sha256}", hint="upload it: slmops release publish does")


def _pieces(file: IO[bytes], offset: int, length: int | None) -> Iterator[bytes]:
    with file:
        file.seek(offset)
        left = length
        while left is None or left > 0:
            piece = file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
            if not piece:
                return
            if left is not None:
                left -= len(piece)
            yield piece


class DirectoryUpload:
    """``Upload`` into a temporary file."""

    def __init__(self, incoming: Path, path: Path, sha256: str) -> None:
        """Nothing is written before the context is entered."""
        self._incoming = incoming
        self._path = path
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._temporary: Path | None = None

    def __enter__(self) -> DirectoryUpload:
        """Open the temporary file; somebody may have removed the folder meanwhile, and blobs can be sent again."""
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
        except OSError as error:
            if error.errno in FULL:
                raise no_space(error, self._incoming) from error
            raise
        self._temporary = Path(name)
        # Unbuffered: a disk that is full says so at the write, not again when the file is closed.
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what was not committed."""
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Add bytes."""
        if self._file is None:
            raise ValueError("upload is not open")
        self._hash.update(piece)
        self._bytes += len(piece)
        view = memoryview(piece)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if error.errno in FULL:
                raise no_space(error, self._incoming, self._bytes) from error
            raise

    def commit(self) -> None:
        """Verify the digest and make the blob visible, durably."""
        if self._file is None or self._temporary is None:
            raise ValueError("upload is not open")
        check_digest(self._hash.hexdigest(), self._sha256, self._bytes)
        try:
            os.fsync(self._file.fileno())
            self._path.parent.mkdir(exist_ok=True)
            os.replace(self._temporary, self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            if error.errno in FULL:
                raise no_space(error, self._incoming, self._bytes) from error
            raise
        self._temporary = None


def check_digest(actual: str, expected: str, size_bytes: int) -> None:
    """Refuse bytes that do not hash to their name."""
    if actual != expected:
        raise DigestError(
            f"upload: expected sha256 {expected}, got {actual} ({size_bytes} bytes)",
            hint="the bytes changed on the way or the name is wrong; nothing of them was kept, send them again",
            expected=expected,
            actual=actual,
        )
