"""The device machine, walked completely: the claims below hold on every edge, not on examples.

An edge is (reachable state, event) -> (state, commands); see docs/machine_walks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from machine_walks import CONTENT, ENVIRONMENT, HONEST, DeviceEdge, canonical, lowered_limits, target

from slmops.core.device import machine as m
from slmops.core.device.machine import Command, DeviceState, Event, Phase

Edges = list[DeviceEdge]


def changed(edges: Edges) -> Iterator[DeviceEdge]:
    return (edge for edge in edges if edge.after != edge.before)


def test_every_phase_is_reached(device_edges: Edges) -> None:
    """The walk sees all phases, and a few thousand states: it is not vacuous."""
    states = {edge.before for edge in device_edges}
    assert {state.phase for state in states} == set(Phase)
    assert len(states) > 3000


def test_every_event_is_answered_in_every_phase(device_edges: Edges) -> None:
    """The table is total: each kind of event meets each phase, and none raises."""
    met = {(type(edge.event), edge.before.phase) for edge in device_edges}
    assert met == {(kind, phase) for kind in m.TABLE for phase in Phase}
    assert set(m.TABLE) == set(m.Event.__args__)  # type: ignore[attr-defined]


def test_events_outside_their_phases_change_nothing(device_edges: Edges) -> None:
    """A late or repeated event returns the same state object and no command."""
    for edge in device_edges:
        if edge.before.phase not in m.TABLE[type(edge.event)][0]:
            assert edge.after is edge.before
            assert edge.commands == ()


def test_the_table_lists_no_phase_in_which_an_event_does_nothing(device_edges: Edges) -> None:
    """Every cell of the table is used: in some state of that phase the event does something."""
    used = {
        (type(edge.event), edge.before.phase)
        for edge in device_edges
        if edge.after != edge.before or edge.commands
    }
    listed = {(kind, phase) for kind, (phases, _) in m.TABLE.items() for phase in phases}
    # Offers in trial and while reverting are answered by waiting: the server repeats them.
    silent = {(m.Offered, phase) for phase in m.IN_TRIAL | {Phase.REVERTING}}
    silent |= {(m.Booted, Phase.IDLE)}  # nothing was ever committed, so there is nothing to serve
    assert used == listed - silent


def test_generation_never_falls(device_edges: Edges) -> None:
    for edge in device_edges:
        assert edge.after.generation >= edge.before.generation


def test_highest_release_seq_never_falls(device_edges: Edges) -> None:
    for edge in device_edges:
        assert edge.after.highest_release_seq >= edge.before.highest_release_seq


def test_committed_is_lost_only_to_what_was_proved(device_edges: Edges) -> None:
    """``committed`` changes when the candidate proves itself, or back to ``previous`` by an order. Never to nothing."""
    for edge in device_edges:
        before, after = edge.before, edge.after
        if isinstance(edge.event, m.Proved) and before.phase is Phase.PROBATION:
            assert (after.committed, after.committed_slot) == (before.candidate, before.candidate_slot)
            repeated = digest(before.candidate) == digest(before.committed)
            assert after.previous == (None if repeated else before.committed)
        elif digest(after.committed) == digest(before.committed) and not stays(edge):
            assert after.committed_slot == before.committed_slot
        elif stays(edge):
            # What an order wanted back did not come up: the proved one that it left keeps its slot.
            assert (after.committed, after.committed_slot) == (before.candidate, before.candidate_slot)
            assert after.phase is Phase.COMMITTED
        else:
            assert isinstance(edge.event, m.RevertOrdered)
            assert after.committed == before.previous is not None
            assert after.committed_slot == before.candidate_slot
            assert after.phase is Phase.REVERTING


def stays(edge: DeviceEdge) -> bool:
    """An ordered revert that failed."""
    return (
        isinstance(edge.event, m.Failed)
        and edge.before.phase is Phase.REVERTING
        and edge.before.leaving_proved
    )


def test_only_an_order_leaves_what_was_proved(device_edges: Edges) -> None:
    """The mark is there exactly while an order takes the device from one proved release to another."""
    for edge in device_edges:
        if edge.after.leaving_proved:
            assert edge.after.phase is Phase.REVERTING
            assert edge.after.committed is not None
            assert edge.before.leaving_proved or isinstance(edge.event, m.RevertOrdered)
        if edge.before.phase is Phase.REVERTING and isinstance(edge.event, m.Failed):
            assert (edge.after.phase is Phase.SAFE_FALLBACK) != edge.before.leaving_proved


def test_candidate_never_goes_to_the_slot_that_serves(device_edges: Edges) -> None:
    for edge in device_edges:
        assert edge.after.candidate_slot != edge.after.committed_slot


def test_previous_is_only_claimed_while_its_slot_is_untouched(device_edges: Edges) -> None:
    """Activation writes the candidate over the other slot, so there is nothing to go back to behind ``committed``."""
    for edge in device_edges:
        if edge.after.phase in m.IN_TRIAL | {Phase.REVERTING}:
            assert edge.after.previous is None
        if edge.before.phase is Phase.REVERTING and edge.after.phase is not Phase.REVERTING:
            assert edge.after.previous is None
        if edge.after.previous is not None and not isinstance(edge.event, m.Proved):
            assert edge.after.previous == edge.before.previous


def test_a_phase_says_whether_there_is_a_candidate(device_edges: Edges) -> None:
    for edge in device_edges:
        assert (edge.after.candidate is None) == (edge.after.phase in m.RESTING)


def test_rest_says_what_serves(device_edges: Edges) -> None:
    """Idle devices have nothing committed; committed and reverted ones do."""
    for edge in device_edges:
        if edge.after.phase in (Phase.COMMITTED, Phase.REVERTED):
            assert edge.after.committed is not None
        if edge.after.phase is Phase.IDLE:
            assert edge.after.committed is None


def test_quarantined_content_is_never_admitted(device_edges: Edges) -> None:
    for edge in changed(device_edges):
        if edge.after.phase is Phase.ADMISSION:
            assert edge.after.candidate is not None
            assert edge.after.candidate.assignment_digest not in edge.after.quarantine


def test_content_failures_are_quarantined_and_nothing_else_is(device_edges: Edges) -> None:
    for edge in changed(device_edges):
        new = set(edge.after.quarantine) - set(edge.before.quarantine)
        assert set(edge.before.quarantine) <= set(edge.after.quarantine)
        ended = edge.after.outcome
        if new:
            assert edge.before.candidate is not None
            assert new == {edge.before.candidate.assignment_digest}
            assert ended is not None and ended.failure is not None and ended.failure.cause == "content"
        elif ended is not None and ended is not edge.before.outcome and ended.failure is not None:
            bad = ended.failure.cause == "content"
            assert not bad or ended.assignment_digest in edge.after.quarantine


def test_downgrades_need_a_grant(device_edges: Edges) -> None:
    for edge in changed(device_edges):
        if isinstance(edge.event, m.Offered) and edge.after.phase is Phase.ADMISSION:
            offered = edge.event.target.release_seq
            if edge.before.candidate is None or edge.after.candidate != edge.before.candidate:
                assert (
                    edge.event.downgrade_granted or offered >= edge.before.highest_release_seq or same(edge)
                )


def same(edge: DeviceEdge) -> bool:
    """The offer repeats the candidate that was admitted already."""
    return digest(edge.before.candidate) == digest(edge.after.candidate)


def test_what_serves_is_not_touched_before_activation(device_edges: Edges) -> None:
    """Until the window opens no command starts, stops or switches an engine, whatever comes."""
    quiet = {
        Command.CHECK_ADMISSION,
        Command.FETCH,
        Command.VERIFY,
        Command.AWAIT_WINDOW,
        Command.DISCARD_CANDIDATE,
        Command.REPORT,
    }
    mending = {Command.SERVE_FALLBACK, Command.REPAIR, Command.FINISH_COMMIT}
    for edge in device_edges:
        if edge.before.phase not in m.BEFORE_ACTIVATION or isinstance(edge.event, m.Booted):
            continue
        if isinstance(edge.event, m.WindowOpened) and edge.after.phase is Phase.ACTIVATING:
            continue
        if isinstance(edge.event, m.RevertOrdered) and edge.after.phase is Phase.REVERTING:
            continue  # an order to leave what was committed, not a consequence of the candidate
        if Phase.SAFE_FALLBACK in (edge.before.resting, edge.after.resting):
            assert set(edge.commands) <= quiet | mending  # what was proved is lost: nothing of it serves
        else:
            assert set(edge.commands) <= quiet
        assert digest(edge.after.committed) == digest(edge.before.committed)


def test_a_candidate_withdrawn_before_activation_is_simply_forgotten(device_edges: Edges) -> None:
    for edge in changed(device_edges):
        if isinstance(edge.event, m.Withdrawn) and edge.before.phase in m.BEFORE_ACTIVATION:
            assert edge.after.phase is edge.before.resting
            assert edge.after.committed == edge.before.committed
            assert edge.after.previous == edge.before.previous
            assert edge.after.quarantine == edge.before.quarantine
            lost = edge.before.resting is Phase.SAFE_FALLBACK and edge.before.committed is not None
            repair = (Command.REPAIR,) if lost else ()
            assert edge.commands == (Command.DISCARD_CANDIDATE, *repair, Command.REPORT)


def test_what_was_proved_and_lost_is_repaired_until_something_else_serves(device_edges: Edges) -> None:
    """Entering safe_fallback with something committed orders its repair, and so does every start in it."""
    for edge in device_edges:
        after = edge.after
        if after.phase is not Phase.SAFE_FALLBACK or after.committed is None:
            continue
        if edge.before.phase is not Phase.SAFE_FALLBACK or isinstance(edge.event, m.Booted):
            assert Command.REPAIR in edge.commands


def test_committed_is_reported_only_of_what_runs(device_edges: Edges) -> None:
    """From safe_fallback the words "committed" need a proof or a repair, never an offer alone."""
    for edge in changed(device_edges):
        ended = edge.after.outcome
        if (
            edge.before.phase is Phase.SAFE_FALLBACK
            and ended is not None
            and ended is not edge.before.outcome
        ):
            assert ended.status != "committed" or isinstance(edge.event, m.Repaired)


def test_a_lost_release_is_the_environments_fault(device_edges: Edges) -> None:
    """Damage on the device quarantines nothing and touches neither slots nor the candidate."""
    seen = set()
    for edge in device_edges:
        if not isinstance(edge.event, m.Unserved):
            continue
        before, after = edge.before, edge.after
        assert (after.committed, after.committed_slot, after.previous, after.candidate, after.quarantine) == (
            before.committed, before.committed_slot, before.previous, before.candidate, before.quarantine,
        )  # fmt: skip
        if after != before:
            seen.add(before.phase)
            assert Command.REPAIR in edge.commands
    assert seen == m.BEFORE_ACTIVATION | {Phase.COMMITTED, Phase.REVERTED}


def test_a_withdrawal_older_than_the_offer_is_ignored(device_edges: Edges) -> None:
    for edge in device_edges:
        candidate = edge.before.candidate
        if isinstance(edge.event, m.Withdrawn) and candidate and edge.event.generation < candidate.generation:
            assert edge.after is edge.before


def test_a_revert_order_for_the_candidate_stops_it_in_every_phase(device_edges: Edges) -> None:
    """The server cannot know how far the device is: its order must hold before and after activation."""
    seen = set()
    for edge in device_edges:
        before = edge.before
        if not isinstance(edge.event, m.RevertOrdered) or edge.event.generation <= before.generation:
            continue
        if before.candidate is None or edge.event.assignment_digest != before.candidate.assignment_digest:
            continue
        if before.phase in m.BEFORE_ACTIVATION:
            assert edge.after.phase is before.resting
        elif before.phase in m.IN_TRIAL:
            assert edge.after.phase is Phase.REVERTING
        else:
            continue
        seen.add(before.phase)
    assert seen == m.BEFORE_ACTIVATION | m.IN_TRIAL


def test_every_end_is_reported(device_edges: Edges) -> None:
    """Coming to rest by anything but a start leaves an outcome and says so."""
    for edge in changed(device_edges):
        if edge.after.phase in m.RESTING and edge.before.phase not in m.RESTING:
            assert edge.after.outcome is not None
            assert Command.REPORT in edge.commands
            assert (edge.after.steps, edge.after.probation_starts) == (0, 0)
            assert edge.after.failure is None


def test_only_probation_leads_to_committed(device_edges: Edges) -> None:
    for edge in device_edges:
        entered = edge.after.phase is Phase.COMMITTED and edge.before.phase not in m.RESTING
        if entered and edge.before.resting is not Phase.COMMITTED:
            if isinstance(edge.event, m.Repaired):  # what was offered again is what was mended
                assert digest(edge.before.candidate) == digest(edge.before.committed)
                assert edge.before.resting is Phase.SAFE_FALLBACK
            elif not stays(edge):
                assert isinstance(edge.event, m.Proved)
                assert edge.before.phase is Phase.PROBATION


def test_commands_belong_to_the_phase_that_is_entered(device_edges: Edges) -> None:
    """A command is only given in the phase whose work it is, so the journal always names the work."""
    home = {
        Command.CHECK_ADMISSION: Phase.ADMISSION,
        Command.FETCH: Phase.DOWNLOADING,
        Command.VERIFY: Phase.VERIFYING,
        Command.AWAIT_WINDOW: Phase.STAGED,
        Command.ACTIVATE: Phase.ACTIVATING,
        Command.RUN_PROBATION: Phase.PROBATION,
        Command.FINISH_COMMIT: Phase.COMMITTED,
        Command.REVERT: Phase.REVERTING,
    }
    for edge in device_edges:
        after = edge.after
        for command in edge.commands:
            assert home.get(command, after.phase) is after.phase
            if command in (Command.REPAIR, Command.SERVE_FALLBACK):
                lost = after.phase in m.BEFORE_ACTIVATION and after.resting is Phase.SAFE_FALLBACK
                assert lost or after.phase is Phase.SAFE_FALLBACK
            if command is Command.REPAIR:
                assert after.committed is not None


def test_every_working_phase_gets_its_command_after_a_start(device_edges: Edges) -> None:
    """After a power cut nothing waits for an event that nobody will send: the work is ordered again."""
    for edge in device_edges:
        if isinstance(edge.event, m.Booted) and edge.after.phase not in m.RESTING:
            assert m._ENTER[edge.after.phase] in edge.commands


def test_a_start_serves_what_was_committed(device_edges: Edges) -> None:
    """Whatever the phase, a device with a committed release serves it again first (a revert does that itself)."""
    for edge in device_edges:
        if isinstance(edge.event, m.Booted) and edge.after.committed is not None:
            first = edge.commands[0]
            lost = Phase.SAFE_FALLBACK in (edge.before.phase, edge.before.resting)
            allowed = {Command.SERVE_COMMITTED, Command.REPAIR} if lost else {Command.SERVE_COMMITTED}
            assert first in ({Command.REVERT} if edge.after.phase is Phase.REVERTING else allowed)


def test_an_honest_shell_always_comes_to_rest(device_edges: Edges) -> None:
    """From every reachable state, whatever succeeds, fails or loses power, the update ends.

    The graph of honest answers and starts has no cycle outside of the resting phases, but for a start while
    reverting, which repeats the same order.
    """
    states = {edge.before for edge in device_edges}
    height: dict[DeviceState, int] = {}
    with lowered_limits():
        for state in states:
            measure(state, height)
    assert max(height.values()) <= 2 * m.MAX_STEPS


def measure(start: DeviceState, height: dict[DeviceState, int]) -> None:
    """Longest honest way from a state to rest, by depth-first search; fails on a cycle."""
    path: set[DeviceState] = set()
    stack: list[tuple[DeviceState, list[DeviceState] | None]] = [(start, None)]
    while stack:
        state, following = stack.pop()
        if following is not None:
            path.discard(state)
            height[state] = 1 + max((height[after] for after in following), default=-1)
            continue
        if state in height:
            continue
        assert state not in path, f"an honest shell may go round for ever: {state}"
        path.add(state)
        following = list(honest_successors(state))
        stack.append((state, following))
        stack.extend((after, None) for after in following)


def honest_successors(state: DeviceState) -> Iterator[DeviceState]:
    if state.phase in m.RESTING:
        return
    slots = (
        (state.committed_slot, state.candidate_slot) if state.phase in m.IN_TRIAL else (state.committed_slot,)
    )
    for event in (*HONEST[state.phase], *(m.Booted(slot) for slot in slots)):
        after = canonical(m.step(state, event)[0])
        assert after != state or isinstance(event, m.Booted), (state, event)
        if after != state:
            yield after


def test_honest_answers_are_never_ignored(device_edges: Edges) -> None:
    """An answer to the phase's own work always moves the machine."""
    for edge in device_edges:
        if edge.event in HONEST.get(edge.before.phase, ()):
            assert edge.after != edge.before


# ---- with the real limits ------------------------------------------------------------------------------------


def drive(state: DeviceState, *events: Event) -> DeviceState:
    for event in events:
        state, _ = m.step(state, event)
    return state


def digest(kept: m.Target | None) -> str | None:
    return None if kept is None else kept.assignment_digest


UPDATE: tuple[Event, ...] = (
    m.Admitted(),
    m.Fetched(),
    m.Verified(),
    m.WindowOpened(),
    m.Activated(),
    m.Proved(),
)


def committed(*digests: str) -> DeviceState:
    state = DeviceState()
    for number, name in enumerate(digests, 1):
        state = drive(state, m.Offered(target(name, number, number)), *UPDATE)
    return state


def test_the_happy_path() -> None:
    """Two updates in a row: the second keeps the first as previous, in the other slot."""
    state = committed("a", "b")
    assert state.phase is Phase.COMMITTED
    assert (digest(state.committed), digest(state.previous)) == ("b", "a")
    assert (state.committed_slot, state.candidate_slot) == ("b", "a")
    assert state.highest_release_seq == 2
    assert state.outcome == m.Outcome("b", "rollout", 2, "committed")


def test_a_bad_release_is_tried_once() -> None:
    """Its digest is quarantined; the same digest under a newer generation is refused with the reason."""
    bad = m.Offered(target("bad", 2, 2))
    state = drive(committed("a"), bad, *UPDATE[:-1], m.Failed(CONTENT), m.Restored())
    assert state.phase is Phase.REVERTED
    assert digest(state.committed) == "a"
    again, commands = m.step(state, m.Offered(target("bad", 2, 3)))
    assert again.phase is Phase.REVERTED
    assert again.outcome is not None and again.outcome.failure is not None
    assert (again.outcome.status, again.outcome.failure.code) == ("refused", "device.quarantined")
    assert commands == (Command.DISCARD_CANDIDATE, Command.REPORT)


def test_a_full_disk_may_be_tried_again() -> None:
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), m.Admitted(), m.Failed(ENVIRONMENT))
    assert state.quarantine == ()
    assert drive(state, m.Offered(target("b", 2, 3))).phase is Phase.ADMISSION


def test_a_bad_release_stays_bad_when_the_revert_fails_too() -> None:
    """The report keeps the cause that stops the rollout, and the digest is quarantined all the same."""
    state = drive(
        committed("a"), m.Offered(target("b", 2, 2)), *UPDATE[:-1], m.Failed(CONTENT), m.Failed(ENVIRONMENT)
    )
    assert state.phase is Phase.SAFE_FALLBACK
    assert state.quarantine == ("b",)
    assert state.outcome is not None and state.outcome.failure is not None
    assert (state.outcome.status, state.outcome.failure.cause) == ("fallback", "content")
    assert state.outcome.failure.code == ENVIRONMENT.code


def test_safe_fallback_proves_its_committed_release_again() -> None:
    """The release that did not come up is not reported as committed just because the journal names it."""
    fallen = drive(
        committed("a"), m.Offered(target("b", 2, 2)), *UPDATE[:-1], m.Failed(CONTENT), m.Failed(ENVIRONMENT)
    )
    offered, commands = m.step(fallen, m.Offered(target("a", 2, 3)))
    assert offered.phase is Phase.ADMISSION
    assert commands == (Command.REPAIR, Command.CHECK_ADMISSION)
    assert drive(offered, *UPDATE).phase is Phase.COMMITTED


LOST = m.Failure("environment", "trust.digest", "the disk damaged it")


def test_a_damaged_release_is_repaired_and_reported_both_times() -> None:
    """Lost, then whole again: no new rollout is needed, and the previous release stays within reach."""
    lost, commands = m.step(committed("a", "b"), m.Unserved(LOST))
    assert (lost.phase, digest(lost.previous)) == (Phase.SAFE_FALLBACK, "a")
    assert commands == (Command.SERVE_FALLBACK, Command.REPAIR, Command.REPORT)
    assert lost.outcome == m.Outcome("b", "rollout", 2, "fallback", LOST)
    whole, commands = m.step(lost, m.Repaired())
    assert (whole.phase, digest(whole.committed), digest(whole.previous)) == (Phase.COMMITTED, "b", "a")
    assert commands == (Command.FINISH_COMMIT, Command.REPORT)
    assert whole.outcome == m.Outcome("b", "rollout", 2, "committed")


def test_the_same_release_again_is_committed_only_when_it_is_repaired() -> None:
    lost = drive(committed("a"), m.Unserved(LOST))
    offered = drive(lost, m.Offered(replace(target("a", 1, 2), rollout_id="second")))
    assert (offered.phase, offered.outcome) == (Phase.ADMISSION, None)
    whole, commands = m.step(offered, m.Repaired())
    assert (whole.phase, whole.candidate) == (Phase.COMMITTED, None)
    assert whole.outcome == m.Outcome("a", "second", 2, "committed")
    assert Command.FINISH_COMMIT in commands


def test_a_candidate_that_is_dropped_gives_the_repair_its_turn() -> None:
    state = drive(committed("a"), m.Unserved(LOST), m.Offered(target("b", 2, 2)))
    dropped, commands = m.step(state, m.Refused(("too big",)))
    assert dropped.phase is Phase.SAFE_FALLBACK
    assert commands == (Command.DISCARD_CANDIDATE, Command.REPAIR, Command.REPORT)


def test_a_repair_does_not_hide_how_the_last_candidate_ended() -> None:
    """The bad release's failure may not have been reported yet when the committed one comes up after all."""
    fallen = drive(
        committed("a"), m.Offered(target("b", 2, 2)), *UPDATE[:-1], m.Failed(CONTENT), m.Failed(ENVIRONMENT)
    )
    whole = drive(fallen, m.Repaired())
    assert whole.phase is Phase.COMMITTED
    assert whole.outcome == fallen.outcome is not None


def test_a_revert_to_a_damaged_slot_leaves_the_proved_release_serving() -> None:
    """Nobody goes to safe_fallback by asking for the release before."""
    state, commands = m.step(drive(committed("a", "b"), m.RevertOrdered()), m.Failed(LOST))
    assert (state.phase, digest(state.committed), state.committed_slot) == (Phase.COMMITTED, "b", "b")
    assert (state.previous, state.quarantine) == (None, ())
    assert commands == (Command.SERVE_COMMITTED, Command.FINISH_COMMIT, Command.REPORT)
    assert state.outcome is not None and state.outcome.failure is not None
    assert (state.outcome.assignment_digest, state.outcome.status) == ("b", "committed")
    assert (state.outcome.failure.cause, state.outcome.failure.code) == (
        "environment",
        "device.revert_failed",
    )


@pytest.mark.parametrize(("generation", "status"), [(0, "refused"), (3, "withdrawn")])
def test_an_order_at_the_device_refuses_what_is_under_way(generation: int, status: str) -> None:
    """A refusal settles the device in its rollout; a server that takes its own offer back needs no refusal."""
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), m.Admitted(), m.RevertOrdered("", generation))
    assert (state.phase, digest(state.committed)) == (Phase.COMMITTED, "a")
    assert state.outcome is not None and state.outcome.failure is not None
    assert (state.outcome.assignment_digest, state.outcome.status) == ("b", status)
    assert (state.outcome.failure.cause, state.outcome.failure.code) == ("operator", "device.revert_ordered")


def test_a_crash_loop_in_probation_reverts() -> None:
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), *UPDATE[:-1])
    starts = 0
    while state.phase is Phase.PROBATION:
        state, commands = m.step(state, m.Booted(state.candidate_slot))
        starts += 1
    assert starts == m.MAX_PROBATION_STARTS
    assert state.phase is Phase.REVERTING
    assert state.failure is not None and state.failure.code == "device.crash_loop"
    assert commands == (Command.REVERT,)


def test_a_device_that_is_switched_off_every_night_does_not_condemn_the_release() -> None:
    """Too many starts before activation are the environment's: the same release may come again."""
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), m.Admitted())
    for _ in range(m.MAX_STEPS + 1):
        state, _ = m.step(state, m.Booted(state.committed_slot))
    assert state.phase is Phase.COMMITTED
    assert state.quarantine == ()
    assert state.outcome is not None and state.outcome.failure is not None
    assert (state.outcome.failure.code, state.outcome.failure.cause) == ("device.loop", "environment")


@pytest.mark.parametrize(("pointer", "phase"), [("a", Phase.STAGED), ("b", Phase.PROBATION)])
def test_after_a_power_cut_in_activation_the_pointer_decides(pointer: m.SlotName, phase: Phase) -> None:
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), *UPDATE[:4])
    assert (state.phase, state.committed_slot) == (Phase.ACTIVATING, "a")
    assert drive(state, m.Booted(pointer)).phase is phase


def test_an_offline_revert_goes_back_once() -> None:
    """The previous slot becomes the committed one; there is nothing behind it."""
    state = drive(committed("a", "b"), m.RevertOrdered())
    assert (digest(state.committed), state.committed_slot, digest(state.candidate)) == ("a", "a", "b")
    state = drive(state, m.Restored())
    assert (state.phase, state.quarantine) == (Phase.REVERTED, ())
    assert state.outcome is not None and state.outcome.status == "reverted"
    again, commands = m.step(state, m.RevertOrdered())
    assert (again, commands) == (state, (Command.REPORT,))


def test_a_rollback_order_for_the_committed_release_wins_over_a_download() -> None:
    state = drive(committed("a", "b"), m.Offered(target("c", 3, 3)), m.Admitted())
    state, commands = m.step(state, m.RevertOrdered("b", 4))
    assert commands == (Command.REVERT,)
    assert (digest(state.committed), digest(state.candidate)) == ("a", "b")


def test_a_newer_offer_replaces_the_one_under_way() -> None:
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), m.Admitted())
    state, commands = m.step(state, m.Offered(target("c", 3, 3)))
    assert (state.phase, digest(state.candidate), state.steps) == (Phase.ADMISSION, "c", 1)
    assert commands == (Command.DISCARD_CANDIDATE, Command.CHECK_ADMISSION)


def test_an_offer_of_what_runs_is_done_at_once() -> None:
    """A second rollout of the same assignment is answered without moving a byte, and gives up what was under way."""
    state = drive(committed("a"), m.Offered(target("b", 2, 2)), m.Admitted())
    state, commands = m.step(state, m.Offered(replace(target("a", 1, 3), rollout_id="second")))
    assert (state.phase, state.candidate) == (Phase.COMMITTED, None)
    assert state.outcome == m.Outcome("a", "second", 3, "committed")
    assert commands == (Command.DISCARD_CANDIDATE, Command.REPORT)


def test_the_first_offer_may_carry_generation_zero() -> None:
    """Once; when it was refused it takes a newer generation to be asked again."""
    offer = m.Offered(target("a", 1, 0))
    state = drive(DeviceState(), offer)
    assert state.phase is Phase.ADMISSION
    refused = drive(state, m.Refused(("memory",)))
    assert m.step(refused, offer) == (refused, ())


def test_the_quarantine_keeps_the_newest() -> None:
    state = committed("a")
    for number in range(m.MAX_QUARANTINE + 3):
        offer = m.Offered(target(f"bad-{number}", 2, 10 + number))
        state = drive(state, offer, m.Admitted(), m.Fetched(), m.Failed(CONTENT))
    assert len(state.quarantine) == m.MAX_QUARANTINE
    assert state.quarantine[-1] == f"bad-{m.MAX_QUARANTINE + 2}"


def test_a_state_without_its_candidate_is_a_bug_not_a_guess() -> None:
    with pytest.raises(m.BugError):
        m.step(DeviceState(phase=Phase.PROBATION), m.Proved())
    with pytest.raises(m.BugError):
        m.step(DeviceState(phase=Phase.ADMISSION), m.Refused(()))
