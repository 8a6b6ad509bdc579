"""``lab.json``: what a lab saw of a build's variants, one entry for each device that they ran on.

The lab writes it, a release carries it inside its evidence. Bytes in, values out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.errors import UsageError

SCHEMA = 1
LAB = "lab.json"


class LabSpeed(msgspec.Struct, frozen=True):
    """Figures of the device's own short bench in probation."""

    prefill_tps: float
    decode_tps: float
    ttft_s: float
    load_s: float
    rss_bytes: int


class LabNetwork(msgspec.Struct, frozen=True):
    """The link between device and control plane, and what it did.

    Attributes:
        name: of the link, as it was asked for.
        connections, broken, cut: as :class:`slmops.testing.link.LinkCounts` counts them.
    """

    name: str
    connections: int = 0
    broken: int = 0
    cut: int = 0


class LabDevice(msgspec.Struct, frozen=True):
    """One device that was offered the build.

    Attributes:
        variant_sha256: digest of the variant manifest, which a release made of the same build has again: what the entry is about.
        profile, runtime: of the device, which is emulated unless ``emulated`` is False.
        arch: of the processor that really computed.
        limits: limit to how it was enforced; ``none`` is said, too.
        outcome: committed, failed, reverted, refused or withdrawn; ``reason``: why, when not committed.
        golden_kept, golden_prompts: of the golden pack in probation.
        asked, failed: requests over the device's API after the commit.
        fetched_bytes: over the network; ``seconds``: from the order to its end.
        speed: on this machine under these limits; it says nothing about the speed of the real board.
    """

    variant_sha256: str
    profile: str
    runtime: str
    runtime_version: str
    arch: str
    emulated: bool
    limits: dict[str, str]
    network: LabNetwork
    outcome: str
    reason: str
    golden_kept: int
    golden_prompts: int
    asked: int
    failed: int
    fetched_bytes: int
    seconds: float
    speed: LabSpeed | None = None


class LabReport(msgspec.Struct, frozen=True):
    """One run of the lab over one build.

    Attributes:
        model: of the build; ``recipe_sha256``: its recipe.
        started: UTC, RFC 3339; ``agent_version``: slmops that ran on the devices.
        machine: what computed, in words.
    """

    schema: int
    model: str
    recipe_sha256: str
    started: str
    agent_version: str
    machine: str
    devices: tuple[LabDevice, ...]

    @property
    def passed(self) -> bool:
        """Whether every device serves its variant and answered every request."""
        return all(device.outcome == "committed" and not device.failed for device in self.devices)


def encode_lab(report: LabReport) -> bytes:
    """The bytes of ``lab.json``."""
    return msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=1) + b"\n"


def decode_lab(content: bytes, place: str) -> LabReport:
    """Read a lab report.

    Args:
        content: of ``lab.json``.
        place: where it lies, for messages.

    Raises:
        UsageError: it cannot be read, or is of another version.
    """
    again = "run the lab again with this version, or remove the file"
    try:
        report = msgspec.json.decode(content, type=LabReport)
    except UNREADABLE_JSON as error:
        raise UsageError(f"{place} cannot be read: {error}", hint=again) from error
    if report.schema != SCHEMA:
        raise UsageError(f"{place} has schema {report.schema}, {SCHEMA} can be read", hint=again)
    return report


def for_evidence(report: LabReport, variants: frozenset[str]) -> tuple[dict[str, Any], tuple[LabDevice, ...]]:
    """What a release's evidence says of the lab, and the entries that are about other variants than the release's.

    Args:
        report: of the lab.
        variants: digests of the variant manifests that are released.
    """
    stale = tuple(device for device in report.devices if device.variant_sha256 not in variants)
    current = tuple(device for device in report.devices if device.variant_sha256 in variants)
    return dict(msgspec.to_builtins(msgspec.structs.replace(report, devices=current))), stale
