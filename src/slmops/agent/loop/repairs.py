"""When what was proved cannot be served: the previous release stands in, and what is damaged is fetched again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from slmops.agent.loop.fetching import Fetching
from slmops.agent.release_source import ReleaseSource
from slmops.agent.retry import pause_s
from slmops.agent.serving import Backend, EngineKeeper, Router
from slmops.agent.store.journal import Journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import Slot, read_slot, write_slot
from slmops.core.device.machine import (
    BEFORE_ACTIVATION,
    Event,
    Failure,
    Phase,
    Repaired,
    SlotName,
    Unserved,
)
from slmops.core.errors import DigestError, SlmopsError

log = logging.getLogger("slmops.agent")

_LONGEST_REPAIR_PAUSE_S = 60.0


class Repairs:
    """The two commands of a device that lost what it had proved: serve something, and repair."""

    def __init__(  # noqa: PLR0913 - it touches files, network and engines
        self,
        layout: Layout,
        source: ReleaseSource,
        fetching: Fetching,
        keeper: EngineKeeper,
        router: Router,
        chance: random.Random,
        *,
        journal: Callable[[], Journal],
        bring_up: Callable[[SlotName], Awaitable[Backend]],
        feed: Callable[[Event], Coroutine[Any, Any, None]],
    ) -> None:
        """Wire the parts.

        Args:
            layout: the device's folder.
            source: verifies what a slot is made anew from.
            fetching: gets damaged files back.
            keeper: the engines.
            router: the traffic.
            chance: for pauses.
            journal: as it stands now.
            bring_up: starts a slot's engine, beside the serving one or in its place.
            feed: tells the device machine.
        """
        self._layout, self._source, self._fetching = layout, source, fetching
        self._keeper, self._router, self._chance = keeper, router, chance
        self._journal, self._bring_up, self._feed = journal, bring_up, feed
        keeper.on_damage = self._on_damage

    def _on_damage(self, name: SlotName, error: DigestError) -> None:
        """The serving engine died and its files are damaged: nothing of it can be started again."""
        if name == self._journal().state.committed_slot:
            feeding = self._feed(Unserved(why_lost(error)))
            self._telling = asyncio.get_running_loop().create_task(feeding)

    async def serve_fallback(self) -> Event | None:
        """The committed release is lost: the previous one stands in where it is whole, else requests are told at once."""
        await self._router.hold()
        await self._keeper.stop_all()
        await self._stand_in()
        return None

    async def _stand_in(self) -> None:
        state = self._journal().state
        if state.previous is not None:
            try:
                await self._router.point_to(await self._keeper.start(state.candidate_slot))
            except (SlmopsError, OSError) as error:
                log.error("the previous release cannot stand in: %s", error)
            else:
                log.warning("the previous release stands in for the committed one")
                return
        await self._router.give_up(
            "what this device had proved is damaged or does not start, and there is nothing before it: "
            "it is being repaired, or waits for a new release"
        )

    async def repair(self) -> Event | None:
        """Fetch what is damaged of the committed release again and serve it; tried for as long as nothing else is to do."""
        attempt = 0
        while True:
            state = self._journal().state
            name = state.committed_slot
            if name is None or state.phase not in BEFORE_ACTIVATION | {Phase.SAFE_FALLBACK}:
                return None
            try:
                await self._fetching.mend(await self._slot_to_mend(name))
                await self._router.point_to(await self._bring_up(name))
            except (SlmopsError, OSError) as error:
                attempt += 1
                wait = min(pause_s(attempt, self._chance), _LONGEST_REPAIR_PAUSE_S)
                log.warning("the committed release is not repaired: %s", error)
                if self._router.active is None or not self._router.active.engine.alive():
                    await self._stand_in()
                if state.phase is not Phase.SAFE_FALLBACK:
                    return None  # a candidate is under way: it is what may come up first
                await asyncio.sleep(wait)
            else:
                log.info("the committed release is whole and serves again")
                return Repaired()

    async def _slot_to_mend(self, name: SlotName) -> Slot:
        """The committed slot; a manifest that cannot be read is made anew from what was once assigned."""
        slot = read_slot(self._layout, name)
        if slot is not None:
            return slot
        journal = self._journal()
        state = journal.state
        digest = state.committed.assignment_digest if state.committed is not None else ""
        for assignment in journal.proved:
            if assignment.assignment_digest == digest:
                resolved = await self._source.resolve(assignment)
                slot = resolved.slot()
                await asyncio.to_thread(write_slot, self._layout, name, slot)
                return slot
        raise DigestError(
            f"slot {name} cannot be read, and nothing tells what was in it",
            hint="let the control plane assign the release again",
        )


def why_lost(error: SlmopsError | OSError) -> Failure:
    """Why what was proved cannot be served: never the release's fault, it did serve here."""
    if isinstance(error, SlmopsError):
        return Failure("environment", error.code, error.message)
    return Failure("environment", "device", str(error))
