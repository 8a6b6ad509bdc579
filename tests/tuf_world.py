"""Keys, a control plane's published files, and devices with python-tuf's own client, all in memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from slmops.artifact import trust

#: python-tuf reads the clock itself; metadata is dated from here and devices are told the time
NOW = datetime.now(timezone.utc).replace(microsecond=0)


def new_key() -> CryptoSigner:
    """A P-256 key pair."""
    return CryptoSigner(generate_private_key(SECP256R1()))


class World:
    """One operator, one control plane.

    Attributes:
        files: what ``GET /v1/tuf/{file}`` would serve.
        targets: the operator's targets metadata.
    """

    def __init__(
        self, release_signers: Sequence[Signer] | None = None, thresholds: tuple[int, int] = (1, 1)
    ) -> None:
        self.root_signers = [new_key()]
        self.release_signers = list(release_signers or [new_key()])
        self.online = new_key()
        self.root = trust.new_root(
            self.root_signers,
            [signer.public_key for signer in self.release_signers],
            [self.online.public_key],
            NOW,
            thresholds=thresholds,
        )
        self.targets = trust.new_targets(self.release_signers, NOW)
        self.files: dict[str, bytes] = {"1.root.json": self.root}
        self._snapshot: bytes | None = None
        self.publish()

    def release(self, path: str, manifest: bytes, release_seq: int) -> None:
        """Sign a release and publish it, as the command line and the control plane do."""
        new = trust.add_release(self.targets, path, manifest, release_seq, self.release_signers, NOW)
        trust.check_targets(trust.check_root(self.root), new, previous=self.targets)
        self.targets = new
        self.publish()

    def publish(self, now: datetime = NOW) -> None:
        """New snapshot and timestamp over the current targets."""
        files = trust.publish(
            trust.check_root(self.root),
            self.targets,
            self._snapshot,
            self.files.get("timestamp.json"),
            self.online,
            now,
        )
        self._snapshot = next(content for name, content in files.items() if name.endswith("snapshot.json"))
        self.files.update(files)

    def device(self, folder: Path) -> Device:
        """A device that pins this world's root, keeps its cache in ``folder`` and fetches from here."""
        return Device(self, folder)


class Device(FetcherInterface):
    """A device: python-tuf's Updater over a cache folder, fetching from a world's files.

    Attributes:
        world: whose files it fetches; point it to another world for an attack.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self._root = world.root

    def find(self, path: str, now: datetime | None = None) -> TargetFile | None:
        """Refresh from the world's files and look a target up."""
        updater = Updater(str(self.folder), "http://control-plane/", fetcher=self, bootstrap=self._root)
        if now is not None:
            updater._trusted_set.reference_time = now  # as the agent does with the clock that it learned
        updater.refresh()
        return updater.get_targetinfo(path)

    def _fetch(self, url: str):  # type: ignore[no-untyped-def]
        name = url.rsplit("/", 1)[1]
        if name not in self.world.files:
            raise DownloadHTTPError(f"{name} is not here", 404)
        return iter([self.world.files[name]])
