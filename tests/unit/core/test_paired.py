"""Paired outcomes against a margin: levels hold at every small n, plans keep their power, clusters are the unit."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import product

import pytest

from slmops.core.evidence.estimates import Estimate, log_estimate, mean_estimate, rate_estimate
from slmops.core.evidence.gates import Claim, Finding, ThresholdGate, Verdict, decide
from slmops.core.evidence.paired import (
    ClusteredCounts,
    exact_p,
    items_still_needed,
    items_to_plan,
    mcnemar,
    p_values,
    paired_test,
    worse_p,
)
from slmops.core.evidence.statistics import (
    PairedCounts,
    binomial_cdf,
    holm_adjusted,
    paired_drop_bounds,
    student_cdf,
    student_quantile,
    tango_score,
)

ALPHA = 0.05
exact = cache(exact_p)


def alone(both: int, lost: int, gained: int, neither: int) -> ClusteredCounts:
    """Items that each stand alone."""
    cells = ((1, 0, 0),) * (both + neither) + ((1, 1, 0),) * lost + ((1, 0, 1),) * gained
    return ClusteredCounts(PairedCounts(both, lost, gained, neither), cells)


def trinomial(n: int, b: int, c: int, p: float, q: float) -> float:
    """P(b losses and c gains)."""
    rest = n - b - c
    ways = math.comb(n, b) * math.comb(n - b, c)
    return float(ways * p**b * q**c * max(1 - p - q, 0.0) ** rest)


# ---- exact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "b", "c", "margin"), [(12, 0, 0, 0.1), (15, 2, 1, 0.05), (20, 1, 4, -0.1), (18, 3, 3, 0.3)]
)
def test_the_exact_p_is_the_sum_over_all_outcomes(n: int, b: int, c: int, margin: float) -> None:
    """By brute force over every table and a fine grid of the unknown flip probability, the whole of it."""
    extreme = tango_score(n, b, c, margin) + 1e-9
    region = [
        (i, j)
        for i, j in product(range(n + 1), repeat=2)
        if i + j <= n and tango_score(n, i, j, margin) <= extreme
    ]
    least, most = max(0.0, -margin), (1 - margin) / 2
    worst = max(
        sum(trinomial(n, i, j, q + margin, q) for i, j in region)
        for q in (least + (most - least) * step / 200 for step in range(201))
    )
    found = exact_p(n, b, c, margin)
    assert (
        found <= worst + 0.0005 + 1e-9
    )  # the nuisance is looked for in its interval only, at the price of 0.0005
    assert (
        found
        >= sum(trinomial(n, i, j, max(c / n, least) + margin, max(c / n, least)) for i, j in region) - 0.02
    )


def test_no_flips_are_the_binomial_case() -> None:
    """Nothing lost in n items: (1 - M)^n, and the 0.0005 of the interval."""
    for n, margin in ((29, 0.1), (60, 0.05), (148, 0.02)):
        assert exact_p(n, 0, 0, margin) == pytest.approx((1 - margin) ** n + 0.0005, abs=1e-6)


@pytest.mark.parametrize(("n", "margin"), [(20, 0.1), (40, 0.05), (60, 0.02)])
def test_false_acceptance_never_exceeds_its_name(n: int, margin: float) -> None:
    """At a true drop of the margin, whatever the flip rate, by complete enumeration; the asymptotic score errs by more."""
    accepts = {(b, c) for b in range(12) for c in range(12) if exact(n, b, c, margin) <= ALPHA}
    assert accepts or (1 - margin) ** n > ALPHA - 0.0005
    for q in (0.0, 0.005, 0.02, 0.05, 0.1, 0.15):
        assert sum(trinomial(n, b, c, q + margin, q) for b, c in accepts) <= ALPHA


def test_what_is_surely_worse_is_refused_with_the_same_care() -> None:
    """Refusal is the mirrored test: 10 of 40 lost is more than 2 %, 2 of 40 is not."""
    many, few = paired_test(alone(30, 10, 0, 0), 0.02), paired_test(alone(38, 2, 0, 0), 0.02)
    assert many.refuse_p < 0.002 < ALPHA < few.refuse_p
    assert many.low > 0.02 > few.low


def test_bounds_agree_with_decisions_and_with_the_score_where_flips_are_many() -> None:
    """The upper bound is where acceptance would begin; with many flips exact and score are the same thing."""
    for counts in ((90, 4, 2, 4), (93, 2, 1, 0), (45, 0, 3, 2)):
        test = paired_test(alone(*counts), 0.05)
        assert (test.high < 0.05) == (test.accept_p <= ALPHA)
        assert (test.low > 0.05) == (test.refuse_p <= ALPHA)
        low, high = paired_drop_bounds(PairedCounts(*counts))
        assert (test.low, test.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))
    many = PairedCounts(800, 40, 30, 130)
    test = paired_test(ClusteredCounts(many, ((1, 0, 0),) * many.n), 0.05)
    assert test.form.startswith("score")
    assert (test.low, test.high) == tuple(pytest.approx(x, abs=0.001) for x in paired_drop_bounds(many))


def test_mcnemar_is_the_exact_sign_test() -> None:
    """8 losses against 2 gains: P(Bin(10, 1/2) >= 8)."""
    assert mcnemar(8, 2) == pytest.approx(56 / 1024)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == 1.0
    assert mcnemar(5, 0) == pytest.approx(1 / 32)


# ---- plans -----------------------------------------------------------------------------------------------------


def test_the_planning_formula_is_that_of_the_table() -> None:
    """(z_a + z_b)^2 f / M^2 of the reference, less than a sixth above it for what counts in whole items."""
    for flips, plain in ((0.02, 310), (0.05, 773), (0.1, 1546), (0.2, 3092)):
        assert plain <= items_to_plan(flips, 0.02) <= 1.17 * plain
    assert items_to_plan(0.05, 0.02, power=0.9) > 1071
    assert items_to_plan(0.0, 0.02) == 149  # the rule of three


@pytest.mark.parametrize(("flips", "margin"), [(0.05, 0.05), (0.20, 0.1), (0.05, 0.02)])
def test_a_plan_keeps_its_power_and_its_level(flips: float, margin: float) -> None:
    """Seeded experiments at the planned n: an honest model passes in about 80 %, one at the margin in at most 5 %."""
    n = items_to_plan(flips, margin)

    @cache
    def accepted(b: int, c: int) -> bool:
        if b - c > n * margin:
            return False
        return p_values(alone(n - b - c, b, c, 0), margin)[0] <= ALPHA

    def share(drop: float, seed: int, repeats: int = 400) -> float:
        chance, rate = random.Random(seed), max(flips, drop)
        passed = 0
        for _ in range(repeats):
            draws = [chance.random() for _ in range(n)]
            b = sum(draw < (rate + drop) / 2 for draw in draws)
            c = sum((rate + drop) / 2 <= draw < rate for draw in draws)
            passed += accepted(b, c)
        return passed / repeats

    assert 0.72 <= share(0.0, 1) <= 0.88
    assert share(margin, 2) <= 0.075  # 5 % and two standard errors of 400 experiments


def test_items_still_needed_would_settle_it() -> None:
    """After the announced number, at unchanged rates, it passes; at the margin itself no number helps."""
    counts = PairedCounts(95, 3, 2, 0)
    more = items_still_needed(alone(95, 3, 2, 0), 0.05)
    scale = (counts.n + more) / counts.n
    grown = alone(*(round(cell * scale) for cell in (95, 3, 2, 0)))
    assert paired_test(alone(95, 3, 2, 0), 0.05).accept_p > ALPHA >= paired_test(grown, 0.05).accept_p
    assert items_still_needed(alone(0, 0, 0, 0), 0.02) == 1
    assert items_still_needed(alone(98, 2, 0, 0), 0.02) == 0
    assert items_still_needed(alone(20, 0, 0, 0), 0.02) == 129  # 149 in all


# ---- clusters --------------------------------------------------------------------------------------------------


def clustered(templates: int, size: int, drop: float, flips: float, chance: random.Random) -> ClusteredCounts:
    """Templates whose items all flip together or not at all."""
    cells = []
    for _ in range(templates):
        draw = chance.random()
        lost, gained = draw < (flips + drop) / 2, (flips + drop) / 2 <= draw < flips
        cells.append((size, size * lost, size * gained))
    b, c = sum(cell[1] for cell in cells), sum(cell[2] for cell in cells)
    return ClusteredCounts(PairedCounts(templates * size - b - c, b, c, 0), tuple(cells))


@pytest.mark.parametrize(("templates", "size", "flips", "margin"), [(60, 8, 0.1, 0.1), (150, 4, 0.2, 0.1)])
def test_the_template_is_the_unit(templates: int, size: int, flips: float, margin: float) -> None:
    """Items that flip by template: the clustered test keeps its 5 %, item by item it would accept far more often."""
    chance, repeats, by_template, by_item = random.Random(5), 300, 0, 0
    for _ in range(repeats):
        observed = clustered(templates, size, margin, max(flips, margin), chance)
        by_template += p_values(observed, margin)[0] <= ALPHA
        by_item += paired_drop_bounds(observed.counts)[1] <= margin
    assert by_template / repeats <= 0.08
    assert by_item / repeats > 0.15


def test_clusters_of_one_are_items() -> None:
    """A group for each item, or none, changes nothing; one shared group makes one observation of all."""
    old, new = [True] * 50, [True] * 48 + [False] * 2
    single = ClusteredCounts.of(old, new, list(range(50)))
    assert single.design_effect() == 1.0
    assert paired_test(single, 0.1) == paired_test(ClusteredCounts.of(old, new, None), 0.1)
    assert paired_test(single, 0.1) == paired_test(ClusteredCounts.of(old, new, [None] * 50), 0.1)
    shared = ClusteredCounts.of(old, new, ["t"] * 50)
    assert shared.design_effect() == 50
    assert paired_test(shared, 0.1).accept_p > 0.5


def test_independent_items_in_groups_lose_little() -> None:
    """With enough templates that flip, groups whose items do not go together have a design effect near 1."""
    chance = random.Random(9)
    old = [True] * 1000
    new = [chance.random() > 0.1 for _ in old]
    grouped = ClusteredCounts.of(old, new, [index // 4 for index in range(1000)])
    assert 1.0 <= grouped.design_effect() < 1.35


def test_mcnemar_of_clusters_counts_clusters() -> None:
    """One template that loses its 30 items is one loss."""
    old, new = [True] * 40, [False] * 30 + [True] * 10
    assert worse_p(ClusteredCounts.of(old, new, ["a"] * 30 + [None] * 10)) == 0.5
    assert worse_p(ClusteredCounts.of(old, new, None)) < 1e-8


# ---- families --------------------------------------------------------------------------------------------------


def test_holm_steps_down() -> None:
    """The textbook: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([]) == []
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]


def claims(chance: random.Random, drops: list[float], n: int, margin: float) -> list[Claim | Finding]:
    made: list[Claim | Finding] = []
    for drop in drops:
        lost = sum(chance.random() < drop for _ in range(n))
        accept, refuse = p_values(alone(n - lost, lost, 0, 0), margin)
        made.append(Claim("g", accept, refuse, 0.95, "", 0))
    return made


def test_a_family_keeps_both_error_rates() -> None:
    """Eight slices at the margin are falsely refused in 5 % together; one bad slice among good ones passes in 5 %, at most."""
    refused = passed = naive = 0
    chance = random.Random(8)
    for _ in range(400):
        at_margin = claims(chance, [0.1] * 8, 60, 0.1)
        refused += any(finding.verdict is Verdict.FAIL for finding in decide(at_margin))
        naive += any(decide([claim])[0].verdict is Verdict.FAIL for claim in at_margin)
        one_bad = claims(chance, [0.0] * 3 + [0.1], 60, 0.1)
        passed += all(finding.verdict is Verdict.PASS for finding in decide(one_bad))
    assert refused / 400 <= 0.05
    assert naive / 400 > 0.1
    assert passed / 400 <= 0.07


def test_a_finding_states_its_family() -> None:
    """How many questions were asked together is part of the answer; a settled finding counts for none."""
    family = [*claims(random.Random(3), [0.0, 0.0], 100, 0.1), Finding("x", Verdict.ERROR, "broke")]
    first, second, broken = decide(family)
    assert "one of 2 questions, refused together at 0.05 (Holm)" in first.reason
    assert broken == Finding("x", Verdict.ERROR, "broke")
    assert "one of" not in decide(family[:1])[0].reason
    assert second.verdict is Verdict.PASS


# ---- estimates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 6.314), (2, 2.920), (5, 2.015), (10, 1.812), (29, 1.699), (200, 1.653)]
)
def test_students_table(freedom: int, quantile: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=0.001)
    assert student_cdf(-quantile, freedom) == pytest.approx(0.05, abs=0.001)
    assert (student_cdf(math.inf, freedom), student_cdf(-math.inf, freedom)) == (1.0, 0.0)


def test_a_mean_of_clusters_covers_as_it_says() -> None:
    """Skewed values that share their text: each bound misses in 5 to 8 % at 40 texts, a naive one far more often."""
    chance, missed, naive_missed = random.Random(4), 0, 0
    for _ in range(200):
        sums, sizes, squares = [], [], 0.0
        for _ in range(40):
            level, size = chance.expovariate(1.0) * 0.02 + 0.03, chance.randint(10, 40)
            values = [level * chance.uniform(0.5, 1.5) for _ in range(size)]
            sums.append(sum(values))
            sizes.append(size)
            squares += sum(value * value for value in values)
        mean, error = mean_estimate(sums, sizes)
        n = sum(sizes)
        naive = math.sqrt((squares / n - mean * mean) / n)
        low, high = log_estimate(mean, error, 40).bounds()
        missed += not low <= 0.05 <= high
        low, high = log_estimate(mean, naive, n).bounds()
        naive_missed += not low <= 0.05 <= high
    assert 0.04 < missed / 200 < 0.17  # two bounds
    assert naive_missed / 200 > 0.3


def test_a_threshold_inside_the_interval_is_inconclusive() -> None:
    """The point alone would have passed, or failed; the interval says that nobody knows, and how many texts would."""
    estimate = Estimate(0.045, 30, "log", 0.1)
    low, high = estimate.bounds()
    assert low < 0.045 < high
    for maximum, verdict in (
        (high * 1.01, "pass"),
        (0.05, "inconclusive"),
        (0.042, "inconclusive"),
        (low * 0.99, "fail"),
    ):
        finding = decide([ThresholdGate("kld.mean", maximum=maximum).claim(estimate, 0.95)])[0]
        assert finding.verdict is Verdict(verdict)
        assert (finding.needed > 0) == (verdict == "inconclusive")
    inside = decide([ThresholdGate("kld.mean", maximum=0.05).claim(estimate, 0.95)])[0]
    assert "more texts would settle it" in inside.reason
    floor = decide(
        [
            ThresholdGate("same_top.ratio", minimum=0.85).claim(
                Estimate(0.9, 50, "rate", effective=1000.0), 0.95
            )
        ]
    )[0]
    assert floor.verdict is Verdict.PASS


def test_one_text_bounds_nothing() -> None:
    """A single cluster has no spread: never a pass, never a fail."""
    for estimate in (Estimate(0.01, 1, "log", 0.0), Estimate(1.0, 1, "rate", effective=40.0)):
        assert (
            decide([ThresholdGate("x", maximum=0.5, minimum=0.001).claim(estimate, 0.95)])[0].verdict
            is Verdict.INCONCLUSIVE
        )


def test_equal_models_pass_without_spread() -> None:
    """No divergence at all, and a rate of 1: the bounds are a point, and the rule of three."""
    none = Estimate(0.0, 20, "log", 0.0)
    assert decide([ThresholdGate("kld.mean", maximum=0.05).claim(none, 0.95)])[0].verdict is Verdict.PASS
    rate = rate_estimate([10] * 20, [10] * 20)
    assert rate.effective == 20
    assert rate.bounds()[0] == pytest.approx(0.05 ** (1 / 20))
    assert rate.at_most_p(0.5) == pytest.approx(0.5**20)


def test_rates_are_exact_binomial_on_what_counts() -> None:
    """Independent observations count as all of them; identical ones as one a cluster."""
    chance = random.Random(2)
    sizes = [20] * 100
    independent = rate_estimate([sum(chance.random() < 0.3 for _ in range(20)) for _ in sizes], sizes)
    assert independent.effective > 1400
    together = rate_estimate([20 * (chance.random() < 0.3) for _ in sizes], sizes)
    assert 80 < together.effective < 125
    n = math.floor(together.effective)
    assert together.at_least_p(0.5) == pytest.approx(
        binomial_cdf(math.ceil(together.value * n - 1e-9), n, 0.5)
    )


def test_an_estimate_survives_json() -> None:
    for estimate in (Estimate(0.02, 1, "log", 0.3), Estimate(0.9, 12, "rate", effective=33.5)):
        assert Estimate.read(estimate.document()) == estimate
