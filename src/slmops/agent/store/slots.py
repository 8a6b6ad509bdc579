"""Two slots over artifacts by digest, and the pointer that names the activated one.

A slot is a small manifest: an update that changes only a prompt copies no weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import msgspec

from slmops.agent.store.files import write_atomic
from slmops.agent.store.layout import Layout
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.device.machine import SlotName
from slmops.core.errors import NoSpaceError, TrustError
from slmops.protocol.messages import Assignment

SCHEMA = 1


class SlotArtifact(msgspec.Struct, frozen=True):
    """A file that a slot needs.

    Attributes:
        role: what it is; see :class:`Slot`.
        sha256: its digest; ``bytes``: its size, 0 where it is not told.
        chunk_map: digest of its chunk map, for files that are cut.
        path: its name among the variant's files, for engines that want them in a folder (ADR 0015).
    """

    role: str
    sha256: str
    bytes: int
    chunk_map: str = ""
    path: str = ""


class Baseline(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this release showed on this device when it committed; the next candidate is paired against it.

    Attributes:
        kept: golden prompt id to whether its answer was kept.
        decode_tps: decode tokens per second in probation.
    """

    kept: dict[str, bool] = {}
    decode_tps: float | None = None


class Slot(msgspec.Struct, frozen=True, omit_defaults=True):
    """What makes up one release on this device.

    Attributes:
        assignment: as verified.
        artifacts: every file of it; roles: ``release``, ``variant``, ``model``, ``part`` (as many as there are),
            ``chunk-map`` (one for each of these), ``golden-pack``, ``golden-expectations``, ``prompt:<name>``,
            ``adapter:<name>``.
        runtime: engine that loads it.
        model_name: name for ``/v1/models``.
        baseline: None until it has committed here.
    """

    schema: int
    assignment: Assignment
    artifacts: tuple[SlotArtifact, ...]
    runtime: str
    model_name: str
    baseline: Baseline | None = None

    def digest_of(self, role: str) -> str:
        """Digest of the file with this role.

        Raises:
            TrustError: the slot has none.
        """
        return self.artifact(role).sha256

    def artifact(self, role: str) -> SlotArtifact:
        """The first file with this role.

        Raises:
            TrustError: the slot has none.
        """
        for artifact in self.artifacts:
            if artifact.role == role:
                return artifact
        raise TrustError(
            f"the slot of {self.model_name} has no file with role {role}",
            hint="let the control plane assign the release again",
        )


def read_slot(layout: Layout, name: SlotName) -> Slot | None:
    """A slot's manifest; None when it is empty or unreadable (an unreadable slot is as good as an empty one)."""
    try:
        slot = msgspec.json.decode(layout.slot(name).read_bytes(), type=Slot)
    except (FileNotFoundError, *UNREADABLE_JSON):
        return None
    return slot if slot.schema == SCHEMA else None


def write_slot(layout: Layout, name: SlotName, slot: Slot) -> None:
    """Replace a slot's manifest, durably."""
    write_atomic(layout.slot(name), msgspec.json.encode(slot), mode=0o600)


def clear_slot(layout: Layout, name: SlotName) -> None:
    """Empty a slot; its artifacts stay until they are collected."""
    layout.slot(name).unlink(missing_ok=True)


def read_pointer(path: Path) -> SlotName | None:
    """The activated slot; None before the first activation, and when the file was damaged: the journal says the rest."""
    try:
        name = path.read_bytes().strip()
    except OSError:
        return None
    return cast(SlotName, name.decode()) if name in (b"a", b"b") else None


def write_pointer(path: Path, name: SlotName) -> None:
    """Flip the pointer, atomically and durably.

    Raises:
        NoSpaceError: the disk is full, and there is no pointer yet.
    """
    content = f"{name}\n".encode("ascii")
    try:
        write_atomic(path, content)
    except NoSpaceError:
        # Going back must be possible on a full disk: one letter is overwritten in one write, which takes no room.
        if not path.exists() or path.stat().st_size < len(content):
            raise
        with path.open("r+b", buffering=0) as file:
            file.write(content)
            file.truncate()
            os.fsync(file.fileno())
