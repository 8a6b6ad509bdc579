"""Check-ins: a device says where it stands, and hears what it should run.

Nothing is answered before it is on disk. A sequence number that does not grow is a replay, unless it is the very same
request again (its answer was lost): that one gets its answer without being written twice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from slmops.core.errors import ConflictError, SlmopsError
from slmops.protocol.messages import SCHEMA, Assignment, CheckinRequest, CheckinResponse, decode
from slmops.server.ports.rows import CheckinWrite
from slmops.server.ports.world import CheckinJournal, Clock, Names
from slmops.server.services.registry import Known, Registry

#: polls are spread over this share of the interval, so that a fleet that was switched on together does not stay together
JITTER_RATIO = 0.2


@dataclass(frozen=True, slots=True)
class CheckinAnswer:
    """What the route sends: a body for 200, none for 204."""

    poll_s: float
    body: CheckinResponse | None


class Checkins:
    """Takes check-ins."""

    def __init__(
        self, registry: Registry, journal: CheckinJournal, clock: Clock, names: Names, poll_s: float
    ) -> None:
        """Keep the ports; ``poll_s`` is how often a device should come."""
        self._registry = registry
        self._journal = journal
        self._clock = clock
        self._names = names
        self._poll_s = poll_s

    async def take(self, known: Known, content: bytes) -> CheckinAnswer:
        """Accept one check-in.

        Args:
            known: who is asking.
            content: the request's body.

        Raises:
            UsageError: it cannot be read.
            ConflictError: its sequence number was used before.
        """
        report = decode(content, CheckinRequest)
        content_sha256 = hashlib.sha256(content).hexdigest()
        repeated = report.seq == known.seq and content_sha256 == known.content_sha256
        if report.seq <= known.seq and not repeated:
            raise ConflictError(
                f"check-in {report.seq} of {known.device_id} is a replay: {known.seq} was accepted already",
                hint="the device's counters went back in time? a current agent goes on after accepted_seq by itself",
                accepted_seq=known.seq,
            )
        order = known.order
        send = order is not None and is_pending(order, report)
        if repeated:
            await self._journal.append(None)
        else:
            if order is not None and send:
                known.delivered_generation = max(known.delivered_generation, order.generation)
            known.seq, known.boot_id, known.content_sha256 = report.seq, report.boot_id, content_sha256
            try:
                await self._journal.append(self._write(known, report))
            except SlmopsError:
                self._registry.forget(known.device_id)
                raise
        poll_s = self._poll_s * (1 - JITTER_RATIO / 2 + JITTER_RATIO * self._names.jitter())
        if not send and report.outcome is None and report.facts is None:
            return CheckinAnswer(poll_s, None)
        return CheckinAnswer(poll_s, CheckinResponse(SCHEMA, report.seq, poll_s, order if send else None))

    def _write(self, known: Known, report: CheckinRequest) -> CheckinWrite:
        return CheckinWrite(
            device_id=known.device_id,
            at=self._clock.now(),
            boot_id=report.boot_id,
            seq=report.seq,
            content_sha256=known.content_sha256,
            delivered_generation=known.delivered_generation,
            reported_generation=report.generation,
            phase=report.phase,
            running=report.running,
            release_sha256=report.running_release,
            candidate=report.candidate,
            fetched_bytes=report.fetched_bytes,
            requests=report.requests,
            failed_requests=report.failed_requests,
            stale_since=report.stale_since,
            facts=report.facts,
            outcome=report.outcome,
        )


def is_pending(order: Assignment, report: CheckinRequest) -> bool:
    """Whether a device still has to hear of its order.

    A withdrawal matters only to a device that is moving to the withdrawn release: one that never heard of it, or has
    finished with it, has nothing to forget.
    """
    if order.generation <= report.generation:
        return False
    return order.action != "withdraw" or report.candidate == order.assignment_digest
