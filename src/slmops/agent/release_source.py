"""From an assignment to verified documents: TUF first, then every document by its digest.

The chain: pinned root -> timestamp -> snapshot -> targets -> release manifest -> variant manifest -> chunk map. What
the control plane says in an assignment is only a wish until the same digests come out of this chain.

Source: TUF specification 1.0.33, section 5 (python-tuf's client does it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slmops.agent.ports import ControlPlane
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.slots import SCHEMA as SLOT_SCHEMA
from slmops.agent.store.slots import Slot, SlotArtifact
from slmops.artifact.chunkmap import ChunkMap, decode_chunk_map
from slmops.artifact.manifest import Release, Variant, assignment_digest, decode
from slmops.core.device.fit import engine_for
from slmops.core.errors import (
    DigestError,
    ExpiredMetadataError,
    NetworkError,
    SlmopsError,
    TrustError,
    UsageError,
)
from slmops.protocol.messages import Assignment

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile


@dataclass(frozen=True, slots=True)
class ResolvedRelease:
    """An assignment whose documents were all verified and are on disk.

    Attributes:
        chunk_maps: how each of the variant's files is cut, in their order.
        engine: runtime that will serve it here; the variant's own where none is installed, and then it is refused.
    """

    assignment: Assignment
    release: Release
    variant: Variant
    chunk_maps: tuple[ChunkMap, ...]
    engine: str

    def slot(self) -> Slot:
        """The slot manifest that this release will be."""
        artifacts = [
            SlotArtifact("release", self.assignment.release_sha256, 0),
            SlotArtifact("variant", self.assignment.variant_sha256, 0),
        ]
        for file in self.variant.artifacts:
            path = file.path if self.variant.in_folder else ""
            artifacts.append(SlotArtifact(file.role, file.sha256, file.bytes, file.chunk_map.sha256, path))
            artifacts.append(SlotArtifact("chunk-map", file.chunk_map.sha256, file.chunk_map.bytes))
        artifacts += [
            SlotArtifact("golden-pack", self.release.golden_pack.sha256, self.release.golden_pack.bytes),
            SlotArtifact("golden-expectations", self.variant.golden.sha256, self.variant.golden.bytes),
        ]
        artifacts += [SlotArtifact(f"prompt:{p.name}", p.sha256, p.bytes) for p in self.assignment.prompts]
        return Slot(SLOT_SCHEMA, self.assignment, tuple(artifacts), self.engine, self.release.model)


class ReleaseSource:
    """Fetches and verifies the documents of a release."""

    def __init__(
        self,
        server: ControlPlane,
        store: ArtifactStore,
        tuf_folder: Path,
        tuf_root: bytes,
        runtimes: Callable[[], Collection[str]],
    ) -> None:
        """Trust ``tuf_root``, the root metadata pinned at enrolment; ``runtimes`` gives the engines of this device."""
        self._runtimes = runtimes
        self._server = server
        self._store = store
        self._tuf_folder = tuf_folder
        self._tuf_root = tuf_root

    async def resolve(self, assignment: Assignment) -> ResolvedRelease:
        """Verify everything that an assignment names, except the weights themselves.

        Raises:
            TrustError: the chain does not hold: wrong signature, digest, release_seq or assignment digest.
            TransientError: the control plane could not be reached; nothing was changed.
        """
        if assignment.serving is None:
            raise UsageError(
                "the assignment has no serving settings", hint="the control plane is of another version"
            )
        target = await asyncio.to_thread(self._verified_target, assignment.target_path)
        digest, seq = _digest_and_seq(target)
        if digest != assignment.release_sha256 or seq != assignment.release_seq:
            raise DigestError(
                f"{assignment.target_path}: signed as sha256 {digest}, release_seq {seq}; "
                f"the control plane assigned {assignment.release_sha256}, {assignment.release_seq}",
                hint="the control plane offers what was never signed: do not trust it until this is understood",
            )
        release = decode(await self._blob(digest, target.length), Release)
        entry = next((v for v in release.variants if v.sha256 == assignment.variant_sha256), None)
        if entry is None or release.release_seq != seq:
            raise TrustError(
                "the assigned variant is not part of the signed release",
                hint="the control plane mixes releases",
            )
        variant = decode(await self._blob(entry.sha256, entry.bytes), Variant)
        self._check_identity(assignment, release, variant)
        variant.check_files()
        chunk_maps = []
        for file in variant.artifacts:
            chunk_map = decode_chunk_map(await self._blob(file.chunk_map.sha256, file.chunk_map.bytes))
            if chunk_map.artifact_sha256 != file.sha256 or chunk_map.artifact_bytes != file.bytes:
                raise TrustError(
                    f"the chunk map of {file.path} is of another file than the variant names",
                    hint="the release was made by a broken tool",
                )
            chunk_maps.append(chunk_map)
        wanted = {prompt.sha256 for prompt in assignment.prompts}
        small = [(p.sha256, p.bytes) for p in release.prompts if p.sha256 in wanted]
        for blob in (release.golden_pack, variant.golden):
            small.append((blob.sha256, blob.bytes))
        for sha256, size_bytes in small:
            await self._blob(sha256, size_bytes)
        engine = engine_for(variant.runtime.name, self._runtimes()) or variant.runtime.name
        return ResolvedRelease(assignment, release, variant, tuple(chunk_maps), engine)

    def _check_identity(self, assignment: Assignment, release: Release, variant: Variant) -> None:
        signed_prompts = {prompt.sha256: prompt.name for prompt in release.prompts}
        for prompt in assignment.prompts:
            if signed_prompts.get(prompt.sha256) != prompt.name:
                raise TrustError(
                    f"prompt {prompt.name!r} is not part of the signed release",
                    hint="prompts are signed artifacts: release them first",
                )
        if assignment.adapters:
            raise UsageError("this agent cannot overlay adapters yet", hint="update slmops on the device")
        computed = assignment_digest(
            release=assignment.release_sha256,
            variant=assignment.variant_sha256,
            adapters=tuple(a.sha256 for a in assignment.adapters),
            prompts=tuple(p.sha256 for p in assignment.prompts),
            serving=msgspec.to_builtins(assignment.serving),
            golden=variant.golden.sha256,
        )
        if computed != assignment.assignment_digest:
            raise DigestError(
                f"assignment digest computes to {computed}, the control plane says {assignment.assignment_digest}",
                hint="control plane and device differ in version, or the assignment was tampered with",
            )

    async def _blob(self, sha256: str, size_bytes: int) -> bytes:
        if self._store.has(sha256):
            try:
                return self._store.read_blob(sha256)
            except DigestError:
                pass  # damaged on disk: fetch it again
        content = await self._server.fetch_chunk(sha256, size_bytes)
        await asyncio.to_thread(self._store.put_blob, sha256, content)
        return content

    def _verified_target(self, path: str) -> TargetFile:
        """Run TUF's client workflow (blocking)."""
        from tuf.api.exceptions import DownloadError, RepositoryError  # noqa: PLC0415 - loaded only when a release arrives
        from tuf.api.exceptions import ExpiredMetadataError as TufExpired  # noqa: PLC0415
        from tuf.ngclient import Updater  # noqa: PLC0415

        try:
            updater = Updater(
                metadata_dir=str(self._tuf_folder),
                metadata_base_url="http://control-plane/",
                fetcher=_fetcher(self._server),
                bootstrap=self._tuf_root,
            )
            updater.refresh()
            target = updater.get_targetinfo(path)
        except SlmopsError:
            raise
        except TufExpired as error:
            raise ExpiredMetadataError(
                f"signed metadata is expired: {error}",
                hint="renew the control plane's timestamp; the device keeps serving",
            ) from error
        except RepositoryError as error:
            raise TrustError(
                f"the release metadata does not verify: {error}",
                hint="do not trust this control plane until this is understood",
            ) from error
        except DownloadError as error:
            raise NetworkError(
                f"release metadata could not be fetched: {error}", hint="retried by itself"
            ) from error
        if target is None:
            raise TrustError(f"{path} is not among the signed releases", hint="publish the release first")
        return target


def _fetcher(server: ControlPlane):  # type: ignore[no-untyped-def]
    from tuf.api.exceptions import DownloadHTTPError  # noqa: PLC0415
    from tuf.ngclient import FetcherInterface  # noqa: PLC0415

    class _Fetcher(FetcherInterface):
        """python-tuf's port, over ours."""

        def _fetch(self, url: str):  # type: ignore[no-untyped-def]
            content = server.fetch_metadata(url.rsplit("/", 1)[1], 8 << 20)
            if content is None:
                raise DownloadHTTPError(f"{url} not found", 404)
            return iter([content])

    return _Fetcher()


def _digest_and_seq(target: TargetFile) -> tuple[str, int]:
    from slmops.artifact.trust import release_seq_of  # noqa: PLC0415 - imports tuf

    return target.hashes.get("sha256", ""), release_seq_of(target)
