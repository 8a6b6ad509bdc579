"""Where things lie in a device's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.artifact.digest import is_digest
from slmops.core.device.machine import SlotName
from slmops.core.errors import BugError


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one folder.

    ::

        device.json          identity: who this device is, which control plane it trusts
        external.json        how to start the owner's own server, where there is one (runtime `external`)
        keys/device.pem      private key, 0600
        tuf/                 trusted metadata, kept by python-tuf
        journal.json         the device machine's state; written before every act
        active               the pointer: the slot whose release is activated
        slots/a.json b.json  which artifacts make up a release
        artifacts/<sha256>   whole files by digest; <sha256>.partial and .bitmap while being fetched
        views/<slot>/        the files of a variant under their own names, for engines that want them so
        engines/             sockets and logs of running engines
    """

    root: Path

    @property
    def config(self) -> Path:
        """Identity and settings."""
        return self.root / "device.json"

    @property
    def external(self) -> Path:
        """The owner's own server."""
        return self.root / "external.json"

    @property
    def key(self) -> Path:
        """The device's private key."""
        return self.root / "keys" / "device.pem"

    @property
    def tuf(self) -> Path:
        """Trusted metadata."""
        return self.root / "tuf"

    @property
    def journal(self) -> Path:
        """The machine's state."""
        return self.root / "journal.json"

    @property
    def pointer(self) -> Path:
        """The activated slot's name."""
        return self.root / "active"

    @property
    def counters(self) -> Path:
        """Numbers that must only grow over restarts."""
        return self.root / "counters.json"

    @property
    def bench(self) -> Path:
        """The last bench."""
        return self.root / "bench.json"

    @property
    def lock(self) -> Path:
        """Held by the running agent."""
        return self.root / "agent.lock"

    @property
    def artifacts(self) -> Path:
        """Whole files by digest."""
        return self.root / "artifacts"

    @property
    def engines(self) -> Path:
        """Sockets and logs of engines."""
        return self.root / "engines"

    @property
    def views(self) -> Path:
        """Folders of second names."""
        return self.root / "views"

    def view(self, name: str) -> Path:
        """The folder of one engine."""
        return self.views / name

    def slot(self, name: SlotName) -> Path:
        """A slot's manifest."""
        return self.root / "slots" / f"{name}.json"

    def artifact(self, sha256: str) -> Path:
        """A whole file; the digest is checked so that no document can name a path."""
        if not is_digest(sha256):
            raise BugError(f"{sha256!r} is not a digest")
        return self.artifacts / sha256

    def make(self) -> None:
        """Create the folders, readable by the owner only."""
        for folder in (
            self.root,
            self.key.parent,
            self.tuf,
            self.artifacts,
            self.root / "slots",
            self.engines,
        ):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
