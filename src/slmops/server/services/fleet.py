"""Devices as operators see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

from slmops.client.records import DeviceDetail, DeviceRecord, FleetSummary, OutcomeRecord
from slmops.core.errors import NotFoundError
from slmops.core.rollout.selector import parse_selector
from slmops.server.ports.rows import DeviceRow, OutcomeRow
from slmops.server.ports.store import Store, Transaction
from slmops.server.ports.world import Bell, Clock
from slmops.server.services.access import relabelled
from slmops.server.services.catalogue import Catalogue
from slmops.server.services.registry import Registry
from slmops.server.services.words import Caller, Role, rfc3339

#: a device that missed this many polls is quiet
QUIET_POLLS = 3


class Fleet:
    """Devices: list, show, label, retire."""

    def __init__(
        self, store: Store, catalogue: Catalogue, registry: Registry, clock: Clock, bell: Bell, poll_s: float
    ) -> None:
        """Keep the ports; ``poll_s`` is how often devices come."""
        self._store = store
        self._catalogue = catalogue
        self._registry = registry
        self._clock = clock
        self._bell = bell
        self._poll_s = poll_s

    def devices(self, selector: str = "", *, retired: bool = False) -> list[DeviceRecord]:
        """Devices that a selector matches, by id.

        Raises:
            UsageError: the selector cannot be read.
        """
        wanted = parse_selector(selector)
        with self._store.read() as tx:
            rows = tx.devices.all()
        return [
            self._record(row)
            for row in rows
            if (retired or row.retired_at is None) and wanted.matches(row.selector_labels())
        ]

    def device(self, device_id: str) -> DeviceDetail:
        """One device with its history."""
        with self._store.read() as tx:
            row = _required(tx, device_id)
            outcomes = tx.devices.outcomes(device_id)
        line = self._record(row)
        return DeviceDetail(
            **{name: getattr(line, name) for name in DeviceRecord.__struct_fields__},
            outcomes=tuple(_outcome(outcome) for outcome in outcomes),
        )

    def set_labels(self, caller: Caller, device_id: str, changes: Mapping[str, str | None]) -> DeviceRecord:
        """Set and (None) remove labels; a running rollout keeps the waves that it has laid out."""
        caller.require(Role.OPERATOR, "labelling a device")
        now = self._clock.now()
        with self._store.write() as tx:
            row = relabelled(_required(tx, device_id), changes)
            tx.devices.set_labels(device_id, row.labels)
            tx.journal.audit(now, caller.name, "device.label", device_id, dict(changes))
            tx.journal.event(now, "device.labelled", device_id, {"labels": row.labels})
        self._bell.ring()
        return self._record(row)

    def retire(self, caller: Caller, device_id: str) -> DeviceRecord:
        """Refuse this device from now on."""
        caller.require(Role.OPERATOR, "retiring a device")
        now = self._clock.now()
        with self._store.write() as tx:
            if _required(tx, device_id).retired_at is None:
                tx.devices.retire(device_id, now)
                tx.journal.audit(now, caller.name, "device.retire", device_id, {})
                tx.journal.event(now, "device.retired", device_id, {})
            row = _required(tx, device_id)
        self._registry.refresh((device_id,))
        self._bell.ring()
        return self._record(row)

    def summary(self) -> FleetSummary:
        """The fleet in numbers."""
        with self._store.read() as tx:
            rows = tx.devices.all()
        active = [row for row in rows if row.retired_at is None]
        return FleetSummary(
            devices=len(active),
            retired=len(rows) - len(active),
            quiet=sum(self.is_quiet(row) for row in active),
            by_phase=dict(Counter(row.phase or "never seen" for row in active)),
            by_profile=dict(Counter(row.profile for row in active)),
            by_release=dict(Counter(self._catalogue.name_of(row.release_sha256) or "none" for row in active)),
            requests=sum(row.requests for row in active),
            failed_requests=sum(row.failed_requests for row in active),
            fetched_bytes=sum(row.fetched_bytes for row in active),
        )

    def is_quiet(self, row: DeviceRow) -> bool:
        """Whether a device has missed several polls."""
        if row.last_seen_at is None:
            return False
        return self._clock.now() - row.last_seen_at > timedelta(seconds=max(QUIET_POLLS * self._poll_s, 10))

    def _record(self, row: DeviceRow) -> DeviceRecord:
        order = row.assignment
        return DeviceRecord(
            id=row.id,
            profile=row.profile,
            labels=row.labels,
            state="active" if row.retired_at is None else "retired",
            enrolled_at=rfc3339(row.enrolled_at),
            last_seen_at=rfc3339(row.last_seen_at),
            phase=row.phase,
            running=row.running,
            running_release=row.release_sha256,
            release=self._catalogue.name_of(row.release_sha256),
            candidate=row.candidate,
            assigned="" if order is None else order.assignment_digest,
            action="" if order is None else order.action,
            rollout_id="" if order is None else order.rollout_id,
            generation=row.generation,
            reported_generation=row.reported_generation,
            fetched_bytes=row.fetched_bytes,
            requests=row.requests,
            failed_requests=row.failed_requests,
            stale_since=row.stale_since,
            facts=row.facts,
        )


def _required(tx: Transaction, device_id: str) -> DeviceRow:
    row = tx.devices.get(device_id)
    if row is None:
        raise NotFoundError(f"no device {device_id}", hint="slmops device list shows them")
    return row


def _outcome(row: OutcomeRow) -> OutcomeRecord:
    report = row.report
    return OutcomeRecord(
        received_at=rfc3339(row.received_at),
        device_id=row.device_id,
        rollout_id=report.rollout_id,
        assignment_digest=report.assignment_digest,
        generation=report.generation,
        status=report.status,
        cause=report.cause,
        code=report.code,
        detail=report.detail,
        golden=report.golden,
        ratios=dict(report.ratios),
        fetched_bytes=report.fetched_bytes,
        failed_requests=report.failed_requests,
    )
