"""One contract for the store, on a SQLite file and on a database in memory.

There is no hand-written fake: the database in memory runs the same SQL and is as quick, and a fake would repeat every
query in Python and could only be wrong in its own ways.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from slmops.core.errors import BugError, ConflictError
from slmops.core.rollout.judge import DeviceStatus
from slmops.core.rollout.machine import Phase, RolloutState
from slmops.protocol.messages import SCHEMA, Assignment, Facts, GoldenReport, OutcomeReport
from slmops.server.adapters.database import SqlStore
from slmops.server.ports.rows import (
    BlueprintRow,
    ChannelRow,
    CheckinWrite,
    DeviceRow,
    EnrolmentTokenRow,
    JudgementRow,
    MemberRow,
    OperatorTokenRow,
    ReleaseRow,
    RolloutRow,
    SessionRow,
)

NOW = datetime(2026, 11, 8, 10, 0, 0, 123456, tzinfo=timezone.utc)
FACTS = Facts("aarch64", 4, 2 << 30, 4 << 30, {"llama.cpp": "11549"}, "0.1.0", limits={"ram": "rlimit"})
A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    """An empty store."""
    made = SqlStore.in_folder(tmp_path) if request.param == "file" else SqlStore("sqlite://")
    yield made
    made.close()


def device(name: str = "pi", **changes: object) -> DeviceRow:
    """A device row."""
    row = DeviceRow(name, "pi5-8gb", {"site": "hki"}, "PEM", A, NOW, FACTS)
    return replace(row, **changes)  # type: ignore[arg-type]


def order(generation: int, action: str = "run", rollout_id: str = "r-1", digest: str = B) -> Assignment:
    """An order."""
    return Assignment(SCHEMA, generation, action, digest, rollout_id, variant_sha256=C)  # type: ignore[arg-type]


def checkin(name: str = "pi", seq: int = 1, **changes: object) -> CheckinWrite:
    """A check-in's write."""
    row = CheckinWrite(name, NOW, "boot", seq, C, 1, 1, "committed", B, A, "", 10, 20, 0, "")
    return replace(row, **changes)  # type: ignore[arg-type]


def rollout(name: str = "r-1", phase: Phase = Phase.OPEN, **changes: object) -> RolloutRow:
    """A rollout row."""
    state = RolloutState(phase, 0, NOW, ("olga",), "why", Phase.OPEN if phase is Phase.PAUSED else None)
    row = RolloutRow(name, "home", 1, "m", "1", A, state, NOW, "olga", holdback=("pi-9",))
    return replace(row, **changes)  # type: ignore[arg-type]


def with_release(store: SqlStore) -> None:
    """Rollouts and channels refer to a release and a device."""
    with store.write() as tx:
        tx.releases.add(ReleaseRow(A, "m", "1", 1, "releases/m/1.json", "{}", NOW, "olga"))
        tx.devices.add(device())


def test_a_device_is_read_back_as_it_was_written(store: SqlStore) -> None:
    """Every field, times exact to the microsecond and aware of their zone."""
    row = device(assignment=order(3), generation=3, last_seen_at=NOW, stale_since="2026-01-01T00:00:00Z")
    with store.write() as tx:
        tx.devices.add(row)
    with store.read() as tx:
        assert tx.devices.get("pi") == row
        assert tx.devices.get("nobody") is None
        assert tx.devices.all(["pi", "nobody"]) == [row]


def test_a_taken_device_name_is_a_conflict(store: SqlStore) -> None:
    """And nothing of the transaction stays."""
    with store.write() as tx:
        tx.devices.add(device())
    with pytest.raises(ConflictError), store.write() as tx:
        tx.devices.add(device("other"))
        tx.devices.add(device())
    with store.read() as tx:
        assert [row.id for row in tx.devices.all()] == ["pi"]


def test_a_transaction_that_raises_leaves_nothing(store: SqlStore) -> None:
    """Whatever was raised."""
    with pytest.raises(RuntimeError), store.write() as tx:
        tx.devices.add(device())
        raise RuntimeError("power")
    with store.read() as tx:
        assert tx.devices.all() == []


def test_a_transaction_inside_another_is_a_bug(store: SqlStore) -> None:
    """It would wait for itself."""
    with pytest.raises(BugError), store.write(), store.write():
        pass


def test_orders_only_go_forward(store: SqlStore) -> None:
    """The same or an older generation is refused and changes nothing; history keeps every order."""
    with store.write() as tx:
        tx.devices.add(device())
        tx.devices.assign("pi", order(2), NOW)
    for generation in (1, 2):
        with pytest.raises(ConflictError), store.write() as tx:
            tx.devices.assign("pi", order(generation), NOW)
    with store.write() as tx:
        tx.devices.assign("pi", order(3, "revert"), NOW + timedelta(seconds=1))
    with store.read() as tx:
        row = tx.devices.get("pi")
        assert row is not None
        assert (row.generation, row.assignment) == (3, order(3, "revert"))
        assert tx.devices.assigned(B) == order(2)  # a revert names a digest, but is no order to run it
        assert tx.devices.assigned(C) is None


def test_an_outcome_that_comes_again_after_another_is_the_newest(store: SqlStore) -> None:
    """Committed, lost by damage on the disk, repaired: the last word is the last row, with what was measured once."""
    golden = GoldenReport(4, 0)
    proved = OutcomeReport(B, "r-1", 3, "committed", golden=golden, ratios={"decode_tps": 1.1})
    lost = OutcomeReport(B, "r-1", 3, "fallback", cause="environment", code="trust.digest")
    repaired = OutcomeReport(B, "r-1", 3, "committed")
    stayed = OutcomeReport(B, "r-1", 3, "committed", cause="environment", code="device.revert_failed")
    with store.write() as tx:
        tx.devices.add(device("pi"))
        tx.devices.record(
            [
                checkin(seq=number, outcome=outcome)
                for number, outcome in enumerate((proved, lost, lost, repaired), 1)
            ]
        )
    with store.read() as tx:
        kept = [row.report for row in tx.devices.rollout_outcomes("r-1")]
        assert [report.status for report in kept] == ["fallback", "committed"]
        assert (kept[1].golden, kept[1].ratios) == (golden, {"decode_tps": 1.1})
        found = tx.devices.latest_commit("pi", B)
        assert found is not None and found.report == kept[1]
    with store.write() as tx:
        tx.devices.record([checkin(seq=5, outcome=stayed)])  # it was to go back, and could not
    with store.read() as tx:
        newest = tx.devices.rollout_outcomes("r-1")[-1].report
        assert (newest.status, newest.code, newest.golden) == ("committed", "device.revert_failed", golden)


def test_checkins_are_written_in_order_and_an_outcome_only_once(store: SqlStore) -> None:
    """A repeated outcome is the same one; facts change only when they were sent."""
    golden = GoldenReport(1, 0, both=1)
    outcome = OutcomeReport(
        B, "r-1", 1, "committed", golden=golden, ratios={"decode_tps": 0.97}, fetched_bytes=5
    )
    facts = Facts("aarch64", 2, 1 << 30, 1 << 30, {}, "0.2.0")
    with store.write() as tx:
        tx.devices.add(device())
        tx.devices.record([checkin(seq=1, outcome=outcome), checkin(seq=2, outcome=outcome, facts=facts)])
        tx.devices.record([])
    with store.read() as tx:
        row = tx.devices.get("pi")
        assert row is not None
        assert (row.seq, row.facts, row.phase, row.running, row.last_seen_at) == (
            2,
            facts,
            "committed",
            B,
            NOW,
        )
        outcomes = tx.devices.outcomes("pi")
        assert [found.report for found in outcomes] == [outcome]
        assert tx.devices.rollout_outcomes("r-1") == outcomes
        assert tx.devices.latest_commit("pi", B) == outcomes[0]
        assert tx.devices.latest_commit("pi", C) is None


def test_devices_ahead_of_the_database_are_found_and_caught_up_with(store: SqlStore) -> None:
    """A device that acted upon a generation that was never issued here."""
    with store.write() as tx:
        tx.devices.add(device())
        tx.devices.record([checkin(reported_generation=7)])
        assert [row.id for row in tx.devices.ahead()] == ["pi"]
        tx.devices.set_generation("pi", 7)
        tx.devices.set_generation("pi", 3)
        assert tx.devices.ahead() == []
    with store.read() as tx:
        row = tx.devices.get("pi")
        assert row is not None
        assert row.generation == 7


def test_labels_retirement_and_names(store: SqlStore) -> None:
    """Labels are replaced; a prefix with a wildcard in it is only text."""
    with store.write() as tx:
        for name in ("pi", "pi-2", "p%", "other"):
            tx.devices.add(device(name))
        tx.devices.set_labels("pi", {"x": "y"})
        tx.devices.retire("pi-2", NOW)
    with store.read() as tx:
        row, retired = tx.devices.get("pi"), tx.devices.get("pi-2")
        assert row is not None
        assert retired is not None
        assert (row.labels, retired.retired_at) == ({"x": "y"}, NOW)
        assert tx.devices.ids_with_prefix("pi") == {"pi", "pi-2"}
        assert tx.devices.ids_with_prefix("p%") == {"p%"}
        assert tx.devices.by_enrolment(A, "PEM") is not None
        assert tx.devices.by_enrolment(A, "OTHER") is None


def test_an_enrolment_token_is_used_as_often_as_it_allows(store: SqlStore) -> None:
    """By however many at once: the count is taken in the database."""
    token = EnrolmentTokenRow(A, 3, 0, NOW, {"site": "hki"}, "olga", NOW)
    with store.write() as tx:
        tx.access.add_enrolment_token(token)
    taken: list[bool] = []

    def use() -> None:
        with store.write() as tx:
            taken.append(tx.access.use_enrolment_token(A))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True] * 3
    with store.read() as tx:
        assert tx.access.enrolment_token(A) == replace(token, used=3)
        assert tx.access.enrolment_token(B) is None


def test_operator_tokens_and_sessions(store: SqlStore) -> None:
    """Names are unique; a session ends when it is told to."""
    token = OperatorTokenRow(A, "olga", "admin", NOW, NOW + timedelta(days=1))
    with store.write() as tx:
        tx.access.add_operator_token(token)
        tx.access.add_session(SessionRow(B, A, NOW))
    with pytest.raises(ConflictError), store.write() as tx:
        tx.access.add_operator_token(replace(token, sha256=C))
    with store.write() as tx:
        assert tx.access.operator_token(A) == token
        assert tx.access.session(B) == SessionRow(B, A, NOW)
        tx.access.add_session(SessionRow(C, A, NOW + timedelta(hours=1)))
        tx.access.expire_sessions(NOW)
        assert tx.access.session(B) is None
        assert tx.access.session(C) is not None
        tx.access.end_session(C)
        assert tx.access.session(C) is None


def test_releases_and_channels(store: SqlStore) -> None:
    """A version is published once; a channel points to the newest entry of its history."""
    with_release(store)
    second = ReleaseRow(B, "m", "2", 2, "releases/m/2.json", "{}", NOW + timedelta(seconds=1), "olga")
    with store.write() as tx:
        tx.releases.add(second)
        for digest in (A, B, A):
            tx.releases.set_channel(ChannelRow("m", "stable", digest, NOW, "olga"))
        tx.releases.set_channel(ChannelRow("m", "beta", B, NOW, "olga"))
    with pytest.raises(ConflictError), store.write() as tx:
        tx.releases.add(replace(second, digest=C))
    with store.read() as tx:
        assert [row.version for row in tx.releases.all()] == ["2", "1"]
        assert tx.releases.all("other") == []
        assert tx.releases.named("m", "2") == second
        assert {(row.channel, row.release_digest) for row in tx.releases.channels()} == {
            ("stable", A),
            ("beta", B),
        }
        assert [row.release_digest for row in tx.releases.channel_history("m", "stable")] == [A, B, A]
        assert tx.releases.channel("m", "none") is None


def test_blueprints_keep_every_revision(store: SqlStore) -> None:
    """The newest is the current one."""
    with store.write() as tx:
        for name, revision in (("home", 1), ("home", 2), ("lab", 1)):
            tx.blueprints.add(BlueprintRow(name, revision, f"text {revision}", "f.yaml", NOW, "olga"))
    with pytest.raises(ConflictError), store.write() as tx:
        tx.blueprints.add(BlueprintRow("home", 2, "other", "f.yaml", NOW, "olga"))
    with store.read() as tx:
        current = tx.blueprints.current("home")
        assert current is not None
        assert (current.revision, current.source) == (2, "text 2")
        assert [row.revision for row in tx.blueprints.history("home")] == [2, 1]
        assert [(row.name, row.revision) for row in tx.blueprints.all_current()] == [("home", 2), ("lab", 1)]


def test_a_rollout_written_by_two_is_a_conflict_for_the_second(store: SqlStore) -> None:
    """Whoever read it first and writes last loses, and reads again."""
    with_release(store)
    with store.write() as tx:
        tx.rollouts.add(rollout(), [])
    with store.read() as tx:
        mine = tx.rollouts.get("r-1")
        theirs = tx.rollouts.get("r-1")
    assert mine == theirs == rollout()
    assert mine is not None
    judgement = JudgementRow(NOW, "pass", (("wave.reached", "pass", "1 of 1", 0),))
    with store.write() as tx:
        tx.rollouts.save(replace(mine, judgement=judgement, state=replace(mine.state, phase=Phase.BAKING)))
    with pytest.raises(ConflictError), store.write() as tx:
        tx.rollouts.save(mine)
    with store.read() as tx:
        found = tx.rollouts.get("r-1")
        assert found is not None
        assert (found.judgement, found.state.phase, found.row_version) == (judgement, Phase.BAKING, 1)
        assert tx.rollouts.latest("home") == found
        assert [row.id for row in tx.rollouts.all({Phase.BAKING})] == ["r-1"]
        assert tx.rollouts.all({Phase.OPEN}) == []


def test_members_outbox_and_reverting_devices(store: SqlStore) -> None:
    """Members come in wave order; a command is there until it is done."""
    with_release(store)
    with store.write() as tx:
        tx.devices.add(device("pi-2"))
        members = [MemberRow("r-1", "pi-2", 1, 0), MemberRow("r-1", "pi", 0, 0)]
        tx.rollouts.add(rollout(phase=Phase.ROLLING_BACK), members)
        tx.rollouts.post("r-1", "withdraw", {}, NOW)
        tx.rollouts.post("r-1", "revert_devices", {"scope": "all"}, NOW)
    changed = MemberRow(
        "r-1", "pi", 0, 0, DeviceStatus.REVERTED, 2, B, C, "pi5-8gb", (A,), A, True, "content", "x", "why", NOW, NOW, NOW,
        GoldenReport(1, 0), {"decode_tps": 0.9}, "ordered", 3,
    )  # fmt: skip
    with store.write() as tx:
        assert [row.device_id for row in tx.rollouts.members("r-1")] == ["pi", "pi-2"]
        tx.rollouts.save_members([changed])
        first, second = tx.rollouts.outbox("r-1")
        assert (first.kind, second.kind, second.arguments) == ("withdraw", "revert_devices", {"scope": "all"})
        tx.rollouts.done(first.id, NOW)
    with store.read() as tx:
        assert tx.rollouts.members("r-1")[0] == changed
        assert [row.kind for row in tx.rollouts.outbox()] == ["revert_devices"]
        assert tx.rollouts.reverting() == {"pi"}


def test_ended_rollouts_with_open_offers_are_found_for_a_while(store: SqlStore) -> None:
    """Their last outcomes are still taken in."""
    with_release(store)
    with store.write() as tx:
        ended = rollout(phase=Phase.ABORTED, ended_at=NOW)
        tx.rollouts.add(ended, [MemberRow("r-1", "pi", 0, 0, DeviceStatus.OFFERED, 1)])
    with store.read() as tx:
        assert tx.rollouts.unsettled_after_end(NOW - timedelta(hours=1)) == ["r-1"]
        assert tx.rollouts.unsettled_after_end(NOW + timedelta(hours=1)) == []


def test_events_audit_and_facts(store: SqlStore) -> None:
    """Events resume after an id; the audit trail is newest first; a fact can be forgotten."""
    with store.write() as tx:
        for number in range(3):
            tx.journal.event(NOW, "k", f"s{number}", {"n": number})
            tx.journal.audit(NOW, "olga", "do", f"s{number}", {})
        tx.journal.set_fact("name", "one")
        tx.journal.set_fact("name", "two")
    with store.write() as tx:
        first, *rest = tx.journal.events(0)
        assert [row.subject for row in tx.journal.events(first.id)] == ["s1", "s2"]
        assert tx.journal.last_event_id() == rest[-1].id
        assert [row.subject for row in tx.journal.audit_trail(2)] == ["s2", "s1"]
        assert tx.journal.fact("name") == "two"
        tx.journal.set_fact("name", None)
        assert tx.journal.fact("name") is None


def test_readers_see_one_moment_while_somebody_writes(tmp_path: Path) -> None:
    """A file only: WAL keeps a reader's view, and neither waits for the other."""
    store = SqlStore.in_folder(tmp_path)
    with store.read() as before:
        assert before.devices.all() == []
        done = threading.Event()

        def write() -> None:
            with store.write() as tx:
                tx.devices.add(device())
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        assert done.wait(20)
        thread.join()
        assert before.devices.all() == []
    with store.read() as after:
        assert len(after.devices.all()) == 1
    store.close()


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    """Opening migrates nothing twice and loses nothing."""
    first = SqlStore.in_folder(tmp_path)
    with first.write() as tx:
        tx.devices.add(device())
    first.close()
    second = SqlStore.in_folder(tmp_path)
    with second.read() as tx:
        assert tx.devices.get("pi") == device()
    second.close()
