"""Releases: taken in only when every byte that they name is here, then published, shown and promoted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from slmops.artifact.chunkmap import decode_chunk_map
from slmops.artifact.digest import canonical_json, require_digest
from slmops.artifact.manifest import (
    MAX_DOCUMENT_BYTES,
    ArtifactEntry,
    Blob,
    GoldenPack,
    NamedBlob,
    Release,
    Variant,
    VariantEntry,
    decode,
    release_digest,
)
from slmops.artifact.trust import load_targets, release_seq_of, target_digest
from slmops.client.records import GoldenPackRecord, ReleaseDetail, ReleaseRecord, VariantRecord
from slmops.core.errors import NotFoundError, TrustError, UsageError
from slmops.server.ports.rows import ChannelRow, ReleaseRow
from slmops.server.ports.store import Store
from slmops.server.ports.world import Bell, ChunkStore, Clock
from slmops.server.services.publication import Publication, manifest_text
from slmops.server.services.words import SERVER, Caller, Role, rfc3339


@dataclass(frozen=True, slots=True)
class OpenVariant:
    """A variant with its manifest read."""

    entry: VariantEntry
    variant: Variant

    @property
    def sha256(self) -> str:
        """Digest of the variant manifest."""
        return self.entry.sha256

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(artifact.bytes for artifact in self.variant.artifacts)


@dataclass(frozen=True, slots=True)
class OpenRelease:
    """A release with all variant manifests read."""

    digest: str
    target_path: str
    release: Release
    variants: tuple[OpenVariant, ...]


class Catalogue:
    """Published releases."""

    def __init__(
        self, store: Store, chunks: ChunkStore, publication: Publication, clock: Clock, bell: Bell
    ) -> None:
        """Take in releases that were signed into the metadata before a crash kept them out of the database."""
        self._store = store
        self._chunks = chunks
        self._publication = publication
        self._clock = clock
        self._bell = bell
        self._lock = threading.Lock()
        self._open: dict[str, OpenRelease] = {}
        self._variants: dict[str, Variant] = {}
        self._recover()

    def publish(self, caller: Caller, target_path: str, targets: str, manifest: str) -> ReleaseRecord:
        """Publish a signed release.

        Args:
            caller: who publishes.
            target_path: of the release manifest in the targets metadata.
            targets: the new targets metadata, signed by the release keys.
            manifest: canonical bytes of the manifest, as text.

        Raises:
            SignatureError, DowngradeError, ConflictError: the metadata is not signed properly or does not move forward.
            DigestError: the manifest is not the one that was signed.
            UsageError: something that the release names was not uploaded.
        """
        caller.require(Role.OPERATOR, "publishing a release")
        signed, content = targets.encode(), manifest_text(manifest)
        with self._lock:
            self._publication.check(signed)
            require_digest(content, target_digest(signed, target_path), f"manifest of {target_path}")
            release = decode(content, Release)
            self._check_names(release, target_path, content, signed)
            self._check_complete(release)
            with self._chunks.upload(release_digest(content), len(content)) as upload:
                upload.write(content)
                upload.commit()
            self._publication.publish(signed)
            self._add(release, target_path, content, caller, self._clock.now())
        self._bell.ring()
        return self.record(release.model, release.version)

    def _check_names(self, release: Release, target_path: str, content: bytes, targets: bytes) -> None:
        if canonical_json(release) != content:
            raise TrustError(
                "the manifest is not in canonical form, or has fields that this version does not know",
                hint="use slmops release create of the same version",
            )
        if release.target_path() != target_path:
            raise TrustError(
                f"{target_path} holds the manifest of {release.target_path()}",
                hint="sign it under its own path",
            )
        signed_seq = release_seq_of(load_targets(targets).signed.targets[target_path])
        if signed_seq != release.release_seq:
            raise TrustError(
                f"release_seq is {release.release_seq} in the manifest and {signed_seq} in targets.json",
                hint="let slmops release create choose the number",
            )

    def _check_complete(self, release: Release) -> None:
        missing = self._chunks.missing([entry.sha256 for entry in release.variants])
        if not missing:
            missing = self._chunks.missing([blob.sha256 for blob in self._small_files(release)])
        if not missing:
            missing = self._chunks.missing([blob.sha256 for blob in self._chunk_blobs(release)])
        if missing:
            shown = ", ".join(digest[:12] for digest in missing[:3])
            raise UsageError(
                f"the release is not complete: {len(missing)} blobs were not uploaded ({shown} ...)",
                hint="ask POST /v1/blobs/missing and upload them first; slmops release publish does",
                missing=len(missing),
                first=missing[0],
            )
        for blob in (*self._small_files(release), *self._chunk_blobs(release)):
            size = self._chunks.size(blob.sha256)
            if size != blob.bytes:
                raise TrustError(
                    f"blob {blob.sha256} has {size} bytes, the release says {blob.bytes}",
                    hint="build the release again",
                )

    def _small_files(self, release: Release) -> Iterator[Blob | NamedBlob]:
        yield from (release.golden_pack, release.evidence, release.provenance)
        yield from release.prompts
        yield from release.adapters
        for entry in release.variants:
            variant = self._read_variant(entry)
            yield variant.golden
            yield from (artifact.chunk_map for artifact in variant.artifacts)

    def _chunk_blobs(self, release: Release) -> Iterator[Blob]:
        for entry in release.variants:
            for artifact in self._read_variant(entry).artifacts:
                yield from self._chunks_of(artifact)

    def _chunks_of(self, artifact: ArtifactEntry) -> Iterator[Blob]:
        chunk_map = decode_chunk_map(self.read_blob(artifact.chunk_map.sha256))
        if (chunk_map.artifact_sha256, chunk_map.artifact_bytes) != (artifact.sha256, artifact.bytes):
            raise TrustError(
                f"the chunk map of {artifact.path} describes another file", hint="build the release again"
            )
        for chunk in chunk_map.chunks:
            yield Blob(chunk.bytes, chunk.sha256)

    def _read_variant(self, entry: VariantEntry) -> Variant:
        variant = self.variant(entry.sha256)
        if (variant.profile, variant.runtime.name) != (entry.profile, entry.runtime):
            raise TrustError(
                f"variant {entry.sha256[:12]} is for {variant.profile} on {variant.runtime.name}, "
                f"the release says {entry.profile} on {entry.runtime}",
                hint="build the release again",
            )
        variant.check_files()
        if variant.artifact_bytes != entry.artifact_bytes:
            raise TrustError(
                f"variant {entry.sha256[:12]} has files of {variant.artifact_bytes} bytes, "
                f"the release says {entry.artifact_bytes}",
                hint="build the release again",
            )
        return variant

    def _add(self, release: Release, target_path: str, content: bytes, caller: Caller, now: datetime) -> None:
        digest = release_digest(content)
        with self._store.write() as tx:
            if tx.releases.get(digest) is not None:
                return
            row = ReleaseRow(
                digest=digest,
                model=release.model,
                version=release.version,
                release_seq=release.release_seq,
                target_path=target_path,
                manifest=content.decode(),
                published_at=now,
                published_by=caller.name,
            )
            tx.releases.add(row)
            name = f"{release.model}@{release.version}"
            tx.journal.event(now, "release.published", name, {"digest": digest})
            waivers = [waiver.gate for waiver in release.waivers]
            tx.journal.audit(
                now, caller.name, "release.publish", name, {"digest": digest, "waivers": waivers}
            )

    def _recover(self) -> None:
        """Signed metadata is published before the row is written: after a crash between the two, write the row now."""
        for path, target in load_targets(self._publication.targets()).signed.targets.items():
            digest = target.hashes["sha256"]
            with self._store.read() as tx:
                known = tx.releases.get(digest) is not None
            if not known and self._chunks.size(digest) is not None:
                content = self.read_blob(digest)
                self._add(decode(content, Release), path, content, SERVER, self._clock.now())

    # ---- reading --------------------------------------------------------------------------------------------------

    def read_blob(self, sha256: str) -> bytes:
        """A small document from the blobs, verified.

        Raises:
            NotFoundError: it is not here.
            TrustError: it is too large for a document.
        """
        size = self._chunks.size(sha256)
        if size is not None and size > MAX_DOCUMENT_BYTES:
            raise TrustError(
                f"blob {sha256} has {size} bytes, too many for a document", hint="build the release again"
            )
        content = b"".join(self._chunks.read(sha256))
        require_digest(content, sha256, "blob")
        return content

    def variant(self, sha256: str) -> Variant:
        """A variant manifest by digest."""
        if sha256 not in self._variants:
            self._variants[sha256] = decode(self.read_blob(sha256), Variant)
        return self._variants[sha256]

    def open(self, digest: str) -> OpenRelease:
        """A release with its variants; releases never change, so they are read once."""
        if digest not in self._open:
            with self._store.read() as tx:
                row = tx.releases.get(digest)
            if row is None:
                raise NotFoundError(
                    f"no release has digest {digest}", hint="slmops release list shows what is published"
                )
            release = decode(row.manifest.encode(), Release)
            variants = tuple(OpenVariant(entry, self._read_variant(entry)) for entry in release.variants)
            self._open[digest] = OpenRelease(digest, row.target_path, release, variants)
        return self._open[digest]

    def named(self, model: str, version: str) -> ReleaseRow:
        """A release by name.

        Raises:
            NotFoundError: there is none.
        """
        with self._store.read() as tx:
            row = tx.releases.named(model, version)
            versions = [known.version for known in tx.releases.all(model)]
        if row is None:
            known = f"{model} has {', '.join(versions[:8])}" if versions else f"{model} has no releases"
            raise NotFoundError(
                f"no release {model} {version}: {known}", hint="slmops release list shows what is published"
            )
        return row

    def record(self, model: str, version: str) -> ReleaseRecord:
        """A release in one line."""
        row = self.named(model, version)
        with self._store.read() as tx:
            channels = tx.releases.channels()
        return _record(row, channels)

    def records(self, model: str | None = None) -> list[ReleaseRecord]:
        """Releases, newest first."""
        with self._store.read() as tx:
            rows, channels = tx.releases.all(model), tx.releases.channels()
        return [_record(row, channels) for row in rows]

    def detail(self, model: str, version: str) -> ReleaseDetail:
        """A release with variants and evidence."""
        row = self.named(model, version)
        opened = self.open(row.digest)
        release = opened.release
        pack = decode(self.read_blob(release.golden_pack.sha256), GoldenPack)
        line = self.record(model, version)
        return ReleaseDetail(
            **{name: getattr(line, name) for name in ReleaseRecord.__struct_fields__},
            base=release.base,
            created=release.created,
            variants=tuple(_variant_record(variant) for variant in opened.variants),
            golden_pack=GoldenPackRecord(
                sha256=release.golden_pack.sha256,
                prompts=len(pack.prompts),
                max_drop_ratio=pack.max_drop_ratio,
                weakened=release.golden_weakened,
            ),
            evidence=self._evidence(release),
        )

    def _evidence(self, release: Release) -> Any:
        try:
            return msgspec.json.decode(self.read_blob(release.evidence.sha256))
        except msgspec.MsgspecError:
            return None  # signed, but not JSON: the digest in the manifest still names it

    def name_of(self, digest: str) -> str:
        """``model version`` of a release; empty when it is not ours."""
        if not digest:
            return ""
        try:
            release = self.open(digest).release
        except NotFoundError:
            return ""
        return f"{release.model} {release.version}"


def _record(row: ReleaseRow, channels: list[ChannelRow]) -> ReleaseRecord:
    release = decode(row.manifest.encode(), Release)
    return ReleaseRecord(
        digest=row.digest,
        model=row.model,
        version=row.version,
        release_seq=row.release_seq,
        target_path=row.target_path,
        published_at=rfc3339(row.published_at),
        published_by=row.published_by,
        licence=release.licence,
        channels=tuple(entry.channel for entry in channels if entry.release_digest == row.digest),
        profiles=tuple(entry.profile for entry in release.variants),
        waivers=release.waivers,
    )


def _variant_record(opened: OpenVariant) -> VariantRecord:
    variant = opened.variant
    return VariantRecord(
        profile=variant.profile,
        runtime=variant.runtime.name,
        runtime_version=variant.runtime.version,
        sha256=opened.sha256,
        artifact_bytes=opened.artifact_bytes,
        also_for=variant.also_for,
        quantised=variant.quantised,
        measured=variant.measured,
        predicted_decode_tps=variant.predicted_decode_tps,
    )
