"""A blueprint's text as the things that planning and judging want, and who would be in which wave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from slmops.core.rollout.judge import Deadlines, Gate
from slmops.core.rollout.machine import Policy
from slmops.core.rollout.plan import InFlight, Member, Plan, WaveSpec, plan
from slmops.core.rollout.selector import Selector, parse_selector
from slmops.protocol.documents import Blueprint, load_one
from slmops.protocol.documents.blueprint import Serving
from slmops.server.ports.rows import DeviceRow

#: label of a device that stays on what it runs until the label is taken away; its value says why
PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """One blueprint, ready to be followed; ``overlays`` are the selectors of the blueprint's, in its order."""

    blueprint: Blueprint
    selector: Selector
    waves: tuple[WaveSpec, ...]
    gates: tuple[Gate, ...]
    policy: Policy
    deadlines: Deadlines
    in_flight: InFlight
    overlays: tuple[Selector, ...]

    def serving_for(self, device: DeviceRow) -> Serving:
        """What this device is served with: the blueprint's settings, then each overlay that matches it."""
        labels = device.selector_labels()
        serving = self.blueprint.serving
        for selector, overlay in zip(self.overlays, self.blueprint.overlays, strict=True):
            if selector.matches(labels):
                serving = overlay.over(serving)
        return serving

    def all_servings(self) -> list[Serving]:
        """The blueprint's settings, and what each overlay alone makes of them."""
        serving = self.blueprint.serving
        return [serving, *(overlay.over(serving) for overlay in self.blueprint.overlays)]

    def selected(self, devices: Iterable[DeviceRow]) -> list[DeviceRow]:
        """Active devices that the blueprint's selector matches."""
        return [
            device
            for device in devices
            if device.retired_at is None and self.selector.matches(device.selector_labels())
        ]

    def rule(self, wave: int) -> str:
        """A wave in words, as the blueprint declares it."""
        spec = self.blueprint.rollout.waves[wave]
        parts = [spec.selector] if spec.selector else []
        if spec.limit is not None:
            parts.append(
                f"up to {spec.limit}" if isinstance(spec.limit, str) else f"up to {spec.limit} devices"
            )
        if spec.dynamic:
            parts.append("later ones too")
        return ", ".join(parts) or "all"

    def cohort(self, devices: Iterable[DeviceRow]) -> list[DeviceRow]:
        """Selected devices that nobody has pinned to what they run."""
        return [device for device in self.selected(devices) if not is_pinned(device)]

    def lay_out(self, rollout_id: str, cohort: Iterable[DeviceRow]) -> Plan:
        """Who is in which wave."""
        members = [Member(device.id, device.selector_labels()) for device in cohort]
        return plan(rollout_id, self.waves, members, self.blueprint.rollout.holdback_ratio)


def read_plan(source: str, source_name: str) -> RolloutPlan:
    """Read a blueprint.

    Raises:
        DocumentError: it is not valid; names file, line and column.
    """
    blueprint = load_one(source, source_name, Blueprint)
    rollout = blueprint.rollout
    return RolloutPlan(
        blueprint=blueprint,
        selector=parse_selector(blueprint.selector),
        waves=tuple(wave.spec() for wave in rollout.waves),
        gates=tuple(gate.gate() for gate in rollout.gates),
        policy=rollout.policy(),
        deadlines=rollout.silence(),
        in_flight=rollout.in_flight(),
        overlays=tuple(parse_selector(overlay.selector) for overlay in blueprint.overlays),
    )


def is_pinned(device: DeviceRow) -> bool:
    """Whether somebody wants this device to stay on what it runs."""
    return PINNED in device.labels


@lru_cache(maxsize=128)
def remembered_plan(source: str) -> RolloutPlan:
    """The plan of a stored blueprint, which was read without errors when it was applied."""
    return read_plan(source, "stored blueprint")
