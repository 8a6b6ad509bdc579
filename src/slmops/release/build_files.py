"""Reading a build directory for a release: only what was hashed here is signed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from slmops.artifact.build_index import INDEX, Build, BuiltFile, decode_index
from slmops.core.errors import DigestError, NotFoundError


def read_index(folder: Path) -> Build:
    """Read a build directory and hash every file that it names: only what was hashed here is signed.

    Raises:
        NotFoundError: no build directory, or a file is missing.
        UsageError: it is of another version.
        DigestError: a file was changed after the build.
    """
    try:
        content = (folder / INDEX).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"{folder} is no build directory: it has no {INDEX}",
            hint="make one: slmops build run RECIPE --out DIR",
        ) from error
    index = decode_index(content, str(folder / INDEX))
    for file in index.files():
        _check(folder / file.path, file)
    return index


def _check(path: Path, file: BuiltFile) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as source:
            while block := source.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", hint="build again; the steps are cached") from error
    if digest.hexdigest() != file.sha256:
        raise DigestError(
            f"{path}: expected sha256 {file.sha256}, got {digest.hexdigest()}",
            hint="the file was changed after the build, so the evidence is not about it: build again; the steps are cached",
            expected=file.sha256,
            actual=digest.hexdigest(),
        )
