"""Writing files whole or not at all, and reading them by digest."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.core.errors import DigestError, NoSpaceError, NotFoundError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_full_disks(where: Path) -> Iterator[None]:
    """Turn "no space left" and its kin into our error.

    Raises:
        NoSpaceError: with the place, and the bytes that are free there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(where.parent).free if where.parent.exists() else 0
        raise NoSpaceError(
            f"{where}: {error.strerror}; {free} bytes are free there",
            hint="free some space or write to another disk; nothing was half-written",
            path=str(where),
            free_bytes=free,
        ) from error


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that it holds all of ``content`` or does not change; never readable by more than ``mode`` says.

    Raises:
        NoSpaceError: the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming_full_disks(path):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as sink:
                sink.write(content)
                sink.flush()
                os.fsync(sink.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Bring a rename to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_by_digest(path: Path, sha256: str, size_bytes: int) -> bytes:
    """A small file's bytes, checked.

    Raises:
        NotFoundError: it is missing.
        DigestError: it was changed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", hint="build or create the release again") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256 or len(content) != size_bytes:
        raise DigestError(
            f"{path}: expected sha256 {sha256} and {size_bytes} bytes, got {actual} and {len(content)}",
            hint="the file was changed after it was made: build again; the steps are cached",
            expected=sha256,
            actual=actual,
        )
    return content


def link_or_copy(source: Path, target: Path) -> None:
    """Give a read-only file a second name; on another file system, a copy."""
    try:
        os.link(source, target)
    except OSError:
        with naming_full_disks(target):
            shutil.copyfile(source, target)
            with target.open("rb") as copied:
                os.fsync(copied.fileno())
