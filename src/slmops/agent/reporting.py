"""The check-in loop: say where the device stands, take what it should do. The device needs no answer to keep serving."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from pathlib import Path

import msgspec

from slmops.agent.facts import read_facts
from slmops.agent.gateway.measures import Measures
from slmops.agent.identity import DeviceConfig
from slmops.agent.loop.actions import Actions
from slmops.agent.loop.driver import Driver
from slmops.agent.ports import ControlPlane
from slmops.agent.retry import pause_s
from slmops.agent.serving import EngineKeeper, Router
from slmops.agent.store.files import write_atomic
from slmops.agent.store.layout import Layout
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.core.device.machine import Offered, RevertOrdered, Target, Withdrawn
from slmops.core.errors import ConflictError, NoSpaceError, SlmopsError
from slmops.protocol.messages import SCHEMA, Assignment, CheckinRequest, Facts, OutcomeReport

log = logging.getLogger("slmops.agent")

#: sequence numbers are reserved on disk in blocks, so that a check-in costs no write and none is used twice
_SEQ_BLOCK = 1000
#: larger ones are not believed: the numbers must last, and JSON numbers are exact only up to 2**53
_LARGEST_SEQ = 1 << 52
#: longest pause between check-ins while the control plane cannot be reached
_LONGEST_SILENCE_S = 300.0
#: shortest time between two check-ins, however much happens
_SHORTEST_S = 0.05


class SequenceNumbers:
    """Numbers that grow for ever, over restarts and power cuts."""

    def __init__(self, path: Path) -> None:
        """Go on after the last reserved block."""
        self._path = path
        try:
            reserved = max(msgspec.json.decode(path.read_bytes(), type=dict[str, int])["seq"], 0)
        except (OSError, KeyError, *UNREADABLE_JSON):
            reserved = 0
        self._next = self._reserved = reserved

    def take(self) -> int:
        """The next number."""
        if self._next >= self._reserved:
            self._reserve(self._next + _SEQ_BLOCK)
        self._next += 1
        return self._next

    def go_on_after(self, accepted: int) -> bool:
        """Skip what the control plane has seen already: our file was lost or went back in time. False: nothing to skip."""
        if not self._next <= accepted <= _LARGEST_SEQ:
            return False
        self._next = accepted
        self._reserve(accepted + _SEQ_BLOCK)
        return True

    def _reserve(self, up_to: int) -> None:
        try:
            write_atomic(self._path, msgspec.json.encode({"seq": up_to}))
        except NoSpaceError as error:
            # On a full disk the device still reports; after a restart the control plane tells it where to go on.
            log.warning("sequence numbers could not be reserved: %s", error)
            return
        self._reserved = up_to


class Reporter:
    """Checks in for one device."""

    def __init__(  # noqa: PLR0913 - it reads from every part of the device
        self,
        layout: Layout,
        config: DeviceConfig,
        server: ControlPlane,
        driver: Driver,
        actions: Actions,
        router: Router,
        keeper: EngineKeeper,
        measures: Measures,
        boot_id: str,
        chance: random.Random,
    ) -> None:
        """Wire the parts."""
        self._layout, self._config, self._server = layout, config, server
        self._driver, self._actions = driver, actions
        self._router, self._keeper, self._measures = router, keeper, measures
        self._boot_id, self._chance = boot_id, chance
        self._seq = SequenceNumbers(layout.counters)
        self._sent_facts: Facts | None = None
        self.reachable = True

    async def run(self) -> None:
        """Check in for ever."""
        failures = 0
        while True:
            self._driver.report_soon.clear()
            try:
                wait = await self._once()
                failures = 0
                if not self.reachable:
                    log.info("the control plane is back")
                self.reachable = True
                wait *= 0.9 + 0.2 * self._chance.random()
            except (SlmopsError, OSError) as error:
                failures += 1
                wait = min(
                    pause_s(failures, self._chance), _LONGEST_SILENCE_S, max(self._config.poll_s, 1.0) * 8
                )
                if self.reachable:
                    log.warning("check-in failed: %s", error)
                self.reachable = False
            await self._sleep(max(wait, _SHORTEST_S))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._driver.report_soon.wait(), seconds)
        await asyncio.sleep(_SHORTEST_S)  # let a burst of transitions become one report

    async def _once(self) -> float:
        request, facts = await asyncio.to_thread(self._request)
        outcome = self._driver.state.outcome if request.outcome is not None else None
        try:
            response, poll_s = await self._server.checkin(request)
        except ConflictError as error:
            accepted = error.fields.get("accepted_seq")
            if not isinstance(accepted, int) or not self._seq.go_on_after(accepted):
                raise
            log.warning("check-ins go on after number %d, which the control plane has seen already", accepted)
            request = msgspec.structs.replace(request, seq=self._seq.take())
            response, poll_s = await self._server.checkin(request)
        self._sent_facts = facts
        if outcome is not None:
            await self._driver.acknowledge(outcome)
        if response is not None and response.assignment is not None:
            await self._take(response.assignment)
        return poll_s if poll_s is not None else self._config.poll_s

    def _request(self) -> tuple[CheckinRequest, Facts]:
        state = self._driver.state
        limits = {
            limit.limit: f"{limit.mechanism}: {limit.note}"
            for backend in self._keeper.running()
            for limit in backend.engine.limits_applied
        }
        facts = read_facts(self._layout, self._config, limits)
        active = self._router.active
        running = active.slot.assignment if active is not None else None
        self._measures.restarts.set(self._keeper.restarts)
        request = CheckinRequest(
            schema=SCHEMA,
            boot_id=self._boot_id,
            seq=self._seq.take(),
            generation=state.generation,
            phase=state.phase.value,
            running=running.assignment_digest if running is not None else "",
            running_release=running.release_sha256 if running is not None else "",
            candidate=state.candidate.assignment_digest if state.candidate is not None else "",
            fetched_bytes=self._actions.fetched_bytes,
            requests=self._measures.answered,
            failed_requests=self._measures.failed,
            facts=facts if facts != self._sent_facts else None,
            outcome=self._outcome(),
        )
        return request, facts

    def _outcome(self) -> OutcomeReport | None:
        journal = self._driver.journal
        outcome = journal.state.outcome
        if outcome is None or journal.acknowledged:
            return None
        failure = outcome.failure
        return OutcomeReport(
            assignment_digest=outcome.assignment_digest,
            rollout_id=outcome.rollout_id,
            generation=outcome.generation,
            status=outcome.status,
            cause=failure.cause if failure is not None else "",
            code=failure.code if failure is not None else "",
            detail=failure.detail[:500] if failure is not None else "",
            golden=journal.golden,
            ratios=journal.ratios,
            fetched_bytes=journal.fetched_bytes,
            failed_requests=self._measures.failed,
        )

    async def _take(self, assignment: Assignment) -> None:
        if assignment.action == "run":
            target = Target(
                assignment.assignment_digest,
                assignment.release_sha256,
                assignment.release_seq,
                assignment.rollout_id,
                assignment.generation,
            )
            await self._driver.offer(Offered(target), assignment)
        elif assignment.action == "withdraw":
            await self._driver.feed(Withdrawn(assignment.assignment_digest, assignment.generation))
        else:
            await self._driver.feed(RevertOrdered(assignment.assignment_digest, assignment.generation))
