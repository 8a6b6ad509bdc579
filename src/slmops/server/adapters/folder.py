"""The server's data folder: private, and owned by one server at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from slmops.core.errors import BusyError, NotFoundError, UsageError

#: inside a data folder; ``slmops keys init`` makes it
ONLINE_KEY = Path("keys") / "online.pem"


def open_folder(folder: Path) -> Path:
    """Open a control plane's data folder, and make it private to this user.

    A folder without a control plane's key is somebody else's, or a mistyped name: it is left exactly as it is.

    Raises:
        NotFoundError: no control plane lives there.
        UsageError: it belongs to somebody else.
    """
    key = folder / ONLINE_KEY
    try:
        if not key.is_file():
            raise NotFoundError(
                f"{key} is missing: nobody has made the keys of this control plane yet",
                hint=f"run: slmops keys init --server-data {folder}",
            )
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(
            f"data folder {folder} cannot be used: {error.strerror}", hint="give another --data-dir"
        ) from error
    return folder.resolve()


class FolderLock:
    """Held by the server that runs on a data folder; the kernel lets go of it when the process dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            BusyError: another server runs on this folder.
        """
        self._descriptor = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 64).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise BusyError(
                f"{folder} is in use by another control plane (process {owner or 'unknown'})",
                hint="stop that one, or give this one its own --data-dir",
                process=owner,
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)
