"""Persist, then act: the only place that feeds events to the device machine.

One command runs at a time. An event from outside (an offer, a withdrawal, an order to revert) that changes the plan
cancels the running command if it is one that may be left half done; every such command is safe to repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec

from slmops.agent.store.journal import Journal, write_journal
from slmops.agent.store.layout import Layout
from slmops.core.device.machine import (
    Command,
    Commands,
    DeviceState,
    Event,
    Failed,
    Failure,
    Offered,
    Phase,
    step,
)
from slmops.core.errors import NoSpaceError, SlmopsError
from slmops.protocol.messages import Assignment

log = logging.getLogger("slmops.agent")

#: commands that may be cancelled half way: each is repeated from the start, or undone by what follows
CANCELLABLE = frozenset(
    {
        Command.CHECK_ADMISSION,
        Command.FETCH,
        Command.VERIFY,
        Command.AWAIT_WINDOW,
        Command.ACTIVATE,
        Command.RUN_PROBATION,
        Command.REPAIR,
    }
)
#: phases whose persisting may fail without stopping: going back must go on even on a full disk
_GO_ON_UNPERSISTED = frozenset({Phase.REVERTING, Phase.REVERTED, Phase.SAFE_FALLBACK})

Act = Callable[[Command], Awaitable[Event | None]]


class Driver:
    """Owns the device's state."""

    def __init__(self, layout: Layout, journal: Journal, act: Act) -> None:
        """Go on from a journal.

        Args:
            layout: where to persist.
            journal: as read at the start.
            act: performs one command and says what came of it.
        """
        self._layout = layout
        self.journal = journal
        self._act = act
        self._lock = asyncio.Lock()
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._running: tuple[Command, asyncio.Task[Event | None]] | None = None
        self._overtaken = False
        #: set whenever something changed that the control plane should hear of soon
        self.report_soon = asyncio.Event()

    @property
    def state(self) -> DeviceState:
        """The machine's state as persisted."""
        return self.journal.state

    async def offer(self, event: Offered, assignment: Assignment) -> None:
        """Feed an offer together with the assignment behind it."""
        async with self._lock:
            await self._step(event, assignment)

    async def feed(self, event: Event) -> None:
        """Feed any other event."""
        async with self._lock:
            await self._step(event, None)

    async def note(self, **changes: object) -> None:
        """Persist facts about the candidate that are not the machine's (golden outcome, bytes fetched)."""
        async with self._lock:
            self.journal = msgspec.structs.replace(self.journal, **changes)
            write_journal(self._layout.journal, self.journal)

    async def acknowledge(self, outcome: object) -> None:
        """The control plane has taken this outcome."""
        async with self._lock:
            if self.state.outcome == outcome and not self.journal.acknowledged:
                self.journal = msgspec.structs.replace(self.journal, acknowledged=True)
                with contextlib.suppress(NoSpaceError):  # it is only reported once more after a restart
                    write_journal(self._layout.journal, self.journal)

    async def _step(self, event: Event, assignment: Assignment | None) -> None:
        before = self.state
        after, commands = step(before, event)
        if after is before and not commands:
            return
        if after != before:
            journal = next_journal(self.journal, after, assignment)
            try:
                await asyncio.to_thread(write_journal, self._layout.journal, journal)
            except NoSpaceError as error:
                if after.phase not in _GO_ON_UNPERSISTED:
                    log.error("cannot persist %s: %s", after.phase.value, error)
                    await self._stay(error)
                    return
                log.error("going on to %s without persisting it: %s", after.phase.value, error)
            self.journal = journal
            log.info("phase %s -> %s on %s", before.phase.value, after.phase.value, type(event).__name__)
        await self._enqueue(commands)

    async def _stay(self, error: NoSpaceError) -> None:
        """A forward step could not be persisted: give the candidate up in memory; the old journal on disk stays valid."""
        failed, commands = step(self.state, Failed(Failure("environment", error.code, error.message)))
        self.journal = next_journal(self.journal, failed, None)
        await self._enqueue(commands)

    async def _enqueue(self, commands: Commands) -> None:
        work = [command for command in commands if command is not Command.REPORT]
        if len(work) != len(commands) or work:
            self.report_soon.set()
        if not work:
            return
        planned = [self._commands.get_nowait() for _ in range(self._commands.qsize())]
        for command in planned:  # steps towards the old goal are overtaken; settling what serves is not
            if command not in CANCELLABLE:
                self._commands.put_nowait(command)
        if (
            self._running is not None
            and self._running[0] in CANCELLABLE
            and self._running[1] is not asyncio.current_task()
        ):
            self._overtaken = self._running[1].cancel()
        for command in work:
            self._commands.put_nowait(command)

    async def run(self) -> None:
        """Perform commands for ever."""
        while True:
            command = await self._commands.get()
            event = await self._perform(command)
            if event is not None:
                await self.feed(event)

    async def _perform(self, command: Command) -> Event | None:
        task = asyncio.ensure_future(self._act(command))
        self._running = (command, task)
        try:
            return await task
        except asyncio.CancelledError:
            if not self._overtaken:  # it is the driver that is being stopped
                raise
            self._overtaken = False
            log.info("%s was overtaken", command.value)
            return None
        except SlmopsError as error:
            log.error("%s failed: %s", command.value, error)
            return Failed(failure_of(command, error))
        except Exception as error:  # a bug of ours must not stop a device from going back
            log.exception("%s failed", command.value)
            return Failed(Failure("environment", "bug", f"{type(error).__name__} in {command.value}"))
        finally:
            self._running = None


def failure_of(command: Command, error: SlmopsError) -> Failure:
    """Content or environment? The engine refusing its file is the release's fault; disk, network and trust are not."""
    content = command in (Command.ACTIVATE, Command.RUN_PROBATION) and error.code in (
        "device.runtime_load",
        "device.health_check",
    )
    return Failure("content" if content else "environment", error.code, error.message)


def next_journal(journal: Journal, state: DeviceState, assignment: Assignment | None) -> Journal:
    """The journal for a new state: the assignment lives as long as its candidate, its figures until the next one begins."""
    if state.candidate is None:
        kept = None
    elif assignment is not None and assignment.assignment_digest == state.candidate.assignment_digest:
        kept = assignment
    else:
        kept = journal.assignment
    fresh_candidate = state.candidate is not None and (
        journal.state.candidate is None
        or journal.state.candidate.assignment_digest != state.candidate.assignment_digest
    )
    changes: dict[str, object] = {"state": state, "assignment": kept}
    if state.outcome != journal.state.outcome:
        changes["acknowledged"] = False
    if fresh_candidate or _about_another(journal.state, state):
        changes |= {"golden": None, "ratios": {}, "fetched_bytes": 0}
    known = {
        a.assignment_digest: a for a in (*journal.proved, journal.assignment, assignment) if a is not None
    }
    named = [
        target.assignment_digest for target in (state.committed, state.previous, state.candidate) if target
    ]
    changes["proved"] = tuple(known[digest] for digest in named if digest in known)
    return msgspec.structs.replace(journal, **changes)


def _about_another(before: DeviceState, after: DeviceState) -> bool:
    """The new outcome is not about the release whose figures the journal holds."""
    if after.outcome is None or after.outcome == before.outcome:
        return False
    held = before.candidate or before.outcome
    return held is None or held.assignment_digest != after.outcome.assignment_digest
