"""The rollout machine: which wave is open, and when the whole thing stops.

``step(state, event, now) -> (state, commands)`` is the only way a rollout changes. It knows phases, the
number of the open wave and the time it opened, nothing about single devices: ``judge`` turns those into a
:class:`Judged` event. That keeps the state space small enough to be walked completely in the tests.

Theory of operation
-------------------
::

    awaiting_approval -> scheduled -> running: open wave i -> baking wave i -> open wave i+1 ... -> completed
                    `-> rejected      |
                                      |-> paused (operator, inconclusive, server restored) <-> running
                                      `-> rolling_back -> rolled_back | rollback_incomplete     (or aborted,
                                      by policy)

* Gates are asked in every phase in which devices may hold the release, also while paused: a failing gate
  aborts.
* A gate that cannot be computed (error) pauses at once.
* ``baking`` begins when the wave has passed once and every device of it is settled; the wave is promoted when
  it still passes after ``bake.min_s``. Inconclusive past ``bake.max_s`` pauses and asks a person.
* Only a pass promotes. Inconclusive, error and silence never do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Literal

from slmops.core.errors import IllegalTransitionError
from slmops.core.evidence.gates import Verdict


class Phase(str, Enum):
    """Where the rollout is."""

    AWAITING_APPROVAL = "awaiting_approval"
    SCHEDULED = "scheduled"
    OPEN = "open"
    BAKING = "baking"
    PAUSED = "paused"
    ROLLING_BACK = "rolling_back"
    COMPLETED = "completed"
    COMPLETED_PARTIAL = "completed_partial"
    ROLLED_BACK = "rolled_back"
    ROLLBACK_INCOMPLETE = "rollback_incomplete"
    ABORTED = "aborted"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"


ENDED = frozenset(
    {
        Phase.COMPLETED,
        Phase.COMPLETED_PARTIAL,
        Phase.ROLLED_BACK,
        Phase.ROLLBACK_INCOMPLETE,
        Phase.ABORTED,
        Phase.REJECTED,
        Phase.SUPERSEDED,
    }
)
RUNNING = frozenset({Phase.OPEN, Phase.BAKING})
#: phases in which some device may hold the release and the rollout still answers for it
EXPOSED = RUNNING | {Phase.PAUSED}

OnAbort = Literal["hold", "revert_uncommitted", "revert_all"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The parts of a blueprint's rollout section that the machine follows.

    Attributes:
        waves: how many waves the plan has.
        approvals: persons who must approve first.
        bake_min_s: a passed wave is held this long; ``bake_max_s``: an inconclusive one is waited for this
            long.
        on_abort: what happens to devices that already have the release.
    """

    waves: int
    approvals: int = 0
    bake_min_s: int = 600
    bake_max_s: int = 86_400
    on_abort: OnAbort = "revert_all"


@dataclass(frozen=True, slots=True)
class RolloutState:
    """Everything that the machine remembers.

    Attributes:
        phase: where it is.
        wave: index of the open wave; -1 before the first.
        since: when this phase, or this wave's baking, began; UTC.
        approved_by: who approved so far.
        reason: why it paused or stopped, in words.
        resume_to: the phase that a resume returns to.
    """

    phase: Phase
    wave: int
    since: datetime
    approved_by: tuple[str, ...] = ()
    reason: str = ""
    resume_to: Phase | None = None


# ---- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Approved:
    """A person approved."""

    by: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A person said no."""

    by: str


@dataclass(frozen=True, slots=True)
class Started:
    """The start time has come."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The judge looked at the open wave.

    Attributes:
        verdict: worst finding.
        complete: no device of the wave is waiting or in flight.
        reason: the sentence behind the verdict.
        unreached: devices of any wave that never acknowledged.
    """

    verdict: Verdict
    complete: bool
    reason: str = ""
    unreached: int = 0


@dataclass(frozen=True, slots=True)
class PauseOrdered:
    """Somebody, or the server after a restore, wants it to stop here."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResumeOrdered:
    """A person lets it go on."""


@dataclass(frozen=True, slots=True)
class AbortOrdered:
    """Stop offering, and treat exposed devices by the blueprint's ``on_abort``."""

    reason: str


@dataclass(frozen=True, slots=True)
class RollbackOrdered:
    """Every device that this rollout touched goes back."""

    reason: str


@dataclass(frozen=True, slots=True)
class RevertsSettled:
    """No revert is outstanding any more; ``complete`` when every touched device is back."""

    complete: bool


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer rollout owns the devices."""

    by: str


Event = (
    Approved
    | Rejected
    | Started
    | Judged
    | PauseOrdered
    | ResumeOrdered
    | AbortOrdered
    | RollbackOrdered
    | RevertsSettled
    | Superseded
)


# ---- commands --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenWave:
    """Devices of this wave may now be offered the release."""

    wave: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Stop offering; devices that have not activated yet forget it."""


@dataclass(frozen=True, slots=True)
class RevertDevices:
    """Devices that hold the release go back: all of them, or those that have not committed."""

    scope: Literal["all", "uncommitted"]


@dataclass(frozen=True, slots=True)
class Close:
    """The rollout has ended: previous slots may be collected."""

    phase: Phase


Command = OpenWave | Withdraw | RevertDevices | Close
Step = tuple[RolloutState, tuple[Command, ...]]


def begin(policy: Policy, now: datetime) -> RolloutState:
    """The state of a rollout that has just been created."""
    return RolloutState(Phase.AWAITING_APPROVAL if policy.approvals else Phase.SCHEDULED, -1, now)


def _end(state: RolloutState, phase: Phase, now: datetime, reason: str, *before: Command) -> Step:
    return replace(state, phase=phase, since=now, reason=reason, resume_to=None), (*before, Close(phase))


def _stop(state: RolloutState, on_abort: OnAbort, now: datetime, reason: str) -> Step:
    if on_abort == "hold":
        return _end(state, Phase.ABORTED, now, reason, Withdraw())
    scope: Literal["all", "uncommitted"] = "all" if on_abort == "revert_all" else "uncommitted"
    rolling = replace(state, phase=Phase.ROLLING_BACK, since=now, reason=reason, resume_to=None)
    return rolling, (Withdraw(), RevertDevices(scope))


def _on_approved(state: RolloutState, event: Approved, policy: Policy, now: datetime) -> Step:
    if event.by in state.approved_by:
        return state, ()
    approved = (*state.approved_by, event.by)
    phase = Phase.SCHEDULED if len(approved) >= policy.approvals else state.phase
    return replace(state, approved_by=approved, phase=phase, since=now), ()


def _on_rejected(state: RolloutState, event: Rejected, policy: Policy, now: datetime) -> Step:
    return _end(state, Phase.REJECTED, now, f"rejected by {event.by}")


def _on_started(state: RolloutState, event: Started, policy: Policy, now: datetime) -> Step:
    return replace(state, phase=Phase.OPEN, wave=0, since=now), (OpenWave(0),)


def _on_judged(state: RolloutState, event: Judged, policy: Policy, now: datetime) -> Step:
    if event.verdict is Verdict.FAIL:
        return _stop(state, policy.on_abort, now, event.reason)
    if state.phase is Phase.PAUSED:
        return state, ()
    if (
        event.verdict is Verdict.ERROR
    ):  # fail closed: no further device is exposed behind a gate that cannot see
        return _pause(state, now, f"error: {event.reason}")
    waited = now - state.since
    if event.verdict is Verdict.PASS and event.complete:
        return _promote(state, event, policy, now, waited)
    # A complete wave without a pass cannot pass by itself: wait for bake.max_s, then ask a person.
    settled = event.complete or state.phase is Phase.BAKING
    if settled and waited > timedelta(seconds=policy.bake_max_s):
        return _pause(state, now, f"inconclusive: {event.reason}")
    return state, ()


def _promote(state: RolloutState, event: Judged, policy: Policy, now: datetime, waited: timedelta) -> Step:
    """A pass: from open to baking, and after ``bake.min_s`` to the next wave or the end."""
    if state.phase is Phase.OPEN:
        return replace(state, phase=Phase.BAKING, since=now, reason=event.reason), ()
    if waited < timedelta(seconds=policy.bake_min_s):
        return state, ()
    if state.wave + 1 == policy.waves:
        return _end(state, Phase.COMPLETED_PARTIAL if event.unreached else Phase.COMPLETED, now, event.reason)
    opened = replace(state, phase=Phase.OPEN, wave=state.wave + 1, since=now, reason=event.reason)
    return opened, (OpenWave(opened.wave),)


def _pause(state: RolloutState, now: datetime, reason: str) -> Step:
    return replace(state, phase=Phase.PAUSED, since=now, reason=reason, resume_to=state.phase), ()


def _on_pause(state: RolloutState, event: PauseOrdered, policy: Policy, now: datetime) -> Step:
    return _pause(state, now, event.reason)


def _on_resume(state: RolloutState, event: ResumeOrdered, policy: Policy, now: datetime) -> Step:
    phase = state.resume_to or Phase.SCHEDULED
    return replace(state, phase=phase, since=now, reason="resumed", resume_to=None), ()


def _on_abort(state: RolloutState, event: AbortOrdered, policy: Policy, now: datetime) -> Step:
    if state.phase not in EXPOSED:  # nobody was offered anything yet
        return _end(state, Phase.ABORTED, now, event.reason)
    return _stop(state, policy.on_abort, now, event.reason)


def _on_rollback(state: RolloutState, event: RollbackOrdered, policy: Policy, now: datetime) -> Step:
    return _stop(state, "revert_all", now, event.reason)


def _on_reverts_settled(state: RolloutState, event: RevertsSettled, policy: Policy, now: datetime) -> Step:
    return _end(state, Phase.ROLLED_BACK if event.complete else Phase.ROLLBACK_INCOMPLETE, now, state.reason)


def _on_superseded(state: RolloutState, event: Superseded, policy: Policy, now: datetime) -> Step:
    return _end(state, Phase.SUPERSEDED, now, f"superseded by {event.by}", Withdraw())


_WAITING = frozenset({Phase.AWAITING_APPROVAL, Phase.SCHEDULED})
_ALIVE = frozenset(Phase) - ENDED

#: event -> (phases in which it is legal, phases in which it is late and ignored, what it does)
TABLE: dict[type[Event], tuple[frozenset[Phase], frozenset[Phase], Callable[..., Step]]] = {
    Approved: (frozenset({Phase.AWAITING_APPROVAL}), frozenset({Phase.SCHEDULED}), _on_approved),
    Rejected: (_WAITING, frozenset(), _on_rejected),
    Started: (frozenset({Phase.SCHEDULED}), frozenset(Phase) - {Phase.SCHEDULED}, _on_started),
    Judged: (EXPOSED, frozenset(Phase) - EXPOSED, _on_judged),
    PauseOrdered: (RUNNING | {Phase.SCHEDULED}, frozenset({Phase.PAUSED}), _on_pause),
    ResumeOrdered: (frozenset({Phase.PAUSED}), RUNNING, _on_resume),
    AbortOrdered: (_WAITING | EXPOSED, frozenset({Phase.ROLLING_BACK}), _on_abort),
    RollbackOrdered: (
        EXPOSED | {Phase.COMPLETED, Phase.COMPLETED_PARTIAL, Phase.ABORTED},
        frozenset({Phase.ROLLING_BACK}),
        _on_rollback,
    ),
    RevertsSettled: (
        frozenset({Phase.ROLLING_BACK}),
        frozenset(Phase) - {Phase.ROLLING_BACK},
        _on_reverts_settled,
    ),
    Superseded: (_ALIVE - {Phase.ROLLING_BACK}, ENDED | {Phase.ROLLING_BACK}, _on_superseded),
}


def step(state: RolloutState, event: Event, policy: Policy, now: datetime) -> Step:
    """Decide what an event means for a rollout.

    Args:
        state: as last persisted.
        event: what happened.
        policy: the blueprint's rollout section.
        now: UTC.

    Returns:
        The state to persist together with the commands, in one transaction.

    Raises:
        IllegalTransitionError: a person asked for something that this phase does not allow (resume what is
        not
            paused). Events of the system itself never raise: late ones return the same state.
    """
    legal, ignored, act = TABLE[type(event)]
    if state.phase in legal:
        return act(state, event, policy, now)
    if state.phase in ignored:
        return state, ()
    raise IllegalTransitionError(
        f"a rollout that is {state.phase.value} cannot take {type(event).__name__}",
        hint="slmops rollout show ID says where it stands and what it allows",
        phase=state.phase.value,
    )
