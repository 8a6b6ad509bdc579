"""The bundle: a signed release as a directory, complete, before it is published anywhere.

    release.json               canonical manifest: its SHA-256 is the release
    root.json, targets.json    TUF metadata that sign it
    golden-pack.json, evidence.json, provenance.json, prompts/<name>
    variants/<profile>/        variant.json, model.gguf, chunk-map.json, golden-expectations.json
    variants/<profile>@<runtime>/   for any runtime but llama.cpp: variant.json, golden-expectations.json, and under files/
                               and chunk-maps/ one of each for every file of the variant

Blobs (what a control plane stores by digest) are the documents and the chunks; chunks are cut out of the model files by
their chunk maps while reading: there is no second copy on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.artifact.chunkmap import ChunkMap, decode_chunk_map
from slmops.artifact.digest import sha256_hex
from slmops.artifact.manifest import (
    MAX_DOCUMENT_BYTES,
    ArtifactEntry,
    Release,
    Variant,
    VariantEntry,
    decode,
    release_digest,
)
from slmops.artifact.trust import check_root, check_targets, target_digest
from slmops.core.errors import DigestError, NotFoundError, TrustError
from slmops.release.files import read_by_digest
from slmops.release.keys import ROOT_METADATA, TARGETS_METADATA, Workspace

MANIFEST, VARIANT, CHUNK_MAP, EXPECTATIONS = (
    "release.json",
    "variant.json",
    "chunk-map.json",
    "golden-expectations.json",
)
GOLDEN_PACK, EVIDENCE, PROVENANCE, PROMPTS, VARIANTS = (
    "golden-pack.json",
    "evidence.json",
    "provenance.json",
    "prompts",
    "variants",
)
FILES, CHUNK_MAPS = "files", "chunk-maps"


def variant_folder(profile: str, runtime: str) -> str:
    """Name of a variant's folder; ``@`` is in no profile's name, so no two variants can share one."""
    return profile if runtime == "llama.cpp" else f"{profile}@{runtime}"


def file_place(variant: Variant, entry: ArtifactEntry) -> str:
    """Where one of a variant's files lies in its folder."""
    return f"{FILES}/{entry.path}" if variant.in_folder else entry.path


def chunk_map_place(entry: ArtifactEntry) -> str:
    """Where the chunk map of one of a variant's files lies in its folder."""
    return CHUNK_MAP if entry.role == "model" else f"{CHUNK_MAPS}/{entry.path}.json"


@dataclass(frozen=True, slots=True)
class BundleBlob:
    """A blob of a bundle.

    Attributes:
        sha256: its digest and name; ``size_bytes``: its size.
        what: for messages.
        read: gives its bytes; they are not checked yet.
    """

    sha256: str
    size_bytes: int
    what: str
    read: Callable[[], bytes]

    def content(self) -> bytes:
        """The bytes, checked.

        Raises:
            DigestError: the bundle was changed after it was signed.
        """
        content = self.read()
        actual = sha256_hex(content)
        if actual != self.sha256:
            raise DigestError(
                f"{self.what}: expected sha256 {self.sha256}, got {actual}",
                hint="the bundle is damaged: create the release again",
                expected=self.sha256,
                actual=actual,
            )
        return content


@dataclass(frozen=True, slots=True)
class ReleaseBundle:
    """An opened bundle.

    Attributes:
        manifest: canonical bytes of the release; ``release``: the same, read.
        variants: variant manifests by digest, with the folder of their files.
    """

    path: Path
    manifest: bytes
    targets: bytes
    root: bytes
    release: Release
    variants: tuple[tuple[VariantEntry, Variant, Path], ...]

    @property
    def digest(self) -> str:
        """The identity of the release."""
        return release_digest(self.manifest)

    @property
    def target_path(self) -> str:
        """Its place in the targets metadata."""
        return self.release.target_path()

    def chunk_map(self, entry: ArtifactEntry, folder: Path) -> ChunkMap:
        """How one of a variant's files is cut."""
        return decode_chunk_map(
            read_by_digest(folder / chunk_map_place(entry), entry.chunk_map.sha256, entry.chunk_map.bytes)
        )

    def blobs(self) -> Iterator[BundleBlob]:
        """Every blob once: chunks first, the documents that name them after."""
        seen: set[str] = set()
        for blob in self.copies():
            if blob.sha256 not in seen:
                seen.add(blob.sha256)
                yield blob

    def copies(self) -> Iterator[BundleBlob]:
        """Every blob at every place where it lies."""
        yield from self._chunks()
        yield from self._documents()

    def _chunks(self) -> Iterator[BundleBlob]:
        for _, variant, folder in self.variants:
            for artifact in variant.artifacts:
                path = folder / file_place(variant, artifact)
                for offset, chunk in self.chunk_map(artifact, folder).offsets():
                    yield BundleBlob(
                        chunk.sha256, chunk.bytes, f"{path} at {offset}", _reader(path, offset, chunk.bytes)
                    )

    def _documents(self) -> Iterator[BundleBlob]:
        def small(path: Path, sha256: str, size_bytes: int) -> BundleBlob:
            return BundleBlob(sha256, size_bytes, str(path), path.read_bytes)

        for _, variant, folder in self.variants:
            yield small(folder / EXPECTATIONS, variant.golden.sha256, variant.golden.bytes)
            for artifact in variant.artifacts:
                yield small(
                    folder / chunk_map_place(artifact), artifact.chunk_map.sha256, artifact.chunk_map.bytes
                )
        release = self.release
        for name, blob in (
            (GOLDEN_PACK, release.golden_pack),
            (EVIDENCE, release.evidence),
            (PROVENANCE, release.provenance),
        ):
            yield small(self.path / name, blob.sha256, blob.bytes)
        for prompt in release.prompts:
            yield small(self.path / PROMPTS / prompt.name, prompt.sha256, prompt.bytes)
        for entry, _, folder in self.variants:
            yield small(folder / VARIANT, entry.sha256, entry.bytes)


@dataclass(frozen=True, slots=True)
class BundleReport:
    """What :func:`verify_bundle` checked."""

    release_sha256: str
    release_seq: int
    blobs: int
    artifacts: int
    bytes: int

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"release {self.release_sha256[:16]}, release_seq {self.release_seq}: {self.artifacts} files, "
            f"{self.blobs} blobs, {self.bytes} bytes hashed, signatures hold"
        )


def open_bundle(path: Path) -> ReleaseBundle:
    """Open a bundle directory; checks the documents by their digests, not yet the weights.

    Raises:
        NotFoundError: it is no bundle, or incomplete.
        TrustError: a document is malformed or was changed.
    """
    manifest = _read(path / MANIFEST)
    release = decode(manifest, Release)
    variants = []
    for entry in release.variants:
        folder = path / VARIANTS / variant_folder(entry.profile, entry.runtime)
        variant = decode(read_by_digest(folder / VARIANT, entry.sha256, entry.bytes), Variant)
        variant.check_files()
        variants.append((entry, variant, folder))
    return ReleaseBundle(
        path, manifest, _read(path / TARGETS_METADATA), _read(path / ROOT_METADATA), release, tuple(variants)
    )


def verify_bundle(bundle: ReleaseBundle, workspace: Workspace | None = None) -> BundleReport:
    """Hash every byte again and check the signatures.

    Args:
        bundle: an opened bundle.
        workspace: whose root is trusted; None trusts the bundle's own root, which proves less.

    Raises:
        SignatureError: the release is not signed by the keys that root names.
        DigestError: any byte differs from what was signed.
    """
    root = check_root(workspace.read(ROOT_METADATA) if workspace is not None else bundle.root)
    check_targets(root, bundle.targets)
    signed = target_digest(bundle.targets, bundle.target_path)
    if signed != bundle.digest:
        raise DigestError(
            f"{MANIFEST}: signed as sha256 {signed}, got {bundle.digest}",
            hint="the manifest was changed after it was signed",
            expected=signed,
            actual=bundle.digest,
        )
    count = total = artifacts = 0
    for blob in bundle.copies():
        if len(blob.content()) != blob.size_bytes:
            raise TrustError(f"{blob.what}: has not {blob.size_bytes} bytes", hint="create the release again")
        count, total = count + 1, total + blob.size_bytes
    for _, variant, folder in bundle.variants:
        for artifact in variant.artifacts:
            artifacts += 1
            _check_whole(folder / file_place(variant, artifact), artifact)
            total += artifact.bytes
    return BundleReport(bundle.digest, bundle.release.release_seq, count, artifacts, total)


def _check_whole(path: Path, artifact: ArtifactEntry) -> None:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while block := source.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != artifact.sha256:
        raise DigestError(
            f"{path}: expected sha256 {artifact.sha256}, got {digest.hexdigest()}",
            hint="the bundle is damaged: create the release again",
            expected=artifact.sha256,
            actual=digest.hexdigest(),
        )


def _reader(path: Path, offset: int, size_bytes: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as source:
            source.seek(offset)
            return source.read(size_bytes)

    return read


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise TrustError(
                f"{path} has {path.stat().st_size} bytes, {MAX_DOCUMENT_BYTES} are allowed",
                hint="this is no release bundle",
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"{path.parent} is no release bundle: it has no {path.name}",
            hint="make one: slmops release create BUILD --version V",
        ) from error
