"""Files that are whole or absent: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from slmops.core.errors import NoSpaceError

#: what a full disk, a quota or a file-size limit says
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def no_space(error: OSError, folder: Path, needed_bytes: int | None = None) -> NoSpaceError:
    """The error for a disk that took no more."""
    return NoSpaceError(
        f"{folder}: no space for the bytes that came: {error.strerror}",
        hint="free disk in the server's data folder; nothing half-written was kept, send it again",
        needed_bytes=needed_bytes,
    )


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Put a small file in place, whole or not at all.

    Raises:
        NoSpaceError: the disk is full.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        if error.errno in FULL:
            raise no_space(error, path.parent, len(content)) from error
        raise
    sync_folder(path.parent)
