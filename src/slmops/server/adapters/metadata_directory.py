"""Published TUF metadata in a folder, one file per version."""

from __future__ import annotations

import re
from pathlib import Path

from slmops.server.adapters.durable import write_whole

_NAME = re.compile(r"^(?:timestamp|[1-9][0-9]{0,8}\.(?:root|targets|snapshot))\.json\Z")


class MetadataDirectory:
    """``MetadataStore`` on a folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder when it is not there."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> bytes | None:
        """One file; any other name than those of TUF metadata is absent."""
        if not _NAME.match(name):
            return None
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def latest_version(self, role: str) -> int:
        """Highest N for which ``N.role.json`` exists; 0 for none."""
        versions = (path.name.split(".")[0] for path in self._folder.glob(f"*.{role}.json"))
        return max((int(version) for version in versions if version.isdigit()), default=0)

    def publish(self, files: dict[str, bytes]) -> None:
        """Write versioned files first and ``timestamp.json`` last, durably."""
        for name in sorted(files, key=lambda name: name == "timestamp.json"):
            write_whole(self._folder / name, files[name])
