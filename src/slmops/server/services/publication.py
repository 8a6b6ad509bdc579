"""Signed metadata: what the control plane may sign itself (snapshot, timestamp) and what it only passes on (root, targets)."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, Timestamp

from slmops.artifact.trust import check_root, check_targets, load_targets, publish
from slmops.core.errors import ConflictError, NotFoundError, TrustError
from slmops.server.ports.world import Clock, MetadataStore

#: the timestamp is signed again when less than this is left of its life
RENEW_BEFORE = timedelta(days=7)


class Publication:
    """The published TUF repository.

    Args:
        files: where it lies.
        online: the key for snapshot and timestamp.
        clock: wall clock.

    Raises:
        NotFoundError: there is no root or no targets metadata yet.
        SignatureError: root or targets are not properly signed, or root does not name the online key.
    """

    def __init__(self, files: MetadataStore, online: Signer, clock: Clock) -> None:
        """Check what is there, and publish snapshot and timestamp when they are missing or old."""
        self._files = files
        self._online = online
        self._clock = clock
        self._lock = threading.Lock()
        self._expires: datetime | None = None
        check_targets(self._root(), self.targets())
        self.renew()

    def root_text(self) -> str:
        """The newest root, which devices pin."""
        return self._latest("root").decode()

    def targets(self) -> bytes:
        """The targets metadata that is published now."""
        return self._latest("targets")

    def file(self, name: str) -> bytes:
        """One published file.

        Raises:
            NotFoundError: there is none of this name.
        """
        content = self._files.get(name)
        if content is None:
            raise NotFoundError(
                f"no metadata file {name}",
                hint="names are timestamp.json and N.root.json, N.targets.json, N.snapshot.json",
            )
        return content

    def check(self, targets: bytes) -> Metadata[Root]:
        """Check new targets metadata against root and against what is published."""
        root = self._root()
        published = self.targets()
        metadata = check_targets(root, targets, previous=published)
        now_published = load_targets(published).signed
        if metadata.signed.version == now_published.version and metadata.signed != now_published:
            raise ConflictError(
                f"targets.json version {metadata.signed.version} is published with other content",
                hint="somebody published meanwhile: run slmops release create again",
            )
        return root

    def publish(self, targets: bytes) -> None:
        """Publish checked targets metadata; what is published already stays as it is."""
        with self._lock:
            root = self.check(targets)
            # Signed again by a retry, the same statement has other signature bytes: what is published stays.
            if load_targets(targets).signed.version > load_targets(self.targets()).signed.version:
                self._sign(root, targets)

    def renew(self) -> bool:
        """Sign snapshot and timestamp again when they are missing or near their end; says whether it did."""
        with self._lock:
            if self._expires is None:
                self._expires = self._expiry()
            if self._expires is not None and self._expires - self._clock.now() > RENEW_BEFORE:
                return False
            self._sign(self._root(), self.targets())
            return True

    def _sign(self, root: Metadata[Root], targets: bytes) -> None:
        snapshot_version = self._files.latest_version("snapshot")
        snapshot = self._files.get(f"{snapshot_version}.snapshot.json") if snapshot_version else None
        self._files.publish(
            publish(
                root, targets, snapshot, self._files.get("timestamp.json"), self._online, self._clock.now()
            )
        )
        self._expires = self._expiry()

    def _expiry(self) -> datetime | None:
        content = self._files.get("timestamp.json")
        return None if content is None else Metadata[Timestamp].from_bytes(content).signed.expires

    def _root(self) -> Metadata[Root]:
        return check_root(self._latest("root"))

    def _latest(self, role: str) -> bytes:
        version = self._files.latest_version(role)
        content = self._files.get(f"{version}.{role}.json") if version else None
        if content is None:
            raise NotFoundError(
                f"the data folder has no {role}.json: nobody has made the keys of this control plane yet",
                hint="run: slmops keys init --server-data DIR (with this server's data folder)",
            )
        return content


def manifest_text(text: str) -> bytes:
    """The bytes of a manifest that came as text.

    Raises:
        TrustError: it is not plain UTF-8 (a lone surrogate in JSON, say).
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TrustError(
            f"manifest is not UTF-8: {error}", hint="send its canonical bytes as text"
        ) from error
