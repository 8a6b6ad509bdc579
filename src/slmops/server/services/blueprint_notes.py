"""What a person should know before a blueprint is applied, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.client.records import DeviceChoice
from slmops.server.ports.rows import DeviceRow
from slmops.server.ports.store import Transaction
from slmops.server.services.catalogue import OpenRelease
from slmops.server.services.ownership import Claims
from slmops.server.services.rollout_plan import PINNED, RolloutPlan


def some(names: Sequence[str]) -> str:
    """A few names of many."""
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} others' if len(names) > 5 else ''}"


def ownership_notes(shared: Claims, pinned: Sequence[str]) -> list[str]:
    """Devices that other blueprints select too, and devices that are pinned."""
    notes = [
        f"{some([device for device, name in shared.owned.items() if name == owner])} belong to {owner}, which has a "
        "higher priority"
        for owner in sorted(set(shared.owned.values()))
    ]
    notes += [
        f"{some([device for device, name in shared.taken.items() if name == loser])} are taken from {loser}, which has a "
        "lower priority"
        for loser in sorted(set(shared.taken.values()))
    ]
    if shared.contested:
        others = ", ".join(sorted(set(shared.contested.values())))
        notes.append(
            f"{some(list(shared.contested))} are selected by {others} as well: apply will be refused"
        )
    if pinned:
        notes.append(f"{some(pinned)} are pinned (label {PINNED}) and stay on what they run")
    return notes


def overlay_notes(plan: RolloutPlan, cohort: Sequence[DeviceRow]) -> list[str]:
    """How many devices each overlay adapts, and in what."""
    notes = []
    for selector, overlay in zip(plan.overlays, plan.blueprint.overlays, strict=True):
        matched = sum(selector.matches(device.selector_labels()) for device in cohort)
        changed = ", ".join(sorted(overlay.serving.model_fields_set))
        notes.append(
            f"overlay {overlay.selector}: {matched} of {len(cohort)} devices get their own {changed}"
        )
    return notes


def window_notes(plan: RolloutPlan) -> list[str]:
    """When devices may act, and what that does to their deadline."""
    windows = plan.blueprint.rollout.windows
    texts = [
        f"{verb} in {text}"
        for verb, text in (("download", windows.download), ("activate", windows.activate))
        if text
    ]
    if not texts:
        return []
    hours = plan.deadlines.update_s / 3600
    return [
        f"devices {' and '.join(texts)}, their own time: one may take {hours:.0f} h before it counts as silent"
    ]


def downgrade_notes(tx: Transaction, release: OpenRelease, cohort: Sequence[DeviceRow]) -> list[str]:
    """Devices that run a newer release of the same model: they will refuse this one."""
    ahead = []
    for device in cohort:
        current = tx.devices.assigned(device.running) if device.running else None
        row = None if current is None else tx.releases.get(current.release_sha256)
        if (
            row is not None
            and row.model == release.release.model
            and row.release_seq > release.release.release_seq
        ):
            ahead.append(f"{device.id} ({row.version})")
    if not ahead:
        return []
    return [
        f"{', '.join(ahead[:5])}{' and others' if len(ahead) > 5 else ''} run a newer release and will refuse "
        f"{release.release.version}: to go back, roll the newer rollout back, or sign the older content again as a new version"
    ]


def release_notes(
    plan: RolloutPlan,
    release: OpenRelease | None,
    waves: tuple[tuple[str, ...], ...],
    choices: list[DeviceChoice],
) -> list[str]:
    """What the release, its waves and its variants leave open."""
    reference = plan.blueprint.model
    notes: list[str] = []
    if release is None:
        notes.append(
            f"channel {reference.channel} of {reference.name} points nowhere yet: "
            "promote a release to it, and the rollout begins"
        )
    else:
        notes.extend(
            f"gate {w.gate} was waived for this release: {w.reason}" for w in release.release.waivers
        )
        if release.release.golden_weakened:
            notes.append(f"the golden pack asks less than before: {release.release.golden_weakened}")
    if not any(waves):
        notes.append("the selector matches no device now")
    else:
        for index, devices in enumerate(waves):
            if not devices and not plan.waves[index].dynamic:
                notes.append(f"wave {index + 1} ({plan.rule(index)}) has no device: it proves nothing")
    unfit = [choice.device_id for choice in choices if not choice.variant]
    if unfit:
        notes.append(f"no variant fits {', '.join(unfit[:5])}{' and others' if len(unfit) > 5 else ''}")
    return notes
