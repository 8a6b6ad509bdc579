"""Statistics against published values, exact enumeration and seeded simulation."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.evidence.statistics import (
    PairedCounts,
    binomial_cdf,
    failure_e_value,
    lower_bound,
    median,
    median_bounds,
    normal_quantile,
    paired_drop_bounds,
    upper_bound,
)


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (7, 0.1), (12, 0.37), (30, 0.9)])
def test_binomial_cdf_is_the_sum_of_its_terms(n: int, p: float) -> None:
    terms = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for k, exact in enumerate(accumulate(terms)):
        assert binomial_cdf(k, n, p) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "p", "value"), [(-1, 5, 0.5, 0), (5, 5, 0.5, 1), (2, 5, 0, 1), (2, 5, 1, 0)]
)
def test_binomial_cdf_at_its_edges(k: int, n: int, p: float, value: float) -> None:
    assert binomial_cdf(k, n, p) == value


@pytest.mark.parametrize(("n", "bound"), [(10, 0.2589), (20, 0.1391), (59, 0.0495), (299, 0.00997)], ids=str)
def test_no_failures_prove_this_much(n: int, bound: float) -> None:
    """0 of n: the bound is 1 - 0.05^(1/n), the "rule of three"."""
    assert upper_bound(0, n) == pytest.approx(bound, abs=1e-4)
    assert upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n), abs=1e-9)


@pytest.mark.parametrize(
    ("failures", "n", "low", "high"),
    # two-sided 95 % Clopper-Pearson intervals, R: binom.test(x, n)$conf.int
    [(1, 10, 0.002528579, 0.4450161), (5, 10, 0.1870860, 0.8129140), (4, 20, 0.05733400, 0.4366140)],
)
def test_clopper_pearson_as_r_computes_it(failures: int, n: int, low: float, high: float) -> None:
    assert lower_bound(failures, n, 0.975) == pytest.approx(low, rel=1e-5)
    assert upper_bound(failures, n, 0.975) == pytest.approx(high, rel=1e-5)


@given(n=st.integers(1, 60), data=st.data())
def test_clopper_pearson_inverts_the_tail(n: int, data: st.DataObject) -> None:
    """At the bound the observation is exactly as unlikely as the confidence says."""
    failures = data.draw(st.integers(0, n - 1))
    bound = upper_bound(failures, n)
    assert binomial_cdf(failures, n, bound) == pytest.approx(0.05, abs=1e-9)
    assert lower_bound(failures, n) <= failures / n <= bound


def test_nothing_observed_bounds_nothing() -> None:
    assert (lower_bound(0, 0), upper_bound(0, 0)) == (0.0, 1.0)
    assert upper_bound(3, 3) == 1.0


# ---- the e-process -------------------------------------------------------------------------------------------


def first_alarm(
    rate: float, devices: int, chance: random.Random, *, p0: float = 0.02, p1: float = 0.10
) -> int | None:
    """Devices settled when the e-value first reached 20, looking after each one; None without an alarm."""
    failures = 0
    for n in range(1, devices + 1):
        failures += chance.random() < rate
        if failure_e_value(failures, n, p0, p1) >= 20:
            return n
    return None


def test_a_good_release_is_stopped_at_most_as_often_as_alpha_says() -> None:
    """2,000 rollouts of 300 devices at the tolerated rate, looked at after every device: at most 5 % alarms."""
    chance = random.Random(20261123)
    alarms = sum(first_alarm(0.02, 300, chance) is not None for _ in range(2000))
    assert 0 < alarms / 2000 <= 0.05


def test_a_bad_release_is_found_early() -> None:
    """At 25 % failures the median detection comes within 15 devices (DESIGN section 12, promise "judge")."""
    chance = random.Random(7)
    found = [first_alarm(0.25, 300, chance) for _ in range(500)]
    assert None not in found
    assert median([n for n in found if n is not None]) <= 15


def test_the_e_value_is_a_martingale_at_the_tolerated_rate() -> None:
    """Its exact expectation after n devices is 1 at p0, and below 1 at any smaller rate."""
    for p0, p1, n in ((0.02, 0.10, 40), (0.3, 0.6, 25), (0.6, 0.95, 20)):
        for rate, expected in ((p0, 1.0), (p0 / 2, None)):
            mean = math.fsum(
                comb(n, k) * rate**k * (1 - rate) ** (n - k) * failure_e_value(k, n, p0, p1)
                for k in range(n + 1)
            )
            assert mean == pytest.approx(expected) if expected else mean < 1


@given(n=st.integers(0, 150), data=st.data())
def test_the_e_value_grows_with_failures(n: int, data: st.DataObject) -> None:
    failures = data.draw(st.integers(0, n))
    here = failure_e_value(failures, n, 0.02, 0.1)
    assert (
        failure_e_value(failures, n + 1, 0.02, 0.1) < here < failure_e_value(failures + 1, n + 1, 0.02, 0.1)
    )


def test_a_fleet_that_fails_entirely_is_a_number_not_an_overflow() -> None:
    assert failure_e_value(10_000, 10_000, 0.02, 0.1) == pytest.approx(1e300)
    assert failure_e_value(0, 100_000, 0.02, 0.1) < 1e-100


# ---- paired comparison -----------------------------------------------------------------------------------------


def test_tango_interval_of_the_literature() -> None:
    """Airway hyper-responsiveness before and after transplantation: -0.517 to -0.026 at 95 %, two-sided.

    Source: Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33(16), the (1, 1, 7, 12) example.
    """
    low, high = paired_drop_bounds(PairedCounts(1, 1, 7, 12), 0.975)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def score_by_maximum_likelihood(counts: PairedCounts, delta: float) -> float:
    """Tango's statistic with the nuisance parameter found by search instead of by the closed form."""
    n, b, c = counts.n, counts.only_old, counts.only_new

    def log_likelihood(q: float) -> float:
        parts = ((b, q + delta), (c, q), (n - b - c, 1 - 2 * q - delta))
        return sum(count * math.log(p) for count, p in parts if count)

    low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
    for _ in range(200):
        third = (high - low) / 3
        if log_likelihood(low + third) < log_likelihood(high - third):
            low += third
        else:
            high -= third
    q = (low + high) / 2
    return (b - c - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975])
@pytest.mark.parametrize(
    "counts",
    [
        PairedCounts(36, 1, 12, 1),
        PairedCounts(53, 16, 9, 22),
        PairedCounts(40, 3, 0, 1),
        PairedCounts(100, 0, 0, 0),
        PairedCounts(0, 5, 5, 0),
        PairedCounts(10, 2, 1, 7),
        PairedCounts(43, 1, 0, 0),
    ],
    ids=str,
)
def test_tango_bounds_are_where_the_score_says(counts: PairedCounts, confidence: float) -> None:
    """At the bounds an independent computation of the score gives plus and minus the normal quantile."""
    low, high = paired_drop_bounds(counts, confidence)
    z = normal_quantile(confidence)
    assert score_by_maximum_likelihood(counts, low) == pytest.approx(z, abs=1e-4)
    assert score_by_maximum_likelihood(counts, high) == pytest.approx(-z, abs=1e-4)


@given(cells=st.tuples(*[st.integers(0, 40)] * 4))
def test_paired_bounds_contain_the_estimate_and_mirror(cells: tuple[int, int, int, int]) -> None:
    both, only_old, only_new, neither = cells
    counts = PairedCounts(both, only_old, only_new, neither)
    low, high = paired_drop_bounds(counts)
    assert -1 <= low <= counts.drop + 1e-9
    assert counts.drop - 1e-9 <= high <= 1
    mirrored = paired_drop_bounds(PairedCounts(both, only_new, only_old, neither))
    assert mirrored == (pytest.approx(-high, abs=1e-6), pytest.approx(-low, abs=1e-6))


def test_no_discordant_pairs_still_leave_doubt() -> None:
    """Where Wald's interval collapses to a point: 20 items without a change prove at most 12 % (one-sided)."""
    low, high = paired_drop_bounds(PairedCounts(20, 0, 0, 0))
    assert high == pytest.approx(-low)
    assert high == pytest.approx(0.1192, abs=1e-3)


def test_the_paired_interval_covers_as_it_says() -> None:
    """4,000 seeded experiments at n = 60: the one-sided 95 % bound misses the true drop in about 5 %."""
    chance = random.Random(3)
    p_both, p_old, p_new = 0.6, 0.12, 0.06
    missed = 0
    for _ in range(4000):
        cells = [0, 0, 0, 0]
        for draw in (chance.random() for _ in range(60)):
            cells[
                0
                if draw < p_both
                else 1
                if draw < p_both + p_old
                else 2
                if draw < p_both + p_old + p_new
                else 3
            ] += 1
        missed += paired_drop_bounds(PairedCounts(*cells))[1] < p_old - p_new
    assert 0.03 < missed / 4000 < 0.07


def test_counts_of_two_lists() -> None:
    counts = PairedCounts.of([True, True, False, False, True], [True, False, True, False, True])
    assert counts == PairedCounts(2, 1, 1, 1)
    assert (counts.n, counts.drop) == (5, 0.0)
    assert PairedCounts(0, 0, 0, 0).drop == 0.0
    assert paired_drop_bounds(PairedCounts(0, 0, 0, 0)) == (-1.0, 1.0)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        PairedCounts.of([True], [])


# ---- medians ---------------------------------------------------------------------------------------------------


def test_median() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5


@pytest.mark.parametrize(
    ("n", "rank"),
    # largest k with P(Bin(n, 1/2) < k) <= 0.05: one-sided table of the sign test
    [(4, None), (5, 1), (7, 1), (8, 2), (10, 2), (11, 3), (20, 6), (30, 11)],
)
def test_median_bounds_are_the_sign_tests_order_statistics(n: int, rank: int | None) -> None:
    values = [float(v) for v in range(1, n + 1)]
    expected = (-math.inf, math.inf) if rank is None else (float(rank), float(n + 1 - rank))
    assert median_bounds(values) == expected


def test_no_values_bound_no_median() -> None:
    assert median_bounds([]) == (-math.inf, math.inf)
