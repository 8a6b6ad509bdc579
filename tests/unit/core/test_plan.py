"""Wave membership: salted, cumulative, fair to labels and to sites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.errors import UsageError
from slmops.core.rollout.plan import InFlight, Member, WaveSpec, next_offers, plan, salted_order
from slmops.core.rollout.selector import parse_selector

FLEET = [Member(f"device-{n:03}", {"site": f"site-{n % 5}"}) for n in range(100)]
STANDARD = [WaveSpec(limit_ratio=0.01, min_devices=5), WaveSpec(limit_ratio=0.1), WaveSpec(limit_ratio=1.0)]


def labelled(**labels: str) -> list[Member]:
    return [
        Member(name.replace("_", "-"), {"canary": value} if value else {}) for name, value in labels.items()
    ]


def test_the_order_is_salted_and_repeatable() -> None:
    """Another rollout has another order, so the same unlucky devices are not first every time."""
    ids = [member.device_id for member in FLEET]
    first, second = salted_order("rollout-1", ids), salted_order("rollout-2", ids)
    assert first == salted_order("rollout-1", list(reversed(ids)))
    assert sorted(first) == sorted(second) == ids
    assert first[:10] != second[:10]


def test_the_order_is_the_published_one() -> None:
    """HMAC-SHA-256(rollout id, device id): anybody can recompute it, in any language."""
    # printf a | openssl dgst -sha256 -hmac r-1: a is 314c018e..., d a1581b82..., c afc40660..., b f3a640f5...
    assert salted_order("r-1", ["a", "b", "c", "d"]) == ["a", "d", "c", "b"]


def test_every_device_comes_first_about_equally_often() -> None:
    """Over 2,000 rollouts of 4 devices nobody leads in less than 20 % or more than 30 %."""
    lead = [salted_order(f"rollout-{n}", ["a", "b", "c", "d"])[0] for n in range(2000)]
    assert all(400 < lead.count(name) < 600 for name in "abcd")


def test_limits_are_cumulative() -> None:
    waves = plan("r", STANDARD, FLEET).waves
    assert [len(wave) for wave in waves] == [5, 5, 90]
    assert len({name for wave in waves for name in wave}) == 100


@given(
    size=st.integers(0, 60),
    ratios=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    holdback=st.floats(0, 0.5),
    salt=st.text(max_size=5),
)
def test_nobody_is_placed_twice_and_the_last_full_wave_takes_everyone(
    size: int, ratios: list[float], holdback: float, salt: str
) -> None:
    waves = [WaveSpec(limit_ratio=ratio) for ratio in ratios] + [WaveSpec()]
    laid_out = plan(salt, waves, FLEET[:size], holdback)
    placed = [name for wave in laid_out.waves for name in wave]
    assert sorted([*placed, *laid_out.holdback]) == [member.device_id for member in FLEET[:size]]
    assert len(laid_out.holdback) == int(holdback * size)


def test_a_share_is_never_rounded_down_to_nobody() -> None:
    assert [len(wave) for wave in plan("r", [WaveSpec(limit_ratio=0.01), WaveSpec()], FLEET[:3]).waves] == [
        1,
        2,
    ]
    # and 10 % of 30 is three, not four by floating point
    assert len(plan("r", [WaveSpec(limit_ratio=0.1)], FLEET[:30]).waves[0]) == 3


def test_a_number_of_devices_is_a_limit_too() -> None:
    waves = [WaveSpec(limit_devices=2), WaveSpec(limit_ratio=0.5, limit_devices=10), WaveSpec()]
    assert [len(wave) for wave in plan("r", waves, FLEET).waves] == [2, 8, 90]


def test_canary_labels_override_chance() -> None:
    """``always`` is in the first wave whatever the salt; ``never`` waits for the last one."""
    fleet = [*FLEET, *labelled(brave="always", shy="never")]
    for salt in ("r1", "r2", "r3"):
        waves = plan(salt, [WaveSpec(limit_devices=1), WaveSpec(limit_ratio=0.5), WaveSpec()], fleet).waves
        assert waves[0] == ("brave",)
        assert "shy" in waves[2]


def test_a_wave_by_selector_takes_only_those() -> None:
    canaries = WaveSpec(selector=parse_selector("canary = always"))
    fleet = [*FLEET, *labelled(one="always", two="always")]
    waves = plan("r", [canaries, WaveSpec()], fleet).waves
    assert sorted(waves[0]) == ["one", "two"]
    assert len(waves[1]) == 100


def test_a_selector_that_nobody_matches_makes_an_empty_wave() -> None:
    """It is shown as empty and judged as such; it does not quietly take somebody else."""
    waves = plan("r", [WaveSpec(selector=parse_selector("canary = always")), WaveSpec()], FLEET).waves
    assert [len(wave) for wave in waves] == [0, 100]


def test_the_holdback_gets_nothing_and_never_takes_a_canary() -> None:
    fleet = [*FLEET[:8], *labelled(brave="always", bold="always")]
    laid_out = plan("r", [WaveSpec()], fleet, 0.5)
    assert len(laid_out.holdback) == 5
    assert not {"brave", "bold"} & set(laid_out.holdback)
    assert set(laid_out.waves[0]).isdisjoint(laid_out.holdback)


def test_a_rollout_needs_a_wave() -> None:
    with pytest.raises(UsageError, match="at least one wave"):
        plan("r", [], FLEET)


def test_exposure_grows_only_on_evidence() -> None:
    """It doubles each time the successes have doubled, up to the maximum; never without successes."""
    in_flight = InFlight(start=5, growth=2.0, maximum=100)
    steps = [(0, 5), (4, 5), (5, 10), (14, 10), (15, 20), (35, 40), (10_000, 100)]
    assert [in_flight.limit(succeeded) for succeeded, _ in steps] == [limit for _, limit in steps]
    assert InFlight(5, 1.0, 100).limit(1000) == 5


def test_offers_keep_to_the_limit() -> None:
    assert next_offers(["c", "d", "e"], ["a", "b"], 4) == ["c", "d"]
    assert next_offers(["c"], ["a", "b"], 1) == []
    assert next_offers([], [], 5) == []


def test_offers_keep_to_the_disruption_budget() -> None:
    """At most one device of a site is away at once; devices without a site share one group."""
    sites = {"a": "hki", "b": "hki", "c": "tre", "d": "tre", "e": "oulu"}
    assert next_offers(["b", "c", "d", "e"], ["a"], 10, group_of=sites, max_unavailable=1) == ["c", "e"]
    assert next_offers(["x", "y"], [], 10, group_of={}, max_unavailable=1) == ["x"]
    assert next_offers(["b", "c"], ["a"], 10, group_of=sites) == ["b", "c"]
