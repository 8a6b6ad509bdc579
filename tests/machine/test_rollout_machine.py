"""The rollout machine, walked completely for every policy: the claims hold on every edge.

An edge is (reachable state, event, how long the phase has lasted) -> (state, commands); see docs/machine_walks.py.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta

import pytest
from machine_walks import BAKE_MAX_S, BAKE_MIN_S, BEGIN, WAVES, RolloutEdge

from slmops.core.errors import IllegalTransitionError
from slmops.core.evidence.gates import Verdict
from slmops.core.rollout import machine as m
from slmops.core.rollout.machine import Phase, Policy, RolloutState

Edges = list[tuple[Policy, RolloutEdge]]
SYSTEM = (m.Started, m.Judged, m.RevertsSettled, m.Superseded)


def test_every_phase_is_reached(rollout_edges: Edges) -> None:
    assert {edge.before.phase for _, edge in rollout_edges} == set(Phase)


def test_every_event_is_answered_in_every_phase(rollout_edges: Edges) -> None:
    """Each kind of event meets each phase, and the answer is the table's: act, ignore or refuse."""
    met = {(type(edge.event), edge.before.phase) for _, edge in rollout_edges}
    assert met == {(kind, phase) for kind in m.TABLE for phase in Phase}
    assert set(m.TABLE) == set(m.Event.__args__)  # type: ignore[attr-defined]
    for _, edge in rollout_edges:
        legal, ignored, _ = m.TABLE[type(edge.event)]
        assert not legal & ignored
        if edge.before.phase in ignored:
            assert edge.after is edge.before
            assert edge.commands == ()
            assert edge.error is None
        assert (edge.error is not None) == (edge.before.phase not in legal | ignored)


def test_a_refusal_changes_nothing_and_names_the_phase(rollout_edges: Edges) -> None:
    refused = [edge for _, edge in rollout_edges if edge.error is not None]
    assert refused
    for edge in refused:
        assert edge.after is edge.before
        assert edge.error is not None
        assert edge.error.fields["phase"] == edge.before.phase.value
        assert edge.error.hint


def test_events_of_the_system_are_never_refused(rollout_edges: Edges) -> None:
    """Only persons can ask for what is not possible: a late tick must not crash the worker."""
    for _, edge in rollout_edges:
        if isinstance(edge.event, SYSTEM):
            assert edge.error is None


def test_a_wave_opens_only_behind_a_passed_one(rollout_edges: Edges) -> None:
    """The first wave opens by the start; each other by a pass of the one before that held through its bake."""
    opened = set()
    for _, edge in rollout_edges:
        for command in edge.commands:
            if isinstance(command, m.OpenWave):
                opened.add(command.wave)
                assert edge.after.wave == command.wave == edge.before.wave + 1
                if command.wave == 0:
                    assert isinstance(edge.event, m.Started)
                else:
                    assert passed(edge)
                    assert edge.before.phase is Phase.BAKING
                    assert edge.waited >= timedelta(seconds=BAKE_MIN_S)
    assert opened == set(range(WAVES))


def passed(edge: RolloutEdge) -> bool:
    return isinstance(edge.event, m.Judged) and edge.event.verdict is Verdict.PASS and edge.event.complete


def test_only_a_pass_promotes(rollout_edges: Edges) -> None:
    """Open to baking, baking to the next wave, baking to completed: nothing but a complete pass."""
    promotions = set()
    for _, edge in rollout_edges:
        way = (edge.before.phase, edge.after.phase)
        completed = edge.after.phase in {Phase.COMPLETED, Phase.COMPLETED_PARTIAL} and way[0] is not way[1]
        if completed or way in {(Phase.OPEN, Phase.BAKING), (Phase.BAKING, Phase.OPEN)}:
            assert passed(edge)
            promotions.add(way)
    assert len(promotions) == 4


def test_the_end_is_partial_when_somebody_was_not_reached(rollout_edges: Edges) -> None:
    ends = set()
    for _, edge in rollout_edges:
        if edge.before.phase is Phase.BAKING and edge.after.phase in m.ENDED and passed(edge):
            assert isinstance(edge.event, m.Judged)
            assert edge.after.phase is (Phase.COMPLETED_PARTIAL if edge.event.unreached else Phase.COMPLETED)
            assert edge.before.wave == WAVES - 1
            ends.add(edge.after.phase)
    assert ends == {Phase.COMPLETED, Phase.COMPLETED_PARTIAL}


def test_a_failure_stops_every_exposed_phase(rollout_edges: Edges) -> None:
    """Also while paused: devices hold the release there, too."""
    stopped = set()
    for policy, edge in rollout_edges:
        if not (isinstance(edge.event, m.Judged) and edge.event.verdict is Verdict.FAIL):
            continue
        if edge.before.phase not in m.EXPOSED:
            continue
        stopped.add(edge.before.phase)
        assert edge.commands[0] == m.Withdraw()
        if policy.on_abort == "hold":
            assert edge.after.phase is Phase.ABORTED
            assert edge.commands[1:] == (m.Close(Phase.ABORTED),)
        else:
            scope = "all" if policy.on_abort == "revert_all" else "uncommitted"
            assert edge.after.phase is Phase.ROLLING_BACK
            assert edge.commands[1:] == (m.RevertDevices(scope),)  # type: ignore[arg-type]
    assert stopped == m.EXPOSED


def test_a_gate_that_cannot_see_stops_exposure(rollout_edges: Edges) -> None:
    for _, edge in rollout_edges:
        if (
            isinstance(edge.event, m.Judged)
            and edge.event.verdict is Verdict.ERROR
            and edge.before.phase in m.RUNNING
        ):
            assert edge.after.phase is Phase.PAUSED
            assert edge.after.resume_to is edge.before.phase


def test_inconclusive_waits_and_then_asks_a_person(rollout_edges: Edges) -> None:
    for _, edge in rollout_edges:
        if not (isinstance(edge.event, m.Judged) and edge.event.verdict is Verdict.INCONCLUSIVE):
            continue
        settled = edge.event.complete or edge.before.phase is Phase.BAKING
        if edge.before.phase in m.RUNNING and settled and edge.waited > timedelta(seconds=BAKE_MAX_S):
            assert edge.after.phase is Phase.PAUSED
        else:
            assert edge.after is edge.before
        assert edge.commands == ()


def test_an_ended_rollout_takes_one_order_only(rollout_edges: Edges) -> None:
    """After the end nothing happens but a rollback that a person asks for, where devices still hold the release."""
    for _, edge in rollout_edges:
        if edge.before.phase in m.ENDED and (edge.commands or edge.after != edge.before):
            assert isinstance(edge.event, m.RollbackOrdered)
            assert edge.before.phase in {Phase.COMPLETED, Phase.COMPLETED_PARTIAL, Phase.ABORTED}
            assert edge.after.phase is Phase.ROLLING_BACK


def test_the_close_is_said_exactly_once(rollout_edges: Edges) -> None:
    for _, edge in rollout_edges:
        closes = [command for command in edge.commands if isinstance(command, m.Close)]
        entered = edge.after.phase in m.ENDED and edge.before.phase not in m.ENDED
        assert closes == ([m.Close(edge.after.phase)] if entered else [])


def test_leaving_exposure_withdraws_the_offer(rollout_edges: Edges) -> None:
    """No way out of an exposed phase leaves devices with a standing offer, but the way to completion."""
    for _, edge in rollout_edges:
        left = edge.before.phase in m.EXPOSED and edge.after.phase not in m.EXPOSED | {Phase.SCHEDULED}
        if left and edge.after.phase not in {Phase.COMPLETED, Phase.COMPLETED_PARTIAL}:
            assert edge.commands[0] == m.Withdraw()


def test_the_wave_only_grows(rollout_edges: Edges) -> None:
    for _, edge in rollout_edges:
        assert edge.after.wave in (edge.before.wave, edge.before.wave + 1)


def test_a_resume_returns_to_where_it_paused(rollout_edges: Edges) -> None:
    for _, edge in rollout_edges:
        assert (edge.after.phase is Phase.PAUSED) == (edge.after.resume_to is not None)
        if isinstance(edge.event, m.ResumeOrdered) and edge.before.phase is Phase.PAUSED:
            assert edge.after.phase is edge.before.resume_to
            assert edge.commands == ()


def test_nothing_starts_without_its_approvals(rollout_edges: Edges) -> None:
    for policy, edge in rollout_edges:
        if edge.after.wave >= 0 or edge.after.phase is Phase.SCHEDULED:
            assert len(edge.after.approved_by) >= policy.approvals
        assert len(set(edge.after.approved_by)) == len(edge.after.approved_by)


def test_every_reachable_state_can_end(rollout_edges: Edges) -> None:
    """There is no state from which a rollout cannot be finished."""
    by_policy: dict[Policy, list[RolloutEdge]] = defaultdict(list)
    for policy, edge in rollout_edges:
        by_policy[policy].append(edge)
    for edges in by_policy.values():
        can_end = {edge.before for edge in edges if edge.before.phase in m.ENDED}
        while True:
            more = {e.before for e in edges if plain(e.after) in can_end} - can_end
            if not more:
                break
            can_end |= more
        assert {edge.before for edge in edges} == can_end


def plain(state: RolloutState) -> RolloutState:
    return RolloutState(state.phase, state.wave, BEGIN, state.approved_by, "", state.resume_to)


# ---- a story with real times ---------------------------------------------------------------------------------

POLICY = Policy(waves=2, approvals=2, bake_min_s=600, bake_max_s=86_400)
PASS = m.Judged(Verdict.PASS, True, "all well")


def test_the_happy_path() -> None:
    """Two approvals, two waves, each baked: the commands come in this order and at these times."""
    state, log, now = m.begin(POLICY, BEGIN), [], BEGIN
    script: list[tuple[int, m.Event]] = [
        (0, m.Approved("ann")),
        (0, m.Approved("ann")),
        (0, m.Approved("bob")),
        (0, m.Started()),
        (60, m.Judged(Verdict.PASS, False, "one device is still at it")),
        (60, PASS),
        (599, PASS),
        (1, PASS),
        (60, PASS),
        (600, PASS),
    ]
    for wait_s, event in script:
        now += timedelta(seconds=wait_s)
        state, commands = m.step(state, event, POLICY, now)
        log.append((state.phase.value, state.wave, *commands))
    assert log == [
        ("awaiting_approval", -1),
        ("awaiting_approval", -1),
        ("scheduled", -1),
        ("open", 0, m.OpenWave(0)),
        ("open", 0),
        ("baking", 0),
        ("baking", 0),
        ("open", 1, m.OpenWave(1)),
        ("baking", 1),
        ("completed", 1, m.Close(Phase.COMPLETED)),
    ]
    assert state.reason == "all well"


def test_a_bad_canary_aborts_with_the_reason() -> None:
    state, _ = m.step(m.begin(Policy(3), BEGIN), m.Started(), Policy(3), BEGIN)
    bad = m.Judged(Verdict.FAIL, False, "canary-1 reverted: golden pack lost 5 of 8")
    state, commands = m.step(state, bad, Policy(3), BEGIN)
    assert (state.phase, state.reason) == (Phase.ROLLING_BACK, bad.reason)
    assert commands == (m.Withdraw(), m.RevertDevices("all"))
    state, commands = m.step(state, m.RevertsSettled(True), Policy(3), BEGIN)
    assert (state.phase, state.reason, commands) == (
        Phase.ROLLED_BACK,
        bad.reason,
        (m.Close(Phase.ROLLED_BACK),),
    )


@pytest.mark.parametrize(
    "order", [m.ResumeOrdered(), m.PauseOrdered("now"), m.Approved("ann"), m.AbortOrdered("x")]
)
def test_orders_that_come_too_late_say_where_the_rollout_stands(order: m.Event) -> None:
    done = RolloutState(Phase.COMPLETED, 1, BEGIN)
    with pytest.raises(IllegalTransitionError, match="a rollout that is completed cannot take"):
        m.step(done, order, POLICY, BEGIN)


def test_resuming_restarts_the_bake() -> None:
    """Time that passed while paused does not count as observation."""
    baking = RolloutState(Phase.BAKING, 0, BEGIN)
    later = BEGIN + timedelta(days=2)
    paused, _ = m.step(baking, m.PauseOrdered("holiday"), POLICY, BEGIN)
    resumed, _ = m.step(paused, m.ResumeOrdered(), POLICY, later)
    assert (resumed.phase, resumed.since) == (Phase.BAKING, later)
    assert m.step(resumed, PASS, POLICY, later) == (resumed, ())
