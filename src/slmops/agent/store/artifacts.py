"""Artifacts by digest, written in place from chunks.

A file under way is ``<sha256>.partial`` with its full size, beside ``<sha256>.bitmap``: one byte per chunk, set *after*
the chunk's bytes are on disk. After a power cut the set chunks are taken as they are, and the whole file is hashed
before it gets its name. At most the chunk that was in flight is fetched twice. A file that was damaged under its name loses
that name and becomes one under way (or, while an engine has it mapped, a ``.damaged`` beside it to take chunks from).
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
from slmops.core.errors import DigestError, TrustError

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
            DigestError: it was damaged on disk, or is gone.
        """
        try:
            content = self._layout.artifact(sha256).read_bytes()
        except FileNotFoundError as error:
            raise DigestError(
                f"artifact {sha256[:12]} is not on disk", hint="it is fetched again by itself"
            ) from error
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

    def is_whole(self, sha256: str) -> bool:
        """Hash a whole file again (blocking); False when it is damaged, gone or cannot be read."""
        try:
            return _hash_file(self._layout.artifact(sha256)) == sha256
        except OSError:
            return False

    def salvage(self, chunk_map: ChunkMap, *, in_place: bool) -> None:
        """Take its name from a damaged file and keep what is whole in it.

        Args:
            chunk_map: of the file; says which chunks are damaged.
            in_place: the file itself becomes the one under way, so that a repair needs no room for a second one. Not
                while an engine has it mapped: then it is put aside, and chunks are taken from there.
        """
        path = self._layout.artifact(chunk_map.artifact_sha256)
        partial, bitmap = _partial_paths(path)
        if not in_place:
            os.replace(path, _damaged_path(path))
            sync_folder(path.parent)
            return
        done = bytearray()
        with path.open("r+b") as file:
            for _, chunk in chunk_map.offsets():
                done.append(sha256_hex(file.read(chunk.bytes)) == chunk.sha256)
            file.truncate(chunk_map.artifact_bytes)
            os.fsync(file.fileno())
        partial.unlink(missing_ok=True)
        write_atomic(
            bitmap, bytes(done), mode=0o600
        )  # without its file a bitmap means nothing: it may come first
        os.replace(path, partial)
        sync_folder(path.parent)

    def assembly(self, chunk_map: ChunkMap) -> Assembly:
        """Begin, or go on with, writing a file from chunks."""
        return Assembly(self._layout, chunk_map)

    def collect_garbage(self, keep: Iterable[str]) -> int:
        """Remove every file that is not in ``keep``; returns the bytes that became free."""
        wanted = set(keep)
        freed = 0
        for path in self._layout.artifacts.iterdir():
            name, _, kind = path.name.partition(".")
            if name in wanted and kind != "damaged":
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

    @property
    def reserved_bytes(self) -> int:
        """Room that the file under way has taken already for chunks that are not there yet."""
        try:
            taken = self._partial.stat().st_blocks * 512
        except FileNotFoundError:
            return 0
        return max(taken - (self._map.artifact_bytes - self.missing_bytes), 0)

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
        if not self._map.chunks:  # an empty file has no chunk that would have made it
            self._partial.touch(mode=0o600)
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
        _damaged_path(self._target).unlink(missing_ok=True)
        sync_folder(self._target.parent)


class LocalChunks:
    """Chunks that the device already has inside whole files: an update takes them from there, not from the network."""

    def __init__(self, store: ArtifactStore, files: Iterable[tuple[str, str]]) -> None:
        """Index files.

        Args:
            store: the device's artifacts.
            files: (digest of a whole file, digest of its chunk map).
        """
        self._places: dict[str, list[tuple[Path, int, int]]] = {}
        for artifact, chunk_map in files:
            path = store.path(artifact)
            paths = [found for found in (path, _damaged_path(path)) if found.exists()]
            if not paths:
                continue
            try:
                offsets = list(decode_chunk_map(store.read_blob(chunk_map)).offsets())
            except TrustError:
                continue  # damaged on disk: what it tells the places of is fetched instead
            for offset, chunk in offsets:
                places = self._places.setdefault(chunk.sha256, [])
                places += [(found, offset, chunk.bytes) for found in paths]

    def get(self, sha256: str) -> bytes | None:
        """A chunk's bytes, hashed again; None when it is not here or was damaged."""
        for path, offset, size in self._places.get(sha256, ()):
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    content = file.read(size)
            except OSError:
                continue
            if sha256_hex(content) == sha256:
                return content
        return None


def _damaged_path(target: Path) -> Path:
    return target.with_name(target.name + ".damaged")


def _partial_paths(target: Path) -> tuple[Path, Path]:
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".bitmap")


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
