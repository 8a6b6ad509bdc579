"""Devices, orders and outcomes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from slmops.core.errors import ConflictError
from slmops.protocol.messages import Assignment, Facts, OutcomeReport
from slmops.server.adapters.database.rows import from_text, to_text
from slmops.server.adapters.database.schema import assignments, devices, outcomes
from slmops.server.ports.rows import CheckinWrite, DeviceRow, OutcomeRow

_OPTIONAL = (
    "retired_at",
    "generation",
    "delivered_generation",
    "last_seen_at",
    "boot_id",
    "seq",
    "content_sha256",
    "reported_generation",
    "phase",
    "running",
    "release_sha256",
    "candidate",
    "fetched_bytes",
    "requests",
    "failed_requests",
    "stale_since",
)

_RECORD = (
    update(devices)
    .where(devices.c.id == bindparam("b_id"))
    .values(
        {
            name: bindparam(f"b_{name}")
            for name in (
                "last_seen_at",
                "boot_id",
                "seq",
                "content_sha256",
                "delivered_generation",
                "reported_generation",
                "phase",
                "running",
                "release_sha256",
                "candidate",
                "fetched_bytes",
                "requests",
                "failed_requests",
                "stale_since",
            )
        }
    )
)


class SqlDevices:
    """``DeviceTable`` on one connection."""

    def __init__(self, connection: Connection) -> None:
        """Share the transaction of this connection."""
        self._connection = connection

    def add(self, device: DeviceRow) -> None:
        """Add a device."""
        if self.get(device.id) is not None:
            raise ConflictError(f"device {device.id} exists", hint="choose another name")
        values = {name: getattr(device, name) for name in _OPTIONAL}
        self._connection.execute(
            insert(devices).values(
                id=device.id,
                profile=device.profile,
                labels=to_text(device.labels),
                public_key_pem=device.public_key_pem,
                enrolment_token_sha256=device.enrolment_token_sha256,
                enrolled_at=device.enrolled_at,
                facts=to_text(device.facts),
                assignment=None if device.assignment is None else to_text(device.assignment),
                **values,
            )
        )

    def get(self, device_id: str) -> DeviceRow | None:
        """One device."""
        row = self._connection.execute(select(devices).where(devices.c.id == device_id)).one_or_none()
        return None if row is None else _device(row)

    def by_enrolment(self, token_sha256: str, public_key_pem: str) -> DeviceRow | None:
        """The device that was enrolled with this token and key."""
        query = select(devices).where(
            devices.c.enrolment_token_sha256 == token_sha256, devices.c.public_key_pem == public_key_pem
        )
        row = self._connection.execute(query).first()
        return None if row is None else _device(row)

    def ids_with_prefix(self, prefix: str) -> set[str]:
        """Ids that begin so."""
        query = select(devices.c.id).where(devices.c.id.startswith(prefix, autoescape=True))
        return {str(name) for name in self._connection.execute(query).scalars()}

    def all(self, ids: Collection[str] | None = None) -> list[DeviceRow]:
        """All devices (or these) by id, retired ones too."""
        query = select(devices).order_by(devices.c.id)
        if ids is None or len(ids) > 500:  # a longer list of parameters costs more than the rows it spares
            rows = self._connection.execute(query)
            wanted = None if ids is None else frozenset(ids)
            return [_device(row) for row in rows if wanted is None or row.id in wanted]
        return [_device(row) for row in self._connection.execute(query.where(devices.c.id.in_(ids)))]

    def set_labels(self, device_id: str, labels: Mapping[str, str]) -> None:
        """Replace a device's labels."""
        self._connection.execute(
            update(devices).where(devices.c.id == device_id).values(labels=to_text(dict(labels)))
        )

    def retire(self, device_id: str, at: datetime) -> None:
        """Mark a device as retired."""
        self._connection.execute(update(devices).where(devices.c.id == device_id).values(retired_at=at))

    def assign(self, device_id: str, assignment: Assignment, at: datetime) -> None:
        """Make this the device's current order, and keep it in the history."""
        body = to_text(assignment)
        changed = self._connection.execute(
            update(devices)
            .where(devices.c.id == device_id, devices.c.generation < assignment.generation)
            .values(assignment=body, generation=assignment.generation)
        )
        if changed.rowcount != 1:
            raise ConflictError(
                f"generation {assignment.generation} of {device_id} is not above its current one",
                hint="read the device again",
            )
        self._connection.execute(
            insert(assignments).values(
                device_id=device_id,
                generation=assignment.generation,
                action=assignment.action,
                assignment_digest=assignment.assignment_digest,
                rollout_id=assignment.rollout_id,
                body=body,
                issued_at=at,
            )
        )

    def ahead(self) -> list[DeviceRow]:
        """Devices that acted upon a generation which this database never issued."""
        query = select(devices).where(devices.c.reported_generation > devices.c.generation)
        return [_device(row) for row in self._connection.execute(query.order_by(devices.c.id))]

    def set_generation(self, device_id: str, generation: int) -> None:
        """Skip generations, so that the next order is above what the device has seen."""
        self._connection.execute(
            update(devices)
            .where(devices.c.id == device_id, devices.c.generation < generation)
            .values(generation=generation)
        )

    def assigned(self, assignment_digest: str) -> Assignment | None:
        """The newest ``run`` order with this digest, whoever got it."""
        query = (
            select(assignments.c.body)
            .where(assignments.c.assignment_digest == assignment_digest, assignments.c.action == "run")
            .order_by(assignments.c.issued_at.desc())
            .limit(1)
        )
        body = self._connection.execute(query).scalar_one_or_none()
        return None if body is None else from_text(body, Assignment)

    def record(self, checkins: Sequence[CheckinWrite]) -> None:
        """Write accepted check-ins, in order; the same outcome twice is one."""
        if not checkins:
            return
        self._connection.execute(_RECORD, [_hot(checkin) for checkin in checkins])
        for checkin in checkins:
            if checkin.facts is not None:
                self._connection.execute(
                    update(devices)
                    .where(devices.c.id == checkin.device_id)
                    .values(facts=to_text(checkin.facts))
                )
            if checkin.outcome is not None:
                self._add_outcome(checkin.device_id, checkin.outcome, checkin.at)

    def _add_outcome(self, device_id: str, report: OutcomeReport, at: datetime) -> None:
        """Keep an outcome as the newest of its offer, unless it is that already.

        A device may end an offer in the same way twice with another end between (committed, lost by damage on its disk,
        repaired and committed): what it said last has to be the last row.
        """
        of_this_offer = (
            outcomes.c.device_id == device_id,
            outcomes.c.generation == report.generation,
            outcomes.c.assignment_digest == report.assignment_digest,
            outcomes.c.rollout_id == report.rollout_id,
        )
        query = select(outcomes).where(*of_this_offer).order_by(outcomes.c.id.desc())
        known = [_outcome(row) for row in self._connection.execute(query)]
        newest = known[0].report if known else None
        if newest and (newest.status, newest.cause, newest.code) == (
            report.status,
            report.cause,
            report.code,
        ):
            return
        earlier = next((row for row in known if row.report.status == report.status), None)
        if earlier is not None:
            if report.golden is None:  # measured when it was proved, not when it was repaired
                proved = earlier.report
                report = msgspec.structs.replace(report, golden=proved.golden, ratios=proved.ratios)
            self._connection.execute(
                delete(outcomes).where(*of_this_offer, outcomes.c.status == report.status)
            )
        dialect = postgresql if self._connection.dialect.name == "postgresql" else sqlite
        self._connection.execute(
            dialect.insert(outcomes)
            .values(
                device_id=device_id,
                rollout_id=report.rollout_id,
                assignment_digest=report.assignment_digest,
                generation=report.generation,
                status=report.status,
                body=to_text(report),
                received_at=at,
            )
            .on_conflict_do_nothing()
        )

    def outcomes(self, device_id: str, limit: int = 50) -> list[OutcomeRow]:
        """A device's outcomes, newest first."""
        query = (
            select(outcomes)
            .where(outcomes.c.device_id == device_id)
            .order_by(outcomes.c.id.desc())
            .limit(limit)
        )
        return [_outcome(row) for row in self._connection.execute(query)]

    def rollout_outcomes(self, rollout_id: str) -> list[OutcomeRow]:
        """All outcomes of a rollout, oldest first."""
        query = select(outcomes).where(outcomes.c.rollout_id == rollout_id).order_by(outcomes.c.id)
        return [_outcome(row) for row in self._connection.execute(query)]

    def latest_commit(self, device_id: str, assignment_digest: str) -> OutcomeRow | None:
        """The newest commit of this digest on this device that carries a golden result."""
        query = (
            select(outcomes)
            .where(
                outcomes.c.device_id == device_id,
                outcomes.c.assignment_digest == assignment_digest,
                outcomes.c.status == "committed",
            )
            .order_by(outcomes.c.id.desc())
        )
        found = (_outcome(row) for row in self._connection.execute(query))
        return next((outcome for outcome in found if outcome.report.golden is not None), None)


def _hot(checkin: CheckinWrite) -> dict[str, Any]:
    return {
        "b_id": checkin.device_id,
        "b_last_seen_at": checkin.at,
        "b_boot_id": checkin.boot_id,
        "b_seq": checkin.seq,
        "b_content_sha256": checkin.content_sha256,
        "b_delivered_generation": checkin.delivered_generation,
        "b_reported_generation": checkin.reported_generation,
        "b_phase": checkin.phase,
        "b_running": checkin.running,
        "b_release_sha256": checkin.release_sha256,
        "b_candidate": checkin.candidate,
        "b_fetched_bytes": checkin.fetched_bytes,
        "b_requests": checkin.requests,
        "b_failed_requests": checkin.failed_requests,
        "b_stale_since": checkin.stale_since,
    }


def _device(row: Row[Any]) -> DeviceRow:
    return DeviceRow(
        id=row.id,
        profile=row.profile,
        labels=from_text(row.labels, dict[str, str]),
        public_key_pem=row.public_key_pem,
        enrolment_token_sha256=row.enrolment_token_sha256,
        enrolled_at=row.enrolled_at,
        facts=from_text(row.facts, Facts),
        assignment=None if row.assignment is None else from_text(row.assignment, Assignment),
        **{name: getattr(row, name) for name in _OPTIONAL},
    )


def _outcome(row: Row[Any]) -> OutcomeRow:
    return OutcomeRow(row.id, row.device_id, row.received_at, from_text(row.body, OutcomeReport))
