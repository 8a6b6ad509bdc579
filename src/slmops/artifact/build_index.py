"""``build.json``: the index of a build directory. The build room writes it, the release room signs what it names.

Bytes in, values out; the folder itself is :mod:`slmops.build.directory`'s.
"""

from __future__ import annotations

from typing import Any

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.artifact.manifest import Measured, RuntimeNeed
from slmops.core.errors import UsageError

SCHEMA = 1
INDEX = "build.json"


class BuiltFile(msgspec.Struct, frozen=True):
    """A file of the build directory; ``path`` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


class BuiltPart(msgspec.Struct, frozen=True):
    """A further file that the engine needs beside the model file.

    Attributes:
        path: its place in the variant's own folder on a device, with forward slashes.
        format: as in ``artifact.manifest.ArtifactEntry``.
    """

    path: str
    format: str
    file: BuiltFile
    chunk_map: BuiltFile


class GateFinding(msgspec.Struct, frozen=True):
    """One gate's answer about one variant; ``verdict`` is pass, fail, inconclusive or error."""

    gate: str
    verdict: str
    reason: str
    needed: int = 0


class EarlyWarning(msgspec.Struct, frozen=True):
    """A label-free figure with its traffic light (green, amber, red); it stops nothing.

    Attributes:
        sure: the figure's whole interval is on this side of the thresholds.
    """

    signal: str
    value: float
    light: str
    sure: bool
    amber_from: float
    red_from: float


class BuiltVariant(msgspec.Struct, frozen=True):
    """One variant; the fields mean what they mean in ``artifact.manifest.Variant``.

    Attributes:
        model: the file that the engine opens; ``format``: its format; ``path``: its place in the variant's own folder.
        parts: the files that it needs beside it.
        serving: settings that its memory budget was met with: what a blueprint should say of it.
    """

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
    warnings: tuple[EarlyWarning, ...] = ()
    format: str = "gguf"
    path: str = "model.gguf"
    parts: tuple[BuiltPart, ...] = ()
    serving: dict[str, Any] = {}

    @property
    def artifact_bytes(self) -> int:
        """Size of all files together."""
        return self.model.bytes + sum(part.file.bytes for part in self.parts)

    def files(self) -> list[BuiltFile]:
        """Every file of the variant."""
        own = [self.model, self.chunk_map, self.golden_expectations]
        return own + [file for part in self.parts for file in (part.file, part.chunk_map)]


class BuiltBase(msgspec.Struct, frozen=True):
    """The untouched base."""

    name: str
    sha256: str
    licence: str


class StepRecord(msgspec.Struct, frozen=True):
    """A step of the graph, its cache key, and how long it took when it was run."""

    name: str
    key: str
    seconds: float


class Build(msgspec.Struct, frozen=True):
    """The index of a build directory.

    Attributes:
        reference_sha256: the unquantised model that everything was compared with.
        scores: task figures of ``base`` (before), ``reference`` (after the steps, unquantised) and, where the recipe cuts,
            ``dense`` (before the cuts).
        weight_steps: by step that cuts or trains, what it measured of itself; and the sparsity report's verdict.
        prompts: files by prompt name.
        fast: the evaluation was cut down.
        evaluation_set: digests of the evaluation set, of the items asked and of the held-out text: figures of two builds
            compare only where all are equal.
        folder: where it was loaded from; not part of the document.
    """

    schema: int
    model: str
    recipe_sha256: str
    licence: str
    base: BuiltBase
    reference_sha256: str
    fast: bool
    scores: dict[str, dict[str, Any]]
    variants: tuple[BuiltVariant, ...]
    golden_pack: BuiltFile
    evidence: BuiltFile
    provenance: BuiltFile
    prompts: dict[str, BuiltFile]
    steps: tuple[StepRecord, ...]
    evaluation_set: dict[str, str] = {}
    weight_steps: dict[str, dict[str, Any]] = {}

    def files(self) -> list[BuiltFile]:
        """Every file that the index names."""
        per_variant = [file for variant in self.variants for file in variant.files()]
        return [self.golden_pack, self.evidence, self.provenance, *self.prompts.values(), *per_variant]


def encode_index(build: Build) -> bytes:
    """The bytes of ``build.json``: readable, the same for the same build."""
    return msgspec.json.format(msgspec.json.encode(build, order="deterministic"), indent=1) + b"\n"


def decode_index(content: bytes, place: str) -> Build:
    """Read an index.

    Args:
        content: of ``build.json``.
        place: where it lies, for messages.

    Raises:
        UsageError: it cannot be read, or is of another version.
    """
    again = "build again with this version; the steps are cached"
    try:
        build = msgspec.json.decode(content, type=Build)
    except UNREADABLE_JSON as error:
        raise UsageError(f"{place} cannot be read: {error}", hint=again) from error
    if build.schema != SCHEMA:
        raise UsageError(f"{place} has schema {build.schema}, {SCHEMA} can be read", hint=again)
    return build
