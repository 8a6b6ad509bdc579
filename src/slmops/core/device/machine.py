"""The device machine: how one device goes from the assignment it runs to the one it should run.

Everything that may change a device's state lives in this file, as ``step(state, event) -> (state,
commands)``. The shell (``agent/loop``) persists the new state *before* it acts on the commands, so after a
power cut the journal names work that may have been done already: every command must be safe to repeat.

Theory of operation
-------------------
A device rests in one of four phases: ``idle`` (never ran anything), ``committed`` (runs what it proved),
``reverted`` (went back to what it had proved before) and ``safe_fallback`` (could not even go back). An offer
moves it through admission, download, verification and staging; none of these touches what is being served.
``activating`` loads the candidate into the other slot and flips the pointer; ``probation`` lets it prove
itself with the golden packs of its own and of the committed release. Only then does the device commit.

Failures carry a cause: *content* (the release is bad: its digest is quarantined and never tried again) or
*environment* (disk, network, power: the same release may be offered again).

What was committed may get lost on the device itself (:class:`Unserved`: a damaged disk). It then rests in
``safe_fallback``, serves the previous release where that is whole, and repairs what it had proved by fetching the
damaged pieces again (:class:`Repaired`). An offer is taken meanwhile as from any other rest.

After a start (:class:`Booted`) the machine resumes by phase. The one question that it cannot answer from the
journal is whether the pointer was flipped before the power went; the shell reads the pointer and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from slmops.core.device.states import (
    BEFORE_ACTIVATION,
    IN_TRIAL,
    RESTING,
    Activated,
    Admitted,
    Booted,
    Cause,
    Command,
    Commands,
    DeviceState,
    Event,
    Failed,
    Failure,
    Fetched,
    Offered,
    Outcome,
    Phase,
    Proved,
    Refused,
    Repaired,
    Restored,
    RevertOrdered,
    SlotName,
    Step,
    Target,
    Unserved,
    Verified,
    WindowOpened,
    Withdrawn,
)
from slmops.core.errors import BugError

__all__ = [
    "BEFORE_ACTIVATION",
    "IN_TRIAL",
    "MAX_PROBATION_STARTS",
    "MAX_QUARANTINE",
    "MAX_STEPS",
    "RESTING",
    "TABLE",
    "Activated",
    "Admitted",
    "Booted",
    "Cause",
    "Command",
    "Commands",
    "DeviceState",
    "Event",
    "Failed",
    "Failure",
    "Fetched",
    "Offered",
    "Outcome",
    "Phase",
    "Proved",
    "Refused",
    "Repaired",
    "Restored",
    "RevertOrdered",
    "SlotName",
    "Step",
    "Target",
    "Unserved",
    "Verified",
    "WindowOpened",
    "Withdrawn",
    "step",
]

#: starts that a candidate gets in probation before it is taken for one that crashes the device
MAX_PROBATION_STARTS = 3
#: accepted transitions of one update; a cycle that needs more is a loop, and loops end in a revert
MAX_STEPS = 40
#: assignment digests that a device remembers as bad
MAX_QUARANTINE = 64

_ENTER: dict[Phase, Command] = {
    Phase.ADMISSION: Command.CHECK_ADMISSION,
    Phase.DOWNLOADING: Command.FETCH,
    Phase.VERIFYING: Command.VERIFY,
    Phase.STAGED: Command.AWAIT_WINDOW,
    Phase.ACTIVATING: Command.ACTIVATE,
    Phase.PROBATION: Command.RUN_PROBATION,
    Phase.COMMITTED: Command.FINISH_COMMIT,
    Phase.REVERTING: Command.REVERT,
    Phase.SAFE_FALLBACK: Command.SERVE_FALLBACK,
}


def _outcome(
    state: DeviceState,
    status: Literal["reverted", "refused", "failed", "withdrawn", "fallback"],
    failure: Failure | None,
) -> Outcome:
    target = state.candidate
    if target is None:
        raise BugError(f"no candidate to report in phase {state.phase.value}")
    return Outcome(target.assignment_digest, target.rollout_id, target.generation, status, failure)


def _go(state: DeviceState, phase: Phase) -> Step:
    """Move forward to a phase, unless this update has used up its steps.

    Before activation nothing of the candidate has run, so a loop there is the environment's (power cuts).
    """
    if state.steps >= MAX_STEPS:
        cause: Cause = "environment" if state.phase in BEFORE_ACTIVATION else "content"
        return _fail(state, Failure(cause, "device.loop", f"update did not settle within {MAX_STEPS} steps"))
    return replace(state, phase=phase, steps=state.steps + 1), (_ENTER[phase],)


def _drop(
    state: DeviceState, status: Literal["refused", "failed", "withdrawn"], failure: Failure | None
) -> Step:
    """Forget a candidate that was never activated: what serves was not touched."""
    settled = replace(
        state,
        phase=state.resting,
        candidate=None,
        steps=0,
        probation_starts=0,
        quarantine=_quarantine_after(state, failure),
        outcome=_outcome(state, status, failure),
    )
    return settled, (Command.DISCARD_CANDIDATE, *_repair(settled), Command.REPORT)


def _repair(state: DeviceState) -> Commands:
    """What was proved is lost and can be had again: the repair that a candidate interrupted goes on."""
    lost = state.phase is Phase.SAFE_FALLBACK or (
        state.phase in BEFORE_ACTIVATION and state.resting is Phase.SAFE_FALLBACK
    )
    return (Command.REPAIR,) if lost and state.committed is not None else ()


def _revert(state: DeviceState, failure: Failure) -> Step:
    """Start to go back; reverting is never stopped by the step cap."""
    return replace(state, phase=Phase.REVERTING, failure=failure, steps=state.steps + 1), (Command.REVERT,)


def _fail(state: DeviceState, failure: Failure) -> Step:
    return _drop(state, "failed", failure) if state.phase in BEFORE_ACTIVATION else _revert(state, failure)


def _quarantine_after(state: DeviceState, failure: Failure | None) -> tuple[str, ...]:
    """Content failures quarantine the candidate; the list keeps the newest :data:`MAX_QUARANTINE`."""
    digest = state.candidate.assignment_digest if state.candidate is not None else ""
    if failure is None or failure.cause != "content" or not digest or digest in state.quarantine:
        return state.quarantine
    return (*state.quarantine, digest)[-MAX_QUARANTINE:]


# ---- one function for each event -------------------------------------------------------------------------


def _on_offered(state: DeviceState, event: Offered) -> Step:
    target = event.target
    if state.phase not in RESTING and state.phase not in BEFORE_ACTIVATION:
        return state, ()  # in trial or reverting: the server repeats the offer when we report that we rest
    if target.generation <= state.generation and not _is_first_offer(state, target):
        return state, ()  # late or repeated
    state = replace(state, generation=max(state.generation, target.generation))
    forget: Commands = ()
    if state.phase in BEFORE_ACTIVATION:
        if _names(target.assignment_digest, state.candidate):
            return replace(state, candidate=target), ()  # same thing under a newer generation: go on
        state = replace(state, phase=state.resting, candidate=None, steps=0, probation_starts=0)
        forget = (Command.DISCARD_CANDIDATE,)
    # In safe_fallback the committed release is the one that did not come up: it must prove itself again.
    if state.phase is not Phase.SAFE_FALLBACK and _names(target.assignment_digest, state.committed):
        done = Outcome(target.assignment_digest, target.rollout_id, target.generation, "committed")
        return replace(state, committed=target, outcome=done), (*forget, Command.REPORT)
    state = replace(
        state, resting=state.phase, candidate=target, steps=0, probation_starts=0, failure=None, outcome=None
    )
    if target.assignment_digest in state.quarantine:
        detail = "this exact assignment failed here before and is quarantined"
        return _drop(state, "refused", Failure("content", "device.quarantined", detail))
    if target.release_seq < state.highest_release_seq and not event.downgrade_granted:
        detail = (
            f"release_seq {target.release_seq} is below {state.highest_release_seq}, and no grant was given"
        )
        return _drop(state, "refused", Failure("environment", "trust.downgrade", detail))
    admitting, commands = _go(state, Phase.ADMISSION)
    return admitting, (*forget, *_repair(admitting), *commands)


def _names(assignment_digest: str, target: Target | None) -> bool:
    return target is not None and target.assignment_digest == assignment_digest


def _is_first_offer(state: DeviceState, target: Target) -> bool:
    """The first offer after enrolment may carry generation 0."""
    fresh = state.phase is Phase.IDLE and state.generation == 0 and state.outcome is None
    return fresh and target.generation == 0


def _on_admitted(state: DeviceState, _: Admitted) -> Step:
    return _go(state, Phase.DOWNLOADING)


def _on_refused(state: DeviceState, event: Refused) -> Step:
    return _drop(state, "refused", Failure("environment", "device.does_not_fit", "; ".join(event.reasons)))


def _on_fetched(state: DeviceState, _: Fetched) -> Step:
    return _go(state, Phase.VERIFYING)


def _on_verified(state: DeviceState, _: Verified) -> Step:
    return _go(state, Phase.STAGED)


def _on_window(state: DeviceState, _: WindowOpened) -> Step:
    moved, commands = _go(state, Phase.ACTIVATING)
    if moved.phase is Phase.ACTIVATING:
        # The candidate's manifest is about to take the other slot: what lay there cannot be gone back to.
        moved = replace(moved, previous=None)
    return moved, commands


def _on_activated(state: DeviceState, _: Activated) -> Step:
    return _go(replace(state, probation_starts=1), Phase.PROBATION)


def _on_proved(state: DeviceState, _: Proved) -> Step:
    target = state.candidate
    if target is None:
        raise BugError("probation without a candidate")
    committed = replace(
        state,
        phase=Phase.COMMITTED,
        previous=None if _names(target.assignment_digest, state.committed) else state.committed,
        committed=target,
        committed_slot=state.candidate_slot,
        candidate=None,
        steps=0,
        probation_starts=0,
        highest_release_seq=max(state.highest_release_seq, target.release_seq),
        failure=None,
        outcome=Outcome(target.assignment_digest, target.rollout_id, target.generation, "committed"),
    )
    return committed, (Command.FINISH_COMMIT, Command.REPORT)


def _on_failed(state: DeviceState, event: Failed) -> Step:
    if state.phase is not Phase.REVERTING:
        return _fail(state, event.failure)
    return _stay(state, event.failure) if state.leaving_proved else _fall_back(state, event.failure)


def _stay(state: DeviceState, failure: Failure) -> Step:
    """What an order wanted back does not come up: the proved release that it was to leave stays."""
    proved = state.candidate
    if proved is None:
        raise BugError("reverting without what is being left")
    why = Failure(
        "environment",
        "device.revert_failed",
        f"the previous release does not come up, this one stays: {failure.code}: {failure.detail}",
    )
    kept = replace(
        state,
        phase=Phase.COMMITTED,
        committed=proved,
        committed_slot=state.candidate_slot,
        previous=None,
        candidate=None,
        steps=0,
        probation_starts=0,
        failure=None,
        leaving_proved=False,
        outcome=Outcome(proved.assignment_digest, proved.rollout_id, proved.generation, "committed", why),
    )
    return kept, (Command.SERVE_COMMITTED, Command.FINISH_COMMIT, Command.REPORT)


def _fall_back(state: DeviceState, failure: Failure) -> Step:
    """The revert failed, too; a bad release stays bad, its cause is not hidden behind the second failure."""
    first = state.failure
    # What kept the committed release from coming up is never held against the candidate.
    cause: Cause = "content" if first is not None and first.cause == "content" else "environment"
    why = f"{first.code}: {first.detail}; " if first is not None else ""
    failure = Failure(cause, failure.code, f"{why}the revert failed: {failure.detail}")
    fallen = replace(
        state,
        phase=Phase.SAFE_FALLBACK,
        candidate=None,
        steps=0,
        probation_starts=0,
        quarantine=_quarantine_after(state, failure),
        failure=None,
        outcome=_outcome(state, "fallback", failure),
    )
    return fallen, (Command.SERVE_FALLBACK, *_repair(fallen), Command.REPORT)


def _on_restored(state: DeviceState, _: Restored) -> Step:
    failure = state.failure or Failure("operator", "device.revert_ordered", "")
    quarantine = _quarantine_after(state, failure)
    # With nothing committed yet, "back" is the empty device it was: idle, not reverted to anything.
    phase = Phase.REVERTED if state.committed is not None else Phase.IDLE
    settled = replace(
        state,
        phase=phase,
        candidate=None,
        steps=0,
        probation_starts=0,
        quarantine=quarantine,
        failure=None,
        leaving_proved=False,
        outcome=_outcome(state, "reverted", failure),
    )
    return settled, (Command.DISCARD_CANDIDATE, Command.REPORT)


def _on_withdrawn(state: DeviceState, event: Withdrawn) -> Step:
    if state.candidate is None or state.candidate.assignment_digest != event.assignment_digest:
        return state, ()
    if event.generation < state.candidate.generation:
        return state, ()  # late: it was offered again since
    state = replace(state, generation=max(state.generation, event.generation))
    failure = Failure("operator", "rollout.withdrawn", "the server stopped offering this release")
    if state.phase in BEFORE_ACTIVATION:
        return _drop(state, "withdrawn", failure)
    return _revert(state, failure)


def _on_revert_ordered(state: DeviceState, event: RevertOrdered) -> Step:
    if event.generation and event.generation <= state.generation:
        return state, ()
    state = replace(state, generation=max(state.generation, event.generation))
    failure = Failure("operator", "device.revert_ordered", "the previous release was asked for")
    named = event.assignment_digest
    if state.phase not in RESTING and (not named or _names(named, state.candidate)):
        if state.phase in IN_TRIAL:
            return _revert(state, failure)
        # Said at the device, it is the device that refuses; a server that takes its offer back knows that it did.
        return _drop(state, "withdrawn" if event.generation else "refused", failure)
    if state.phase in IN_TRIAL or (named and not _names(named, state.committed)):
        return state, (Command.REPORT,)  # what was named does not run here
    if state.previous is None or state.committed is None:
        return state, (Command.REPORT,)  # nothing to go back to: the report says what runs
    # The committed release becomes the one that is being left; the previous slot becomes the committed one.
    swapped = replace(
        state,
        candidate=state.committed,
        committed=state.previous,
        committed_slot=state.candidate_slot,
        previous=None,
        steps=0,
        leaving_proved=True,
    )
    return _revert(swapped, failure)


def _about_committed(
    state: DeviceState, status: Literal["committed", "fallback"], failure: Failure | None
) -> Outcome:
    """What is reported of the committed release; an outcome of another release is not hidden behind it."""
    target = state.committed
    if target is None:
        raise BugError("nothing was committed")
    if state.outcome is not None and state.outcome.assignment_digest != target.assignment_digest:
        return state.outcome
    return Outcome(target.assignment_digest, target.rollout_id, target.generation, status, failure)


def _on_unserved(state: DeviceState, event: Unserved) -> Step:
    if state.committed is None:
        return state, ()
    if state.phase in BEFORE_ACTIVATION:
        if state.resting is Phase.SAFE_FALLBACK:
            return state, ()
        lost = replace(state, resting=Phase.SAFE_FALLBACK)
        return lost, (Command.SERVE_FALLBACK, Command.REPAIR, _ENTER[state.phase])
    outcome = _about_committed(state, "fallback", replace(event.failure, cause="environment"))
    lost = replace(state, phase=Phase.SAFE_FALLBACK, outcome=outcome)
    return lost, (Command.SERVE_FALLBACK, Command.REPAIR, Command.REPORT)


def _on_repaired(state: DeviceState, _: Repaired) -> Step:
    if state.committed is None:
        return state, ()
    if state.phase is Phase.SAFE_FALLBACK:
        whole = replace(state, phase=Phase.COMMITTED, outcome=_about_committed(state, "committed", None))
        return whole, (Command.FINISH_COMMIT, Command.REPORT)
    if state.resting is not Phase.SAFE_FALLBACK:
        return state, ()
    again = state.candidate
    if again is None or not _names(again.assignment_digest, state.committed):
        return replace(state, resting=Phase.COMMITTED), ()
    # What was offered again meanwhile is what serves again: there is nothing left to try.
    done = Outcome(again.assignment_digest, again.rollout_id, again.generation, "committed")
    settled = replace(
        state,
        phase=Phase.COMMITTED,
        committed=again,
        candidate=None,
        steps=0,
        probation_starts=0,
        outcome=done,
    )
    return settled, (Command.FINISH_COMMIT, Command.REPORT)


def _on_booted(state: DeviceState, event: Booted) -> Step:
    serve: Commands = (Command.SERVE_COMMITTED,) if state.committed is not None else ()
    serve = _repair(state) or serve
    if state.phase in (Phase.IDLE, Phase.REVERTED):
        return state, serve
    if state.phase is Phase.COMMITTED:
        return state, (*serve, Command.FINISH_COMMIT)
    if state.phase is Phase.SAFE_FALLBACK:
        return state, serve or (Command.SERVE_FALLBACK,)
    if state.phase in IN_TRIAL and event.pointer != state.candidate_slot:
        resumed, commands = _go(state, Phase.STAGED)  # the pointer was not flipped: activate again
    elif state.phase in IN_TRIAL:
        starts = state.probation_starts + 1
        if starts > MAX_PROBATION_STARTS:
            detail = f"the device started {state.probation_starts} times without passing probation"
            resumed, commands = _revert(state, Failure("content", "device.crash_loop", detail))
        else:
            resumed, commands = _go(replace(state, probation_starts=starts), Phase.PROBATION)
    elif state.phase is Phase.REVERTING:
        return state, (Command.REVERT,)
    else:
        resumed, commands = _go(state, state.phase)
    return resumed, (*serve, *commands) if Command.REVERT not in commands else commands


_EVERY = frozenset(Phase)

#: event -> (phases in which it means something, what it does). Anywhere else an event is late and is ignored.
TABLE: dict[type[Event], tuple[frozenset[Phase], Callable[..., Step]]] = {
    Offered: (_EVERY, _on_offered),
    Admitted: (frozenset({Phase.ADMISSION}), _on_admitted),
    Refused: (frozenset({Phase.ADMISSION}), _on_refused),
    Fetched: (frozenset({Phase.DOWNLOADING}), _on_fetched),
    Verified: (frozenset({Phase.VERIFYING}), _on_verified),
    WindowOpened: (frozenset({Phase.STAGED}), _on_window),
    Activated: (frozenset({Phase.ACTIVATING}), _on_activated),
    Proved: (frozenset({Phase.PROBATION}), _on_proved),
    Failed: (BEFORE_ACTIVATION | IN_TRIAL | {Phase.REVERTING}, _on_failed),
    Restored: (frozenset({Phase.REVERTING}), _on_restored),
    Withdrawn: (BEFORE_ACTIVATION | IN_TRIAL, _on_withdrawn),
    RevertOrdered: (_EVERY - {Phase.REVERTING}, _on_revert_ordered),
    Unserved: (BEFORE_ACTIVATION | {Phase.COMMITTED, Phase.REVERTED}, _on_unserved),
    Repaired: (BEFORE_ACTIVATION | {Phase.SAFE_FALLBACK}, _on_repaired),
    Booted: (_EVERY, _on_booted),
}


def step(state: DeviceState, event: Event) -> Step:
    """Decide what an event means for a device.

    The machine needs no clock: windows and deadlines are the shell's events.

    Args:
        state: the journal's state.
        event: what happened.

    Returns:
        The state to persist first, and the commands to act on after that. An event that means nothing in this
        phase (late, repeated, out of order) returns the same state object and no command.
    """
    phases, act = TABLE[type(event)]
    if state.phase not in phases:
        return state, ()
    return act(state, event)
