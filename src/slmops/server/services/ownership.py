"""Whose device it is when several blueprints select it: the higher priority's; of equal ones nobody's, until that is settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from slmops.server.ports.rows import BlueprintRow, DeviceRow
from slmops.server.services.rollout_plan import RolloutPlan, remembered_plan


@dataclass(frozen=True, slots=True)
class Claims:
    """Devices that a blueprint shares with others: device id to the other blueprint's name.

    Attributes:
        owned: the other one has the higher priority and keeps them.
        contested: both have the same.
        taken: the other one has the lower priority and loses them.
    """

    owned: dict[str, str] = field(default_factory=dict)
    contested: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)

    @property
    def elsewhere(self) -> frozenset[str]:
        """Devices that the blueprint may not give anything to."""
        return frozenset(self.owned) | frozenset(self.contested)


def claims(plan: RolloutPlan, devices: Iterable[DeviceRow], blueprints: Iterable[BlueprintRow]) -> Claims:
    """What other blueprints say of a blueprint's devices.

    Args:
        plan: of the blueprint.
        devices: all of them.
        blueprints: current revisions of all; its own is left out.
    """
    mine = plan.selected(devices)
    found = Claims()
    for row in blueprints:
        if row.name == plan.blueprint.metadata.name:
            continue
        other = remembered_plan(row.source)
        shared = [device.id for device in other.selected(mine)]
        rank = other.blueprint.priority - plan.blueprint.priority
        place = found.owned if rank > 0 else found.taken if rank < 0 else found.contested
        place.update(dict.fromkeys(shared, row.name))
    return found
