"""Uploading a bundle to a control plane: only what is missing there is sent; repeating it is safe, so is stopping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from slmops.release.bundle import ReleaseBundle


class Receiver(Protocol):
    """What publishing needs of a control plane; ``slmops.client.ControlPlane`` has it."""

    def missing_blobs(self, digests: Sequence[str], /) -> list[str]:
        """Those that are not there."""
        ...

    def put_blob(self, sha256: str, content: bytes, /) -> None:
        """Store one under its digest."""
        ...

    def publish_release(self, target_path: str, targets: bytes, manifest: bytes) -> object:
        """Make the signed release visible, now that all of its blobs are there."""
        ...


@dataclass(frozen=True, slots=True)
class PublishEvent:
    """Progress: blobs and bytes sent so far, of those that were missing."""

    blobs_sent: int
    blobs_to_send: int
    bytes_sent: int
    bytes_to_send: int

    def __str__(self) -> str:
        """One line for people."""
        megabytes = f"{self.bytes_sent / 1e6:.1f} of {self.bytes_to_send / 1e6:.1f} MB"
        return f"{self.blobs_sent} of {self.blobs_to_send} blobs, {megabytes}"


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What was sent, and what the control plane had already."""

    release_sha256: str
    blobs_sent: int
    bytes_sent: int
    blobs_present: int
    bytes_present: int


def publish(
    bundle: ReleaseBundle,
    control_plane: Receiver,
    progress: Callable[[PublishEvent], None] = lambda event: None,
) -> PublishReport:
    """Send what is missing, then publish.

    Raises:
        DigestError: the bundle was changed after it was signed; nothing was published.
        SlmopsError: as the control plane says; send again to go on.
    """
    blobs = {blob.sha256: blob for blob in bundle.blobs()}
    missing = [blobs[sha256] for sha256 in control_plane.missing_blobs(list(blobs))]
    to_send, sent, sent_bytes = sum(blob.size_bytes for blob in missing), 0, 0
    for blob in missing:
        control_plane.put_blob(blob.sha256, blob.content())
        sent, sent_bytes = sent + 1, sent_bytes + blob.size_bytes
        progress(PublishEvent(sent, len(missing), sent_bytes, to_send))
    control_plane.publish_release(
        target_path=bundle.target_path, targets=bundle.targets, manifest=bundle.manifest
    )
    total = sum(blob.size_bytes for blob in blobs.values())
    return PublishReport(bundle.digest, sent, sent_bytes, len(blobs) - sent, total - sent_bytes)
