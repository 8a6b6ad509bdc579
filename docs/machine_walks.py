"""Complete walks of the two state machines: every reachable state, and what every event does to it.

Used by ``docs/generate.py`` (which draws the diagrams) and by ``tests/machine`` (which checks the invariants on every
edge), so that the drawing and the proof are about the same thing.

Counters and identities are made finite without losing behaviour: the machines compare generations, steps and times
only with each other and with limits, so a state is kept with its generation renumbered to :data:`NOW`, and the limits
are lowered (:data:`STEPS`, :data:`STARTS`) while the walk runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

from slmops.core.device import machine as device
from slmops.core.evidence.gates import Verdict
from slmops.core.rollout import machine as rollout

# ---- device ----------------------------------------------------------------------------------------------

#: the generation that every canonical state has acted upon
NOW = 10
#: lowered limits: the machine only compares with them
STEPS, STARTS = 7, 2
#: assignments of the walk: digest and release_seq
RELEASES = (("a", 1), ("b", 2))

CONTENT = device.Failure("content", "device.health_check", "")
ENVIRONMENT = device.Failure("environment", "device.no_space", "")

#: what a shell that does its work answers in each phase: (it worked, it did not)
HONEST: dict[device.Phase, tuple[device.Event, ...]] = {
    device.Phase.ADMISSION: (device.Admitted(), device.Refused(("too big",)), device.Failed(ENVIRONMENT)),
    device.Phase.DOWNLOADING: (device.Fetched(), device.Failed(ENVIRONMENT), device.Failed(CONTENT)),
    device.Phase.VERIFYING: (device.Verified(), device.Failed(CONTENT)),
    device.Phase.STAGED: (device.WindowOpened(), device.Failed(ENVIRONMENT)),
    device.Phase.ACTIVATING: (device.Activated(), device.Failed(CONTENT), device.Failed(ENVIRONMENT)),
    device.Phase.PROBATION: (device.Proved(), device.Failed(CONTENT), device.Failed(ENVIRONMENT)),
    device.Phase.REVERTING: (device.Restored(), device.Failed(ENVIRONMENT)),
}


@dataclass(frozen=True)
class DeviceEdge:
    """One event in one reachable state."""

    before: device.DeviceState
    event: device.Event
    after: device.DeviceState
    commands: device.Commands


def target(digest: str, release_seq: int, generation: int) -> device.Target:
    """An assignment of the walk."""
    return device.Target(digest, f"release-{digest}", release_seq, "rollout", generation)


def device_events() -> list[device.Event]:
    """Every event that can mean something different: late and new generations, known and unknown digests."""
    events: list[device.Event] = [
        device.Admitted(),
        device.Refused(("too big",)),
        device.Fetched(),
        device.Verified(),
        device.WindowOpened(),
        device.Activated(),
        device.Proved(),
        device.Restored(),
        device.Failed(CONTENT),
        device.Failed(ENVIRONMENT),
        device.Unserved(ENVIRONMENT),
        device.Repaired(),
        *(device.Booted(pointer) for pointer in (None, "a", "b")),  # type: ignore[arg-type]
    ]
    for generation in (0, NOW - 1, NOW, NOW + 1):
        for digest, seq in RELEASES:
            events.append(device.Offered(target(digest, seq, generation)))
            events.append(device.Offered(target(digest, seq, generation), downgrade_granted=True))
            events.append(device.Withdrawn(digest, generation))
        events.extend(device.RevertOrdered(digest, generation) for digest in ("", "a", "b"))
    return events


def canonical(state: device.DeviceState) -> device.DeviceState:
    """The state with everything that no decision depends on taken out."""

    def plain(kept: device.Target | None, generation: int) -> device.Target | None:
        return None if kept is None else replace(kept, generation=generation)

    candidate = state.candidate
    age = NOW - 1 if candidate is not None and candidate.generation < state.generation else NOW
    outcome = state.outcome
    about = ""  # of an outcome, the machine asks only whether it is about what is committed
    if outcome is not None and state.committed is not None:
        about = (
            outcome.assignment_digest
            if outcome.assignment_digest == state.committed.assignment_digest
            else ""
        )
    return replace(
        state,
        generation=0 if state.generation == 0 else NOW,
        committed=plain(state.committed, 0),
        previous=plain(state.previous, 0),
        candidate=plain(candidate, 0 if state.generation == 0 else age),
        quarantine=tuple(sorted(state.quarantine)),
        failure=None if state.failure is None else device.Failure(state.failure.cause, "", ""),
        outcome=None if outcome is None else device.Outcome(about, "", 0, outcome.status),
    )


@contextmanager
def lowered_limits() -> Iterator[None]:
    """The device machine with limits that a walk can reach from everywhere."""
    limits = device.MAX_STEPS, device.MAX_PROBATION_STARTS
    device.MAX_STEPS, device.MAX_PROBATION_STARTS = STEPS, STARTS
    try:
        yield
    finally:
        device.MAX_STEPS, device.MAX_PROBATION_STARTS = limits


def walk_device() -> list[DeviceEdge]:
    """Every event in every reachable state of a device."""
    events = device_events()
    edges: list[DeviceEdge] = []
    start = device.DeviceState()
    seen = {start}
    waiting = deque([start])
    with lowered_limits():
        while waiting:
            before = waiting.popleft()
            for event in events:
                after, commands = device.step(before, event)
                edges.append(DeviceEdge(before, event, after, commands))
                following = canonical(after)
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return edges


# ---- rollout ---------------------------------------------------------------------------------------------

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
WAVES = 3
BAKE_MIN_S, BAKE_MAX_S = 600, 86_400
#: how long a phase has lasted when an event comes: too short, long enough to promote, too long to wait
WAITS = (timedelta(seconds=1), timedelta(seconds=BAKE_MIN_S), timedelta(seconds=BAKE_MAX_S + 1))


@dataclass(frozen=True)
class RolloutEdge:
    """One event in one reachable state; ``error`` when the table says that it is illegal."""

    before: rollout.RolloutState
    event: rollout.Event
    waited: timedelta
    after: rollout.RolloutState
    commands: tuple[rollout.Command, ...]
    error: rollout.IllegalTransitionError | None = None


def rollout_events() -> list[rollout.Event]:
    """Every event that can mean something different."""
    judged: list[rollout.Event] = [
        rollout.Judged(verdict, complete, "because", unreached)
        for verdict in Verdict
        for complete in (False, True)
        for unreached in (0, 1)
    ]
    return [
        rollout.Approved("ann"),
        rollout.Approved("bob"),
        rollout.Rejected("ann"),
        rollout.Started(),
        *judged,
        rollout.PauseOrdered("holiday"),
        rollout.ResumeOrdered(),
        rollout.AbortOrdered("no"),
        rollout.RollbackOrdered("no"),
        rollout.RevertsSettled(True),
        rollout.RevertsSettled(False),
        rollout.Superseded("newer"),
    ]


def walk_rollout(policy: rollout.Policy) -> list[RolloutEdge]:
    """Every event, after every wait, in every reachable state of a rollout."""
    events = rollout_events()
    edges: list[RolloutEdge] = []
    start = rollout.begin(policy, BEGIN)
    seen = {start}
    waiting = deque([start])
    while waiting:
        before = waiting.popleft()
        for event in events:
            for waited in WAITS:
                try:
                    after, commands = rollout.step(before, event, policy, BEGIN + waited)
                except rollout.IllegalTransitionError as error:
                    edges.append(RolloutEdge(before, event, waited, before, (), error))
                    continue
                edges.append(RolloutEdge(before, event, waited, after, commands))
                following = replace(after, since=BEGIN, reason="")
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return edges
