"""A control plane that stops anywhere: what was decided is done once, what was restored from a backup is not acted upon."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.support.control_plane import FakeClock, Keys, SimDevice, blueprint, in_process
from tests.support.simulated_fleet import World, world

from slmops.core.device.machine import Failure
from slmops.core.rollout.machine import AbortOrdered

CONTENT = Failure("content", "golden.committed_pack", "lost 1 of 1 answers")


def on_disk(folder: Path) -> str:
    """A database that outlives the world."""
    return f"sqlite:///{folder / 'slmops.db'}"


def move(devices: list[SimDevice], to: World) -> None:
    """The devices reach another server process at the same address."""
    to.devices = devices
    for device in devices:
        device.send = to.send


def test_a_decision_that_was_written_but_not_acted_upon_is_carried_out_once_after_a_restart(
    tmp_path: Path,
) -> None:
    """The abort is in the outbox, the process is gone: the next one withdraws and takes back, and nothing twice."""
    keys, clock, folder = Keys(), FakeClock(), tmp_path / "data"
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path)) as first:
        first.publish("1.0.0", 1)
        first.publish("1.1.0", 2)
        devices = first.enroll(4)
        first.until_ended(first.apply(blueprint(version="1.0.0")))
        rollout_id = first.apply(blueprint(version="1.1.0", waves="[{limit: 2}, {limit: 100%}]"))
        while first.rollout(rollout_id).counts.committed < 2:
            first.round()
        with first.services.store.write() as tx:  # persisted, and then the power goes: act() never runs
            row = first.services.rollouts.required(tx, rollout_id)
            first.services.rollouts._step(tx, row, AbortOrdered("test"), clock.now())
        with first.services.store.read() as tx:
            decided = [command.kind for command in tx.rollouts.outbox()]
        assert decided == ["withdraw", "revert_devices"]
        before = {device.name: list(device.generations) for device in devices}
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path), seed=8) as second:
        move(devices, second)
        done = second.until_ended(rollout_id)
        assert done.phase == "rolled_back"
        with second.services.store.read() as tx:
            assert tx.rollouts.outbox() == []
        for device in devices:
            new = device.generations[len(before[device.name]) :]
            held = any(order.version == "1.1.0" for order in device.orders.values())
            assert [action for _, action in new] == (["revert"] if held else [])


@pytest.mark.parametrize("turns", range(1, 9))
def test_a_restart_after_any_number_of_turns_loses_and_doubles_nothing(tmp_path: Path, turns: int) -> None:
    """Generations of each device grow by one order each, and the fleet ends where it would have without the restart."""
    keys, clock, folder = Keys(), FakeClock(), tmp_path / "data"
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path)) as first:
        first.publish("1.0.0", 1)
        devices = first.enroll(4)
        rollout_id = first.apply(blueprint(version="1.0.0", waves="[{limit: 1}, {limit: 2}, {limit: 100%}]"))
        first.rounds(turns)
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path), seed=8) as second:
        move(devices, second)
        done = second.rollout(rollout_id)
        if not done.ended_at:
            done = second.until_ended(rollout_id)
        assert (done.phase, done.counts.committed) == ("completed", 4)
        assert all(device.generations == [(1, "run")] for device in devices)


def test_a_database_restored_from_a_backup_pauses_and_never_commands(tmp_path: Path) -> None:
    """Devices know more than the server: every live rollout pauses with the numbers, and no order is given."""
    keys, clock, folder = Keys(), FakeClock(), tmp_path / "data"
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path)) as first:
        first.publish("1.0.0", 1)
        first.publish("1.1.0", 2)
        devices = first.enroll(3)
        first.until_ended(first.apply(blueprint(version="1.0.0")))
        rollout_id = first.apply(blueprint(version="1.1.0"))
    shutil.copy(tmp_path / "slmops.db", tmp_path / "backup.db")
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path), seed=8) as second:
        move(devices, second)
        second.until_ended(rollout_id)
    (tmp_path / "slmops.db").unlink()
    shutil.copy(tmp_path / "backup.db", tmp_path / "slmops.db")
    with world(folder, keys=keys, clock=clock, database_url=on_disk(tmp_path), seed=9) as third:
        move(devices, third)
        given = {device.name: list(device.generations) for device in devices}
        for device in devices:  # devices come before the worker does
            device.checkin()
        third.rounds(6)
        detail = third.rollout(rollout_id)
        assert detail.phase == "paused"
        assert "server restored" in detail.reason
        assert "acted upon generation 2, this database has issued 1" in detail.reason
        assert {device.name: device.generations for device in devices} == given
        third.act(rollout_id, "resume")
        done = third.until_ended(rollout_id)
        assert done.counts.committed == 3
        for device in devices:  # every order after the restore is above all that the device had seen
            generations = [generation for generation, _ in device.generations]
            assert generations == sorted(set(generations))


def test_a_tick_that_fails_changes_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """A lost release blob (disk damage) fails the turn; when the blob is back, the rollout goes on."""
    with world(tmp_path / "data") as plane:
        made = plane.publish("1.0.0", 1)
        plane.enroll(2)
        rollout_id = plane.apply(blueprint(version="1.0.0"))
        plane.services.catalogue._open.clear()
        plane.services.catalogue._variants.clear()
        sha256 = next(iter(made.variants.values()))
        path = tmp_path / "data" / "chunks" / sha256[:2] / sha256
        path.rename(path.with_suffix(".away"))
        with pytest.raises(Exception, match="no blob has sha256"):
            plane.round()
        path.with_suffix(".away").rename(path)
        assert plane.until_ended(rollout_id).counts.committed == 2


def test_an_old_replayed_report_cannot_change_what_is_known(tmp_path: Path) -> None:
    """The bytes of an accepted check-in, sent again later, are refused; the very same request at once is answered."""
    with world(tmp_path / "data") as plane:
        (device,) = plane.enroll(1)
        sent: list[tuple[str, bytes, str]] = []
        real = in_process(plane.application)

        def recording(path: str, body: bytes, bearer: str) -> tuple[int, bytes, str]:
            sent.append((path, body, bearer))
            return real(path, body, bearer)

        device.send = recording
        device.checkin()
        assert real(*sent[0])[0] == 204
        device.checkin()
        status, body, _ = real(*sent[0])
        assert status == 409
        assert b"is a replay" in body
        assert plane.services.fleet.device(device.name).state == "active"
        real.close()
