"""The step cache: files by their digest, and a record for each step that ended well.

    objects/ab/<sha256>     files that steps made, read-only
    steps/<key>.json        what a step gave: its JSON value and the digests of its files
    memo/ab/<key>           pieces that steps share (:mod:`slmops.build.memo`)
    work/<...>              folders of running steps; a step that fails or is killed leaves nothing anywhere else

A record is written last, after its files are on the disk, so its presence means that all of it is there. A key is the
digest of everything that the result depends on (:mod:`slmops.build.graph`). Failures are never recorded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from slmops.artifact.digest import digest_of
from slmops.build.files import naming_full_disks, sha256_of_file, sync_file, sync_folder, write_whole
from slmops.core.errors import UsageError

FOLDER_VARIABLE = "SLMOPS_CACHE"
DEFAULT_FOLDER = ".slmops-cache"


class StoredFile(msgspec.Struct, frozen=True):
    """A file that a step made.

    Attributes:
        sha256: its digest and its name in the cache; ``bytes``: its size.
        mtime_ns: as it was stored: a file that was touched since is hashed again before it is believed.
    """

    sha256: str
    bytes: int
    mtime_ns: int


class StepResult(msgspec.Struct, frozen=True):
    """What a step gave.

    Attributes:
        key: digest of everything that it depends on.
        run: the function; ``params``: its parameters; ``inputs``: digests of its inputs by name; ``tools``: versions.
        value: JSON value; ``files``: by name.
        seconds: how long it took when it was run.
    """

    key: str
    run: str
    params: dict[str, Any]
    inputs: dict[str, str]
    tools: dict[str, str]
    value: Any
    files: dict[str, StoredFile]
    seconds: float

    def value_digest(self) -> str:
        """Digest of the JSON value."""
        return digest_of(self.value)


class Cache:
    """One cache folder; made when it is first used. Several builds may share it.

    Args:
        folder: None takes ``$SLMOPS_CACHE``, else ``.slmops-cache`` in the current folder.

    Raises:
        UsageError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)).absolute()
        try:
            for name in ("objects", "steps", "work"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cache folder {self.folder} cannot be made: {error.strerror}",
                hint=f"set {FOLDER_VARIABLE} to a folder that you may write to",
            ) from error

    @property
    def memo(self) -> Path:
        """Folder of the pieces that steps share."""
        return self.folder / "memo"

    def path(self, sha256: str) -> Path:
        """Where a file of this digest lies, or would."""
        return self.folder / "objects" / sha256[:2] / sha256

    def find(self, key: str) -> StepResult | None:
        """The result of a step, if it is known and all of its files are still what they were."""
        try:
            result = msgspec.json.decode(
                (self.folder / "steps" / f"{key}.json").read_bytes(), type=StepResult
            )
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        if result.key != key or not all(self._is_whole(file) for file in result.files.values()):
            return None
        return result

    def _is_whole(self, file: StoredFile) -> bool:
        path = self.path(file.sha256)
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        if status.st_size == file.bytes and status.st_mtime_ns == file.mtime_ns:
            return True
        if status.st_size == file.bytes and sha256_of_file(path) == file.sha256:
            os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
            return True
        path.unlink(missing_ok=True)  # somebody changed it: make it again
        return False

    def work_folder(self) -> Path:
        """A new empty folder for a running step, on the cache's own file system; its name says whose it is from the start."""
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.folder / "work"))

    def sweep(self) -> None:
        """Remove the work folders of steps that were killed: those whose build is gone."""
        for folder in (self.folder / "work").iterdir():
            try:
                os.kill(int(folder.name.partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except (OSError, ValueError):
                continue  # another user's

    def keep(  # noqa: PLR0913 - the parts of a record
        self,
        key: str,
        work: Path,
        value: Any,
        *,
        run: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        tools: Mapping[str, str],
        seconds: float,
    ) -> StepResult:
        """Move a step's files into the cache, then write its record.

        Args:
            key: of the step.
            work: folder with its files; flat; names that begin with a dot are not kept.
            value: its JSON value.
            run: function, ``params``, ``inputs``, ``tools``: what the key was made of, for provenance.
            params: see above.
            inputs: see above.
            tools: see above.
            seconds: how long it took.

        Raises:
            NoSpaceError: the disk is full; nothing is recorded.
        """
        files: dict[str, StoredFile] = {}
        with naming_full_disks(self.folder):
            for path in sorted(work.iterdir()):
                if path.name.startswith(".") or not path.is_file():
                    continue
                sync_file(path)
                digest = sha256_of_file(path)
                path.chmod(0o444)
                target = self.path(digest)
                target.parent.mkdir(exist_ok=True)
                if not target.exists():
                    path.replace(target)
                    sync_folder(target.parent)
                status = target.stat()
                files[path.name] = StoredFile(digest, status.st_size, status.st_mtime_ns)
            result = StepResult(
                key, run, dict(params), dict(inputs), dict(tools), value, files, round(seconds, 3)
            )
            write_whole(
                self.folder / "steps" / f"{key}.json", msgspec.json.encode(result, order="deterministic")
            )
        return result
