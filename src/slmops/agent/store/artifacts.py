"""Artifacts by digest, written in place from chunks.

A file under way is ``<sha256>.partial`` with its full size, beside ``<sha256>.bitmap``: one byte per chunk, set *after*
the chunk's bytes are on disk. After a power cut the set chunks are taken as they are, and the whole file is hashed
before it gets its name. At most the chunk that was in flight is fetched twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from slmops.agent.store.files import as_device_error, sync_folder, write_atomic
from slmops.agent.store.layout import Layout
from slmops.artifact.chunkmap import ChunkMap, decode_chunk_map
from slmops.artifact.digest import require_digest, sha256_hex
from slmops.core.errors import DigestError

_READ_BYTES = 1 << 20


class ArtifactStore:
    """The files of one device."""

    def __init__(self, layout: Layout) -> None:
        """Work below ``layout.artifacts``."""
        self._layout = layout

    def has(self, sha256: str) -> bool:
        """Whether the whole file is here (it was hashed before it got its name)."""
        return self._layout.artifact(sha256).exists()

    def path(self, sha256: str) -> Path:
        """Path of a whole file."""
        return self._layout.artifact(sha256)

    def read_blob(self, sha256: str) -> bytes:
        """A small file's content, hashed again.

        Raises:
            DigestError: it was damaged on disk.
        """
        content = self._layout.artifact(sha256).read_bytes()
        require_digest(content, sha256, f"artifact {sha256[:12]} on disk")
        return content

    def put_blob(self, sha256: str, content: bytes) -> None:
        """Keep a small file.

        Raises:
            DigestError: the content is not what its name says.
            NoSpaceError: the disk is full.
        """
        require_digest(content, sha256, f"blob {sha256[:12]}")
        write_atomic(self._layout.artifact(sha256), content, mode=0o600)

    def verify(self, sha256: str) -> None:
        """Hash a whole file again.

        Raises:
            DigestError: it was damaged on disk; it is removed, so that the next attempt fetches it.
        """
        actual = _hash_file(self._layout.artifact(sha256))
        if actual != sha256:
            self._layout.artifact(sha256).unlink(missing_ok=True)
            raise DigestError(
                f"artifact on disk hashes to {actual}, expected {sha256}",
                hint="the disk damaged it; it was removed and will be fetched again",
            )

    def assembly(self, chunk_map: ChunkMap) -> Assembly:
        """Begin, or go on with, writing a file from chunks."""
        return Assembly(self._layout, chunk_map)

    def collect_garbage(self, keep: Iterable[str]) -> int:
        """Remove every file that is not in ``keep``; returns the bytes that became free."""
        wanted = set(keep)
        freed = 0
        for path in self._layout.artifacts.iterdir():
            if path.name.split(".", 1)[0] in wanted and not path.name.startswith("."):
                continue
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
        if freed:
            sync_folder(self._layout.artifacts)
        return freed

    def drop_partial(self, sha256: str) -> None:
        """Forget a file under way."""
        for path in _partial_paths(self._layout.artifact(sha256)):
            path.unlink(missing_ok=True)


class Assembly:
    """One file under way."""

    def __init__(self, layout: Layout, chunk_map: ChunkMap) -> None:
        """Open the partial file and its bitmap; a bitmap of another size belongs to another cut and is dropped."""
        self._target = layout.artifact(chunk_map.artifact_sha256)
        self._partial, self._bitmap = _partial_paths(self._target)
        self._map = chunk_map
        self._done = self._read_bitmap()

    def _read_bitmap(self) -> bytearray:
        count = len(self._map.chunks)
        try:
            done = bytearray(self._bitmap.read_bytes())
        except FileNotFoundError:
            done = bytearray()
        if (
            len(done) == count
            and self._partial.exists()
            and self._partial.stat().st_size == self._map.artifact_bytes
        ):
            return done
        self._bitmap.unlink(missing_ok=True)
        return bytearray(count)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are not on disk yet."""
        return sum(chunk.bytes for chunk, done in zip(self._map.chunks, self._done, strict=True) if not done)

    def missing(self) -> Iterator[tuple[int, int, str, int]]:
        """(index, offset, sha256, bytes) of every chunk that is not on disk yet."""
        for index, (offset, chunk) in enumerate(self._map.offsets()):
            if not self._done[index]:
                yield index, offset, chunk.sha256, chunk.bytes

    def write(self, index: int, offset: int, content: bytes) -> None:
        """Put a verified chunk in its place, durably, then mark it.

        Raises:
            NoSpaceError: the disk is full; what is marked stays valid.
        """
        try:
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if os.fstat(descriptor).st_size != self._map.artifact_bytes:
                    os.truncate(descriptor, self._map.artifact_bytes)
                view, at = memoryview(content), offset
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            self._mark(index)
        except OSError as error:
            raise as_device_error(error, self._partial) from error

    def _mark(self, index: int) -> None:
        """Set one byte of the bitmap: a single-byte write is atomic, the data is already durable."""
        descriptor = os.open(self._bitmap, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size != len(self._done):
                os.truncate(descriptor, len(self._done))
            os.pwrite(descriptor, b"\x01", index)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        self._done[index] = 1

    def finish(self) -> None:
        """Hash the whole file and give it its name.

        Raises:
            DigestError: a chunk on disk is not what was written; the file under way is dropped.
        """
        actual = _hash_file(self._partial)
        if actual != self._map.artifact_sha256:
            self._partial.unlink(missing_ok=True)
            self._bitmap.unlink(missing_ok=True)
            raise DigestError(
                f"assembled file hashes to {actual}, expected {self._map.artifact_sha256}",
                hint="the disk or the chunk map is damaged; the file was dropped and will be fetched again",
            )
        os.replace(self._partial, self._target)
        self._bitmap.unlink(missing_ok=True)
        sync_folder(self._target.parent)


class LocalChunks:
    """Chunks that the device already has inside whole files: an update takes them from there, not from the network."""

    def __init__(self, store: ArtifactStore, files: Iterable[tuple[str, str]]) -> None:
        """Index files.

        Args:
            store: the device's artifacts.
            files: (digest of a whole file, digest of its chunk map).
        """
        self._places: dict[str, tuple[Path, int, int]] = {}
        for artifact, chunk_map in files:
            if not (chunk_map and store.has(artifact) and store.has(chunk_map)):
                continue
            for offset, chunk in decode_chunk_map(store.read_blob(chunk_map)).offsets():
                self._places.setdefault(chunk.sha256, (store.path(artifact), offset, chunk.bytes))

    def get(self, sha256: str) -> bytes | None:
        """A chunk's bytes, hashed again; None when it is not here or was damaged."""
        place = self._places.get(sha256)
        if place is None:
            return None
        path, offset, size = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError:
            return None
        return content if sha256_hex(content) == sha256 else None


def _partial_paths(target: Path) -> tuple[Path, Path]:
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".bitmap")


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
