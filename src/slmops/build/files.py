"""Writing files whole or not at all, and hashing them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.core.errors import NoSpaceError

_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_full_disks(where: Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into our error.

    Raises:
        NoSpaceError: with the place, and the bytes that are free there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_space(where, error) from error


def no_space(where: Path, error: OSError) -> NoSpaceError:
    """Our words for a disk that is full, or a quota or file-size limit that was hit."""
    place = where if where.exists() else where.parent
    free = shutil.disk_usage(place).free if place.exists() else 0
    return NoSpaceError(
        f"{where}: {error.strerror}; {free} bytes are free there, a build needs about 12 times its base model",
        hint="free some space (an old cache folder can be deleted), or point --cache and --out to another disk; "
        "nothing was half-written",
        path=str(where),
        free_bytes=free,
    )


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's entries (a rename in it) to the disk."""
    sync_file(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it holds all of ``content`` or does not change.

    Raises:
        NoSpaceError: the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming_full_disks(path), temporary.open("wb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a cached, read-only file a second name; on another file system, a copy.

    Raises:
        NoSpaceError: the disk is full.
    """
    try:
        os.link(source, target)
    except OSError:
        with naming_full_disks(target):
            shutil.copyfile(source, target)
        sync_file(target)
