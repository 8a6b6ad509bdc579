"""The shell around the device machine: persist, then act; after any crash the journal leads to a good end."""

from __future__ import annotations

import asyncio
import resource
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from slmops.agent.loop.driver import Driver, failure_of
from slmops.agent.store.journal import Journal, read_journal, write_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_pointer, write_pointer
from slmops.core.device.machine import (
    RESTING,
    Activated,
    Admitted,
    Booted,
    Command,
    DeviceState,
    Event,
    Failed,
    Failure,
    Fetched,
    Offered,
    Phase,
    Proved,
    Restored,
    RevertOrdered,
    Target,
    Verified,
    WindowOpened,
    Withdrawn,
)
from slmops.core.errors import NoSpaceError, RuntimeLoadError
from slmops.protocol.messages import Assignment

_GOOD: dict[Command, Event | None] = {
    Command.CHECK_ADMISSION: Admitted(),
    Command.FETCH: Fetched(),
    Command.VERIFY: Verified(),
    Command.AWAIT_WINDOW: WindowOpened(),
    Command.ACTIVATE: Activated(),
    Command.RUN_PROBATION: Proved(),
    Command.REVERT: Restored(),
}


class Device:
    """A driver whose acts are scripted: they succeed unless told to fail, and stop for good when the power is cut."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.layout.make()
        self.fail: dict[Command, Failure] = {}
        self.acts_left: int | None = None
        self.seen: list[Command] = []
        self.boot()

    def boot(self) -> None:
        self.driver = Driver(self.layout, read_journal(self.layout.journal), self.act)

    async def act(self, command: Command) -> Event | None:
        if self.acts_left is not None:
            if self.acts_left == 0:
                await asyncio.Event().wait()  # the power is gone
            self.acts_left -= 1
        self.seen.append(command)
        state = self.driver.state
        if command in self.fail:
            return Failed(self.fail[command])
        if command is Command.ACTIVATE:
            write_pointer(self.layout.pointer, state.candidate_slot)
        if command is Command.REVERT and state.committed_slot is not None:
            write_pointer(self.layout.pointer, state.committed_slot)
        return _GOOD.get(command)

    def run(self, *events: tuple[Event, Assignment | None], acts: int | None = None) -> None:
        """Feed events to a freshly started device and let it work until nothing is left to do (or the power goes)."""

        async def live() -> None:
            worker = asyncio.create_task(self.driver.run())
            await self.driver.feed(Booted(read_pointer(self.layout.pointer)))
            for event, assignment in events:
                if isinstance(event, Offered) and assignment is not None:
                    await self.driver.offer(event, assignment)
                else:
                    await self.driver.feed(event)
            quiet = 0
            while (
                quiet < 5
            ):  # nothing planned, nothing running, for some turns of the loop and of its threads
                await asyncio.sleep(0.001)
                dead = self.acts_left == 0 and self.driver._running is not None
                idle = (
                    self.driver._commands.empty()
                    and self.driver._running is None
                    and not self.driver._lock.locked()
                )
                quiet = quiet + 1 if idle or dead else 0
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)

        self.acts_left = acts
        self.boot()
        asyncio.run(live())


def _offer(generation: int, digest: str | None = None, seq: int | None = None) -> tuple[Offered, Assignment]:
    name = digest or f"{generation:064d}"
    target = Target(name, name, seq if seq is not None else generation, "r", generation)
    return Offered(target), Assignment(1, generation, "run", name)


class DriverMachine(RuleBasedStateMachine):
    """Offers, failures, orders and power cuts in any order: what was proved is never lost, and every story ends at rest."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.device = Device(Path(self.folder.name))
        self.generation = 0
        self.proved: set[str] = set()
        self.bad: set[str] = set()

    def _next(self) -> int:
        self.generation += 1
        return self.generation

    @rule(cut=st.one_of(st.none(), st.integers(0, 9)))
    def a_good_release(self, cut: int | None) -> None:
        offer = _offer(self._next())
        self.device.fail = {}
        self.device.run(offer, acts=cut)
        self.proved.add(offer[0].target.assignment_digest)

    @rule(
        where=st.sampled_from(
            [Command.CHECK_ADMISSION, Command.FETCH, Command.VERIFY, Command.ACTIVATE, Command.RUN_PROBATION]
        ),
        cause=st.sampled_from(["content", "environment"]),
        cut=st.one_of(st.none(), st.integers(0, 9)),
    )
    def a_failing_release(self, where: Command, cause: str, cut: int | None) -> None:
        offer = _offer(self._next())
        self.device.fail = {where: Failure(cause, "test", "scripted")}  # type: ignore[arg-type]
        self.device.run(offer, acts=cut)
        self.bad.add(offer[0].target.assignment_digest)
        self.device.run()  # a restart, still failing: it must settle all the same
        self.device.fail = {}

    @rule()
    def an_order_to_revert(self) -> None:
        self.device.run((RevertOrdered("", self._next()), None))

    @rule()
    def a_withdrawal(self) -> None:
        offer = _offer(self._next())
        digest = offer[0].target.assignment_digest
        self.device.fail = {}
        self.device.run(offer, (Withdrawn(digest, self._next()), None))
        self.proved.add(digest)  # it may have been quicker than the withdrawal

    @rule()
    def a_restart(self) -> None:
        self.device.fail = {}
        self.device.run()
        assert self.device.driver.state.phase in RESTING

    @invariant()
    def what_serves_was_proved(self) -> None:
        if hasattr(self, "device"):
            state = read_journal(self.device.layout.journal).state
            assert state.committed is None or state.committed.assignment_digest in self.proved
            assert state.committed is None or state.committed.assignment_digest not in self.bad
            assert state.phase is not Phase.SAFE_FALLBACK

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestDriver = DriverMachine.TestCase
TestDriver.settings = settings(max_examples=20, stateful_step_count=10, deadline=None)


def test_a_power_cut_before_every_act_ends_old_or_new(tmp_path: Path) -> None:
    """Cut after 0, 1, 2 ... acts of an update; restart; the device ends with the new release and never without one."""
    for acts in range(12):
        device = Device(tmp_path / str(acts))
        device.run(_offer(1))
        assert device.driver.state.phase is Phase.COMMITTED
        device.run(_offer(2), acts=acts)
        after_cut = read_journal(device.layout.journal).state
        assert after_cut.committed is not None
        device.run()
        final = device.driver.state
        assert final.phase is Phase.COMMITTED
        assert final.committed is not None and final.committed.generation == 2


def test_a_candidate_that_never_passes_probation_is_given_up_after_some_starts(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.run(_offer(1))
    device.run(_offer(2), acts=7)  # serving, then up to ACTIVATE; the power goes in probation
    for _ in range(6):
        device.run(acts=1)  # serves the committed release, then dies again
    device.run()
    state = device.driver.state
    assert state.phase is Phase.REVERTED
    assert state.outcome is not None and state.outcome.failure is not None
    assert state.outcome.failure.code == "device.crash_loop"


def test_a_forward_step_that_cannot_be_persisted_is_not_taken(tmp_path: Path) -> None:
    """A full disk (the file-size limit stands for it): the offer is dropped in memory, the disk holds the old state."""
    device = Device(tmp_path)
    device.run(_offer(1))
    before = device.layout.journal.read_bytes()
    offered, assignment = _offer(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        asyncio.run(device.driver.offer(offered, assignment))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert device.driver.state.phase is Phase.COMMITTED
    assert device.layout.journal.read_bytes() == before
    device.run(_offer(2))  # with room again, the same offer is taken
    assert device.driver.state.committed is not None and device.driver.state.committed.generation == 2


def test_only_the_engine_is_to_blame_for_content() -> None:
    refused = RuntimeLoadError("cannot load")
    assert failure_of(Command.ACTIVATE, refused).cause == "content"
    assert failure_of(Command.FETCH, refused).cause == "environment"
    assert failure_of(Command.ACTIVATE, NoSpaceError("full")).cause == "environment"


def test_a_damaged_journal_is_never_guessed(tmp_path: Path) -> None:
    import pytest

    from slmops.core.errors import TrustError

    layout = Layout(tmp_path)
    layout.make()
    write_journal(layout.journal, Journal(1, DeviceState()))
    for damage in (b"", b"{", b'{"schema": 99, "state": {}}'):
        layout.journal.write_bytes(damage)
        with pytest.raises(TrustError, match=r"journal"):
            read_journal(layout.journal)
