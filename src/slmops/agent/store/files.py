"""Atomic, durable files: temporary + fsync + rename + fsync of the folder. A reader sees the old or the new, never neither."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from slmops.core.errors import NoSpaceError, SlmopsError


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file as a whole, durably.

    Raises:
        NoSpaceError: the disk is full; the old content is untouched and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise as_device_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_device_error(error: OSError, path: Path) -> SlmopsError | OSError:
    """Our name for a failed write: a full disk is an environment failure, anything else stays what it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(
            f"{path}: no space left on the device ({error.strerror})",
            hint="free some disk, or run 'slmops agent cache --prune'; what the device serves is untouched",
            path=str(path),
        )
    return error


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write in a folder's file system."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
