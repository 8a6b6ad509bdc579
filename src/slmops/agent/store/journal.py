"""The journal: the device machine's state and the assignment it is working on, in one JSON file.

Written before every act. It is small (some kilobytes), so it is replaced as a whole.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from slmops.agent.store.files import write_atomic
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.device.machine import DeviceState
from slmops.core.errors import TrustError
from slmops.protocol.messages import Assignment, GoldenReport

SCHEMA = 1


class Journal(msgspec.Struct, frozen=True, omit_defaults=True):
    """What must survive a power cut.

    Attributes:
        schema: version of this file.
        state: of the device machine.
        assignment: what ``state.candidate`` was offered as; None while resting.
        golden: golden outcome of the last candidate; ``ratios``: its new/old figures.
        fetched_bytes: bytes that the last update moved over the network.
        acknowledged: the server has taken ``state.outcome``.
        proved: what the releases that the state names were assigned as: a damaged slot is made anew from it.
    """

    schema: int
    state: DeviceState
    assignment: Assignment | None = None
    golden: GoldenReport | None = None
    ratios: dict[str, float] = {}
    fetched_bytes: int = 0
    acknowledged: bool = False
    proved: tuple[Assignment, ...] = ()


def read_journal(path: Path) -> Journal:
    """The journal, or a fresh one when the device has none yet.

    Raises:
        TrustError: it cannot be read; the device must not guess what it was doing.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Journal(SCHEMA, DeviceState())
    try:
        journal = msgspec.json.decode(content, type=Journal)
    except UNREADABLE_JSON as error:
        raise TrustError(
            f"{path}: the journal cannot be read: {error}",
            hint="move journal.json away: the device then starts empty and the control plane offers its release again",
        ) from error
    if journal.schema != SCHEMA:
        raise TrustError(
            f"{path}: journal schema {journal.schema}, {SCHEMA} can be read",
            hint="run the slmops version that wrote it",
        )
    return journal


def write_journal(path: Path, journal: Journal) -> None:
    """Persist the journal.

    Raises:
        NoSpaceError: the disk is full; the old journal is untouched.
    """
    write_atomic(path, msgspec.json.encode(journal), mode=0o600)
