"""Whose device it is, what it is left alone with, and what it gets of its own: priority, pins, overlays, windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.control_plane import blueprint
from tests.support.simulated_fleet import OPERATOR, World, world

from slmops.core.errors import ConflictError, DocumentError, NotFoundError


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[World]:
    """Two releases, and a fleet at two sites."""
    with world(tmp_path / "data") as made:
        made.publish("1.0.0", 1)
        made.publish("1.1.0", 2)
        made.enroll(2, "hki", labels={"site": "hki"})
        made.enroll(2, "tmp", labels={"site": "tmp"})
        yield made


def versions(plane: World) -> dict[str, str]:
    """Device to the version that it has committed, by its own journal."""
    return {
        device.name: device.orders[device.state.committed.assignment_digest].version
        if device.state.committed
        else ""
        for device in plane.devices
    }


def planned(plane: World, text: str):  # type: ignore[no-untyped-def]
    return plane.services.blueprints.plan(OPERATOR, text, "b.yaml")


def relabel(plane: World, device: str, **labels: str | None) -> None:
    plane.services.fleet.set_labels(OPERATOR, device, labels)


def test_a_device_of_two_blueprints_is_a_conflict_that_names_both(plane: World) -> None:
    """Nothing of the second one is kept, and the first goes on."""
    first = plane.apply(blueprint("north", version="1.0.0", selector="site = hki"))
    text = blueprint("everywhere", version="1.1.0")
    plan = planned(plane, text)
    assert plan.contested == {"hki-0": "north", "hki-1": "north"}
    assert plan.supersedes == ()
    assert "apply will be refused" in " ".join(plan.notes)
    with pytest.raises(ConflictError, match="hki-0, hki-1 would belong to everywhere and to north"):
        plane.apply(text)
    with pytest.raises(NotFoundError):
        plane.services.blueprints.history("everywhere")
    plane.until_ended(first)
    assert versions(plane) == {"hki-0": "1.0.0", "hki-1": "1.0.0", "tmp-0": "", "tmp-1": ""}


def test_the_higher_priority_owns_the_device_whoever_came_first(plane: World) -> None:
    plane.until_ended(plane.apply(blueprint("north", version="1.0.0", selector="site = hki", priority=5)))
    text = blueprint("everywhere", version="1.1.0")
    assert [choice.device_id for choice in planned(plane, text).choices] == ["tmp-0", "tmp-1"]
    plane.until_ended(plane.apply(text))
    assert versions(plane) == {"hki-0": "1.0.0", "hki-1": "1.0.0", "tmp-0": "1.1.0", "tmp-1": "1.1.0"}
    above = blueprint("above", version="1.1.0", selector="id = hki-1", priority=6)
    assert any("taken from north" in note for note in planned(plane, above).notes)
    plane.until_ended(plane.apply(above))
    assert versions(plane) == {"hki-0": "1.0.0", "hki-1": "1.1.0", "tmp-0": "1.1.0", "tmp-1": "1.1.0"}


def test_a_device_that_two_blueprints_come_to_claim_gets_nothing_of_either(plane: World) -> None:
    """Labels changed after both were applied: neither takes it in, and the next plan says why."""
    plane.until_ended(plane.apply(blueprint("north", version="1.0.0", selector="site = hki")))
    plane.enroll(1, "bench", labels={"lab": "yes"})
    plane.until_ended(plane.apply(blueprint("lab", version="1.1.0", selector="lab = yes")))
    (new,) = plane.enroll(1, "new", labels={"site": "hki", "lab": "yes"})
    plane.rounds(5)
    assert versions(plane)[new.name] == ""
    assert planned(plane, blueprint("lab", version="1.1.0", selector="lab = yes")).contested == {
        new.name: "north"
    }
    relabel(plane, new.name, lab=None)
    plane.rounds(5)
    assert versions(plane)[new.name] == "1.0.0"


def test_a_pinned_device_stays_on_what_it_runs(plane: World) -> None:
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    relabel(plane, "tmp-1", pinned="trade-fair")
    text = blueprint(version="1.1.0")
    plan = planned(plane, text)
    assert plan.pinned == ("tmp-1",)
    assert "tmp-1" not in {device for wave in plan.waves for device in wave.devices}
    plane.until_ended(plane.apply(text))
    assert versions(plane) == {"hki-0": "1.1.0", "hki-1": "1.1.0", "tmp-0": "1.1.0", "tmp-1": "1.0.0"}
    relabel(plane, "tmp-1", pinned=None)
    plane.rounds(5)
    assert (
        versions(plane)["tmp-1"] == "1.0.0"
    )  # the rollout that left it out is over: it is not given by surprise
    plane.until_ended(plane.apply(blueprint(version="1.1.0", extra="\n")))
    assert versions(plane)["tmp-1"] == "1.1.0"


def test_a_device_pinned_while_it_waits_is_not_offered_anything(plane: World) -> None:
    rollout_id = plane.apply(blueprint(version="1.0.0", waves="[{selector: 'site = hki'}, {limit: 100%}]"))
    relabel(plane, "tmp-0", pinned="customer")
    plane.rounds(8)
    assert versions(plane) == {"hki-0": "1.0.0", "hki-1": "1.0.0", "tmp-0": "", "tmp-1": "1.0.0"}
    assert plane.rollout(rollout_id).phase != "completed"
    relabel(plane, "tmp-0", pinned=None)
    assert plane.until_ended(rollout_id).phase == "completed"


OVERLAYS = """
  - {selector: "site = hki", serving: {context_tokens: 512}}
  - {selector: "id = hki-1", serving: {context_tokens: 768, parallel: 1}}
"""


def test_overlays_adapt_a_site_in_the_order_of_the_list(plane: World) -> None:
    """Later ones win, setting by setting; what an overlay does not name stays."""
    text = blueprint(version="1.0.0", overlays=OVERLAYS)
    assert any(note.startswith("overlay site = hki: 2 of 4 devices") for note in planned(plane, text).notes)
    plane.until_ended(plane.apply(text))
    got = {}
    for device in plane.devices:
        order = device.orders[device.state.committed.assignment_digest]
        got[device.name] = (order.serving.context_tokens, order.serving.parallel)
    assert got == {"hki-0": (512, 2), "hki-1": (768, 1), "tmp-0": (1024, 2), "tmp-1": (1024, 2)}
    memory = {choice.device_id: choice.memory_bytes for choice in planned(plane, text).choices}
    assert memory["hki-1"] < memory["hki-0"] < memory["tmp-0"] == memory["tmp-1"]


def test_a_changed_overlay_is_a_rollout_of_its_own(plane: World) -> None:
    """Devices that it does not touch confirm what they run, without a new trial."""
    plane.until_ended(plane.apply(blueprint(version="1.0.0")))
    before = {device.name: device.state.committed.assignment_digest for device in plane.devices}
    rollout_id = plane.apply(blueprint(version="1.0.0", overlays=OVERLAYS))
    assert rollout_id
    plane.until_ended(rollout_id)
    after = {device.name: device.state.committed.assignment_digest for device in plane.devices}
    assert {name for name in before if before[name] != after[name]} == {"hki-0", "hki-1"}


@pytest.mark.parametrize(
    ("overlays", "said"),
    [
        ('[{selector: "site ~ hki", serving: {parallel: 1}}]', "cannot read"),
        ('[{selector: "site = hki", serving: {parallel: 0}}]', r"overlays\[0\] \(site = hki\)"),
        ('[{selector: "site = hki", serving: {kv_cache: q9}}]', "q9"),
        ('[{selector: "site = hki", adapter: "x@1"}]', "adapter"),
    ],
)
def test_an_overlay_that_cannot_hold_is_refused_by_place(plane: World, overlays: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        plane.apply(blueprint(version="1.0.0", overlays=overlays))


def test_an_overlay_with_an_unknown_prompt_is_refused(plane: World) -> None:
    overlays = '[{selector: "site = hki", serving: {system_prompt: fi}}]'
    with pytest.raises(NotFoundError, match="has no prompt 'fi'"):
        plane.apply(blueprint(version="1.0.0", overlays=overlays))


def test_windows_travel_with_the_order_and_give_devices_the_time_to_wait(plane: World) -> None:
    """A day's wait is no silence: a device in its window's queue is not presumed dead."""
    for device in plane.devices:
        device.fate = lambda device, order: "stuck"
    windows = '  windows: {download: "0 1 * * * +4h", activate: "30 3 * * * +90m"}\n'
    text = blueprint(version="1.0.0", waves="[{limit: 100%}]", extra=windows)
    assert any("their own time: one may take 43 h" in note for note in planned(plane, text).notes)
    rollout_id = plane.apply(text)
    plane.rounds(3)
    order = next(iter(plane.devices[0].orders.values()))
    assert (order.download_window, order.activate_window) == ("0 1 * * * +4h", "30 3 * * * +90m")
    plane.round(3600 * 40)
    assert plane.rollout(rollout_id).counts.presumed_failed == 0
    plane.round(3600 * 4)
    assert plane.rollout(rollout_id).counts.presumed_failed == 4


def test_a_window_that_cannot_be_read_is_refused_before_anything_happens(plane: World) -> None:
    with pytest.raises(DocumentError, match="hour '25' is not within 0 to 23"):
        plane.apply(blueprint(version="1.0.0", extra='  windows: {activate: "0 25 * * * +1h"}\n'))
