"""Reading a build directory's index: what a release needs of ``build.json`` (unknown fields are ignored).

The build room writes this document (``slmops.build.directory``); the two rooms share its format, not their code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from slmops.artifact.manifest import Measured, RuntimeNeed
from slmops.core.errors import DigestError, NotFoundError, UsageError

SCHEMA = 1
INDEX = "build.json"


class BuiltFile(msgspec.Struct, frozen=True):
    """A file; ``path`` is relative to the build directory."""

    path: str
    bytes: int
    sha256: str


class GateFinding(msgspec.Struct, frozen=True):
    """One gate's answer about one variant."""

    gate: str
    verdict: str
    reason: str


class BuiltVariant(msgspec.Struct, frozen=True):
    """One variant; the fields mean what they mean in ``artifact.manifest.Variant``."""

    profile: str
    runtime: RuntimeNeed
    also_for: tuple[str, ...]
    model: BuiltFile
    chunk_map: BuiltFile
    golden_expectations: BuiltFile
    shape: dict[str, int]
    measured: Measured
    quantised: dict[str, int]
    predicted_decode_tps: float | None
    findings: tuple[GateFinding, ...]


class BuildIndex(msgspec.Struct, frozen=True):
    """The index."""

    schema: int
    model: str
    licence: str
    base: dict[str, Any]
    variants: tuple[BuiltVariant, ...]
    golden_pack: BuiltFile
    evidence: BuiltFile
    provenance: BuiltFile
    prompts: dict[str, BuiltFile]

    def files(self) -> list[BuiltFile]:
        """Every file that a release takes."""
        per_variant = [file for v in self.variants for file in (v.model, v.chunk_map, v.golden_expectations)]
        return [self.golden_pack, self.evidence, self.provenance, *self.prompts.values(), *per_variant]


def read_index(folder: Path) -> BuildIndex:
    """Read a build directory and hash every file that it names: only what was hashed here is signed.

    Raises:
        NotFoundError: no build directory, or a file is missing.
        UsageError: it is of another version.
        DigestError: a file was changed after the build.
    """
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=BuildIndex)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"{folder} is no build directory: it has no {INDEX}",
            hint="make one: slmops build run RECIPE --out DIR",
        ) from error
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{folder / INDEX} cannot be read: {error}",
            hint="build again with this version; the steps are cached",
        ) from error
    if index.schema != SCHEMA:
        raise UsageError(
            f"{folder / INDEX} has schema {index.schema}, {SCHEMA} can be read",
            hint="build again with this version; the steps are cached",
        )
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
