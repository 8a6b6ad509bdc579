"""Blueprints: the declared state of a cohort; applying one, or moving the channel that it follows, begins a rollout."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slmops.client.records import (
    BlueprintApplied,
    BlueprintPlan,
    BlueprintRecord,
    DeviceChoice,
    PlannedWave,
    Promotion,
    RefusedVariant,
)
from slmops.core.errors import ConflictError, NotFoundError, UsageError
from slmops.core.rollout.machine import ENDED, Phase
from slmops.server.ports.rows import BlueprintRow, ChannelRow, DeviceRow, RolloutRow
from slmops.server.ports.store import Store, Transaction
from slmops.server.ports.world import Bell, Clock
from slmops.server.services import assign
from slmops.server.services.blueprint_notes import (
    downgrade_notes,
    overlay_notes,
    ownership_notes,
    release_notes,
    some,
    window_notes,
)
from slmops.server.services.catalogue import Catalogue, OpenRelease
from slmops.server.services.decisions import COMPLETE
from slmops.server.services.ownership import claims
from slmops.server.services.rollout_plan import RolloutPlan, is_pinned, read_plan, remembered_plan
from slmops.server.services.rollouts import Rollouts
from slmops.server.services.words import Caller, Role, rfc3339

_CHANNEL = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan with everything that it was made from."""

    plan: RolloutPlan
    release: OpenRelease | None
    cohort: list[DeviceRow]
    current: BlueprintRow | None
    latest: RolloutRow | None
    record: BlueprintPlan


class Blueprints:
    """Blueprints and channels."""

    def __init__(
        self, store: Store, catalogue: Catalogue, rollouts: Rollouts, clock: Clock, bell: Bell
    ) -> None:
        """Keep the ports."""
        self._store = store
        self._catalogue = catalogue
        self._rollouts = rollouts
        self._clock = clock
        self._bell = bell

    def plan(self, caller: Caller, source: str, source_name: str) -> BlueprintPlan:
        """What applying this text would do; changes nothing.

        Raises:
            DocumentError: the text is not valid.
            NotFoundError: the version, or the prompt that it names, does not exist.
        """
        caller.require(Role.VIEWER, "planning a blueprint")
        with self._store.read() as tx:
            return self._draft(tx, self._rollouts.new_id(), source, source_name).record

    def apply(self, caller: Caller, source: str, source_name: str) -> BlueprintApplied:
        """Declare the state of a cohort.

        The same text again changes nothing while its rollout lives or has completed; after an abort it tries again.
        """
        caller.require(Role.OPERATOR, "applying a blueprint")
        now = self._clock.now()
        with self._rollouts.lock:
            rollout_id = self._rollouts.new_id()
            with self._store.write() as tx:
                draft = self._draft(tx, rollout_id, source, source_name)
                name = draft.plan.blueprint.metadata.name
                _require_undisputed(draft)
                revision = 0 if draft.current is None else draft.current.revision
                if draft.current is None or draft.current.source != source:
                    revision += 1
                    tx.blueprints.add(BlueprintRow(name, revision, source, source_name, now, caller.name))
                    tx.journal.event(now, "blueprint.applied", name, {"revision": revision})
                if draft.record.unchanged:
                    rollout_id = draft.latest.id if draft.latest is not None else ""
                elif draft.release is None:
                    rollout_id = ""
                else:
                    _require_first_wave(draft)
                    self._rollouts.birth(
                        tx, caller, rollout_id, draft.plan, revision, draft.release, draft.cohort
                    )
                tx.journal.audit(
                    now, caller.name, "blueprint.apply", name, {"revision": revision, "rollout": rollout_id}
                )
            self._rollouts.act(now)
        self._bell.ring()
        return BlueprintApplied(blueprint=name, revision=revision, rollout_id=rollout_id, plan=draft.record)

    def promote(self, caller: Caller, model: str, version: str, channel: str) -> Promotion:
        """Point a channel at a release; each blueprint that follows it begins a rollout."""
        caller.require(Role.OPERATOR, "promoting a release")
        if not _CHANNEL.match(channel):
            raise UsageError(
                f"channel {channel!r} is not valid", hint="use a-z, 0-9, '.', '_', '-', for example stable"
            )
        row = self._catalogue.named(model, version)
        now = self._clock.now()
        born: list[str] = []
        with self._rollouts.lock:
            with self._store.write() as tx:
                before = tx.releases.channel(model, channel)
                changed = before is None or before.release_digest != row.digest
                if changed:
                    tx.releases.set_channel(ChannelRow(model, channel, row.digest, now, caller.name))
                    tx.journal.event(now, "channel.set", f"{model}:{channel}", {"version": version})
                detail = {"model": model, "version": version, "changed": changed}
                tx.journal.audit(now, caller.name, "release.promote", f"{model}:{channel}", detail)
                for blueprint in tx.blueprints.all_current() if changed else ():
                    reference = remembered_plan(blueprint.source).blueprint.model
                    if (reference.name, reference.channel) == (model, channel):
                        born.append(self._follow(tx, caller, blueprint))
            self._rollouts.act(now)
        self._bell.ring()
        return Promotion(
            model=model,
            channel=channel,
            release=row.digest,
            version=version,
            changed=changed,
            rollouts=tuple(born),
        )

    def _follow(self, tx: Transaction, caller: Caller, blueprint: BlueprintRow) -> str:
        rollout_id = self._rollouts.new_id()
        draft = self._draft(tx, rollout_id, blueprint.source, blueprint.source_name)
        assert draft.release is not None
        self._rollouts.birth(
            tx, caller, rollout_id, draft.plan, blueprint.revision, draft.release, draft.cohort
        )
        return rollout_id

    def _draft(self, tx: Transaction, rollout_id: str, source: str, source_name: str) -> _Draft:
        plan = read_plan(source, source_name)
        blueprint = plan.blueprint
        release = self._resolve(tx, plan)
        devices = tx.devices.all()
        shared = claims(plan, devices, tx.blueprints.all_current())
        cohort = [device for device in plan.cohort(devices) if device.id not in shared.elsewhere]
        pinned = tuple(device.id for device in plan.selected(devices) if is_pinned(device))
        current = tx.blueprints.current(blueprint.metadata.name)
        latest = tx.rollouts.latest(blueprint.metadata.name)
        laid_out = plan.lay_out(rollout_id, cohort)
        wave_of = {device: wave for wave, devices in enumerate(laid_out.waves) for device in devices}
        choices: list[DeviceChoice] = []
        if release is not None:
            for serving in plan.all_servings():  # refuses a prompt that the release does not have
                assign.prompts_in_use(release, serving)
            choices = [
                self._choice(tx, plan, release, device, wave_of.get(device.id, -1)) for device in cohort
            ]
        unchanged = (
            current is not None
            and current.source == source
            and latest is not None
            and latest.revision == current.revision
            and release is not None
            and latest.release_digest == release.digest
            and (latest.state.phase not in ENDED or latest.state.phase in COMPLETE)
            and latest.state.phase is not Phase.ROLLING_BACK
        )
        supersedes: tuple[str, ...] = ()
        if not unchanged and release is not None:
            older = self._rollouts.overlapping(tx, set(wave_of), blueprint.metadata.name)
            supersedes = tuple(row.id for row in older if row.state.phase is not Phase.ROLLING_BACK)
        record = BlueprintPlan(
            blueprint=blueprint.metadata.name,
            model=blueprint.model.name,
            version="" if release is None else release.release.version,
            release="" if release is None else release.digest,
            unchanged=unchanged,
            waves=tuple(
                PlannedWave(index=index, rule=plan.rule(index), devices=devices)
                for index, devices in enumerate(laid_out.waves)
            ),
            holdback=laid_out.holdback,
            choices=tuple(choices),
            supersedes=supersedes,
            contested=shared.contested,
            pinned=pinned,
            notes=(
                *ownership_notes(shared, pinned),
                *overlay_notes(plan, cohort),
                *window_notes(plan),
                *release_notes(plan, release, laid_out.waves, choices),
                *(() if release is None else downgrade_notes(tx, release, cohort)),
            ),
        )
        return _Draft(plan, release, cohort, current, latest, record)

    def _resolve(self, tx: Transaction, plan: RolloutPlan) -> OpenRelease | None:
        reference = plan.blueprint.model
        if reference.version is not None:
            row = tx.releases.named(reference.name, reference.version)
            if row is None:
                versions = ", ".join(release.version for release in tx.releases.all(reference.name)) or "none"
                raise NotFoundError(
                    f"no release {reference.name} {reference.version}; published: {versions}",
                    hint="slmops release list shows what is published",
                )
            return self._catalogue.open(row.digest)
        channel = tx.releases.channel(reference.name, reference.channel or "")
        return None if channel is None else self._catalogue.open(channel.release_digest)

    def _choice(
        self, tx: Transaction, plan: RolloutPlan, release: OpenRelease, device: DeviceRow, wave: int
    ) -> DeviceChoice:
        current = tx.devices.assigned(device.running) if device.running else None
        running = None if current is None else self._catalogue.variant(current.variant_sha256)
        choice = assign.choose(release, plan.serving_for(device), device, running=running)
        chosen, answer = choice.variant, choice.fit
        return DeviceChoice(
            device_id=device.id,
            wave=wave,
            profile=device.profile,
            variant="" if chosen is None else chosen.variant.profile,
            variant_sha256="" if chosen is None else chosen.sha256,
            artifact_bytes=0 if chosen is None else chosen.artifact_bytes,
            predicted_decode_tps=0.0 if answer is None else answer.predicted_decode_tps,
            speed_is_measured=answer is not None and answer.speed_is_measured,
            memory_bytes=0 if answer is None else answer.memory.total_bytes,
            swap="" if answer is None else answer.swap,
            refused=tuple(RefusedVariant(profile=r.profile, reasons=r.reasons) for r in choice.refused),
        )

    # ---- reading --------------------------------------------------------------------------------------------------

    def records(self) -> list[BlueprintRecord]:
        """The current revision of each blueprint."""
        with self._store.read() as tx:
            return [_record(tx, row) for row in tx.blueprints.all_current()]

    def record(self, name: str) -> BlueprintRecord:
        """The current revision of one blueprint."""
        return self.history(name)[0]

    def history(self, name: str) -> list[BlueprintRecord]:
        """All revisions of one blueprint, newest first.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._store.read() as tx:
            rows = tx.blueprints.history(name)
            if not rows:
                raise NotFoundError(f"no blueprint {name}", hint="slmops blueprint apply -f FILE makes one")
            return [_record(tx, row) for row in rows]


def _require_undisputed(draft: _Draft) -> None:
    """Refuse devices that another blueprint wants as well.

    Raises:
        ConflictError: names them and the blueprints.
    """
    contested = draft.record.contested
    if contested:
        others = ", ".join(sorted(set(contested.values())))
        raise ConflictError(
            f"{some(list(contested))} would belong to {draft.record.blueprint} and to {others}, with the same priority",
            hint="narrow one selector, or give one of the blueprints a higher priority:",
        )


def _require_first_wave(draft: _Draft) -> None:
    """Refuse a rollout that could never leave its first wave: an empty one proves nothing, so nothing may follow it.

    Raises:
        ConflictError: the selector has devices, the first wave none of them.
    """
    waves = draft.record.waves
    if waves and not waves[0].devices and any(wave.devices for wave in waves):
        raise ConflictError(
            f"the first wave ({waves[0].rule}) has no device: it would prove nothing, and the rollout could not go on",
            hint="put a device into it (slmops device label DEVICE canary=always), or change the blueprint's first wave",
        )


def _record(tx: Transaction, row: BlueprintRow) -> BlueprintRecord:
    blueprint = remembered_plan(row.source).blueprint
    latest = next(
        (
            rollout
            for rollout in tx.rollouts.all()
            if (rollout.blueprint, rollout.revision) == (row.name, row.revision)
        ),
        None,
    )
    return BlueprintRecord(
        name=row.name,
        revision=row.revision,
        applied_at=rfc3339(row.applied_at),
        applied_by=row.applied_by,
        selector=blueprint.selector,
        model=blueprint.model.name,
        channel=blueprint.model.channel or "",
        version=blueprint.model.version or "",
        source=row.source,
        source_name=row.source_name,
        rollout_id="" if latest is None else latest.id,
    )
