"""Who is in which wave, and who may be offered the release now.

Membership is salted per rollout: devices are ordered by ``HMAC-SHA-256(rollout id, device id)``, so the same
unlucky devices are not first every time, and anybody can recompute the order. The labels ``canary=always``
and ``canary=never`` override chance in the first wave.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slmops.core.errors import UsageError
from slmops.core.rollout.selector import Selector


@dataclass(frozen=True, slots=True)
class WaveSpec:
    """One wave as the blueprint declares it.

    Attributes:
        selector: only devices with these labels; None for any.
        limit_ratio: cumulative share of the cohort that this wave reaches, 0..1; None for no ratio.
        limit_devices: cumulative number of devices; None for no number.
        min_devices: fewest devices in this wave that must settle before it can pass.
        max_failures: content failures at which the wave fails: more than this many; None for no limit.
        dynamic: devices that join the cohort later are taken in.
    """

    selector: Selector | None = None
    limit_ratio: float | None = None
    limit_devices: int | None = None
    min_devices: int = 1
    max_failures: int | None = None
    dynamic: bool = False


@dataclass(frozen=True, slots=True)
class InFlight:
    """How many devices may be between offer and outcome at once; grows only on evidence."""

    start: int = 5
    growth: float = 2.0
    maximum: int = 500

    def limit(self, succeeded: int) -> int:
        """Devices in flight that ``succeeded`` committed devices justify: grows as the successes double."""
        doublings = int(math.log2(1 + succeeded / self.start)) if succeeded > 0 else 0
        return min(self.maximum, math.floor(self.start * self.growth**doublings))


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the cohort, as planning sees it."""

    device_id: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Waves of device ids, in order, and the hold-back that gets nothing."""

    waves: tuple[tuple[str, ...], ...]
    holdback: tuple[str, ...]


def salted_order(rollout_id: str, device_ids: Sequence[str]) -> list[str]:
    """Device ids in this rollout's own order."""
    key = rollout_id.encode()
    return sorted(
        device_ids, key=lambda device_id: (hmac.digest(key, device_id.encode(), hashlib.sha256), device_id)
    )


def plan(
    rollout_id: str, waves: Sequence[WaveSpec], members: Sequence[Member], holdback_ratio: float = 0.0
) -> Plan:
    """Lay a cohort out in waves.

    Args:
        rollout_id: salts the order.
        waves: in order; limits are cumulative over the cohort without the hold-back.
        members: the cohort.
        holdback_ratio: share kept on the old release as a contemporary control, 0..1.

    Raises:
        UsageError: there are no waves.
    """
    if not waves:
        raise UsageError("a rollout needs at least one wave", hint="add to rollout.waves: - {limit: 100%}")
    by_id = {member.device_id: member for member in members}
    order = salted_order(rollout_id, list(by_id))
    kept = math.floor(holdback_ratio * len(order))
    eligible_for_holdback = [d for d in reversed(order) if by_id[d].labels.get("canary") != "always"]
    holdback = frozenset(eligible_for_holdback[:kept])
    cohort = [device_id for device_id in order if device_id not in holdback]
    cohort.sort(key=lambda device_id: by_id[device_id].labels.get("canary") != "always")  # stable
    placed: set[str] = set()
    laid_out: list[tuple[str, ...]] = []
    for index, wave in enumerate(waves):
        room = _room(wave, len(cohort)) - len(placed)
        last = index == len(waves) - 1
        chosen: list[str] = []
        for device_id in cohort:
            if len(chosen) >= room:
                break
            labels = by_id[device_id].labels
            spared = labels.get("canary") == "never" and not last
            if (
                device_id in placed
                or spared
                or (wave.selector is not None and not wave.selector.matches(labels))
            ):
                continue
            chosen.append(device_id)
        placed.update(chosen)
        laid_out.append(tuple(chosen))
    return Plan(tuple(laid_out), tuple(sorted(holdback)))


def _room(wave: WaveSpec, cohort: int) -> int:
    """Cumulative devices that this wave may reach; a share is rounded up: no wave is empty by rounding."""
    room = cohort
    if wave.limit_ratio is not None:
        room = min(room, math.ceil(wave.limit_ratio * cohort - 1e-9))
    if wave.limit_devices is not None:
        room = min(room, wave.limit_devices)
    return max(room, min(wave.min_devices, cohort) if wave.limit_ratio is not None else 0)


def next_offers(
    waiting: Sequence[str],
    in_flight: Sequence[str],
    limit: int,
    *,
    group_of: Mapping[str, str] | None = None,
    max_unavailable: int | None = None,
) -> list[str]:
    """Devices of the open wave that may be offered the release now.

    Args:
        waiting: devices of open waves without an offer, in wave order.
        in_flight: devices between offer and outcome.
        limit: how many may be in flight at once.
        group_of: device id to disruption group (site); None for no budget.
        max_unavailable: devices of one group that may be in flight together.
    """
    used: dict[str, int] = {}
    if group_of is not None and max_unavailable is not None:
        for device_id in in_flight:
            used[group_of.get(device_id, "")] = used.get(group_of.get(device_id, ""), 0) + 1
    offers: list[str] = []
    for device_id in waiting:
        if len(in_flight) + len(offers) >= limit:
            break
        if group_of is not None and max_unavailable is not None:
            group = group_of.get(device_id, "")
            if used.get(group, 0) >= max_unavailable:
                continue
            used[group] = used.get(group, 0) + 1
        offers.append(device_id)
    return offers
