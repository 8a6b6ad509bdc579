"""Paired outcomes tested against a margin: exact for few flips, by score for many, by cluster where items belong together.

An item is right or wrong under an old and a new model; only items that flip say anything. Two one-sided tests are asked of the
drop (old rate minus new rate) and a margin M:

* ``accept_p``: of "the drop is at least M". Small: the new model is not worse by M. This is non-inferiority.
* ``refuse_p``: of "the drop is at most M". Small: it is worse by more.

**Few flips** (up to ``FEW_FLIPS``): exact and unconditional. All outcomes whose score is at least as extreme are summed, with the
unknown flip probability at its least favourable value inside its own 99.95 % interval, whose miss is added to the p-value (Berger
and Boos 1994, JASA 89). The level holds at every n, zero flips included. **Many flips**: Tango's score.

**Clusters.** Items made from one template stand and fall together, so the template is the unit of analysis. Counts are divided
by a design effect (Rao and Scott 1992, Biometrics 48): with ``ENOUGH_CLUSTERS`` clusters that flip, the cluster-robust variance
over the naive one, never below 1, and with Student's quantile for their number; with fewer the variance cannot be estimated, and
each cluster counts as if all of its items were one (Kish's effect at an intra-cluster correlation of 1). Rounding goes against
the claim.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from slmops.core.evidence.statistics import (
    PairedCounts,
    binomial_cdf,
    lower_bound,
    normal_cdf,
    normal_quantile,
    student_quantile,
    tango_score,
    upper_bound,
)

#: up to so many flips the exact form is used; beyond, the score's level is within half a point of its name (tested)
FEW_FLIPS = 25
#: largest effective number of items for the exact form: beyond, sums get long and the score is good
FEW_ITEMS = 500
#: clusters with a flip from which on a variance between clusters can be estimated
ENOUGH_CLUSTERS = 10
_MISS = 0.0005
_NUISANCE_POINTS = 12
_NEGLIGIBLE = 1e-9
_TINY = 1e-250


@dataclass(frozen=True, slots=True)
class ClusteredCounts:
    """Paired outcomes with the cluster that each item belongs to.

    Attributes:
        counts: over all items.
        clusters: per cluster (items, right to wrong, wrong to right).
    """

    counts: PairedCounts
    clusters: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(old: Sequence[bool], new: Sequence[bool], groups: Sequence[Hashable] | None) -> ClusteredCounts:
        """Count outcomes; without groups, or with None as an item's group, each item is its own cluster."""
        counts = PairedCounts.of(old, new)
        cells: dict[Hashable, list[int]] = {}
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            group = groups[index] if groups is not None else None
            cell = cells.setdefault(("item", index) if group is None else ("group", group), [0, 0, 0])
            cell[0] += 1
            cell[1] += before and not after
            cell[2] += after and not before
        return ClusteredCounts(counts, tuple((n, b, c) for n, b, c in cells.values()))

    def design_effect(self, confidence: float = 0.95) -> float:
        """How many items count as one, at least 1; see the module."""
        n = self.counts.n
        if n == 0 or len(self.clusters) == n:
            return 1.0
        kish = sum(size * size for size, _, _ in self.clusters) / n
        flipped = sum(1 for _, b, c in self.clusters if b or c)
        if flipped < ENOUGH_CLUSTERS:
            return max(kish, 1.0)
        drop, count = self.counts.drop, len(self.clusters)
        robust = count / (count - 1) * sum((b - c - drop * size) ** 2 for size, b, c in self.clusters)
        flips = self.counts.only_old + self.counts.only_new
        naive = flips - (self.counts.only_old - self.counts.only_new) ** 2 / n
        wider = student_quantile(confidence, flipped - 1) / normal_quantile(confidence)
        return max(1.0, robust / naive if naive > 0 else kish) * wider**2


@dataclass(frozen=True, slots=True)
class PairedTest:
    """What paired outcomes say about a margin.

    Attributes:
        drop: observed, old rate minus new rate.
        low, high: one-sided bounds of the drop, each at the test's confidence.
        accept_p: p-value of "the drop is at least the margin"; ``refuse_p``: of "it is at most the margin".
        worse_p: exact McNemar (for clusters: sign) test of "the new model is not worse at all".
        form: which form was used, in words.
        design_effect: items that count as one.
    """

    drop: float
    low: float
    high: float
    accept_p: float
    refuse_p: float
    worse_p: float
    form: str
    design_effect: float


def paired_test(observed: ClusteredCounts, margin: float, confidence: float = 0.95) -> PairedTest:
    """Test paired outcomes against a margin; see the module.

    Args:
        observed: at least one item.
        margin: of the drop, absolute.
        confidence: one-sided, of the bounds.
    """
    counts, effect = observed.counts, observed.design_effect(confidence)
    up, down = _effective(counts, effect, against=1), _effective(counts, effect, against=-1)
    alpha = 1 - confidence
    exact = _is_exact(*up)
    accept, refuse = p_values(observed, margin, confidence)
    high = _upper_limit(*up, alpha)
    low = -_upper_limit(down[0], down[2], down[1], alpha)
    unit = "" if effect == 1.0 else f", {len(observed.clusters)} groups of items, design effect {effect:.2f}"
    form = ("exact" if exact else "score") + unit
    return PairedTest(counts.drop, low, high, accept, refuse, worse_p(observed), form, effect)


def p_values(observed: ClusteredCounts, margin: float, confidence: float = 0.95) -> tuple[float, float]:
    """``accept_p`` and ``refuse_p`` alone, without the bounds, which take longer."""
    effect = observed.design_effect(confidence)
    n, b, c = _effective(observed.counts, effect, against=1)
    accept = _accept_p(n, b, c, margin)
    n, b, c = _effective(observed.counts, effect, against=-1)
    return accept, _accept_p(n, c, b, -margin)


def mcnemar(losses: int, gains: int) -> float:
    """Exact one-sided McNemar test: P(Bin(losses + gains, 1/2) >= losses), the chance of so many losses among equals.

    Source: McNemar 1947, Psychometrika 12(2); exact form as in Fagerland et al. 2013.
    """
    return 1.0 - binomial_cdf(losses - 1, losses + gains, 0.5)


def worse_p(observed: ClusteredCounts) -> float:
    """McNemar's test with the cluster as the unit: clusters that lose on balance against those that gain."""
    balances = [b - c for _, b, c in observed.clusters]
    return mcnemar(
        sum(1 for balance in balances if balance > 0), sum(1 for balance in balances if balance < 0)
    )


def items_to_plan(
    flip_ratio: float, max_drop: float, confidence: float = 0.95, power: float = 0.8, drop: float = 0.0
) -> int:
    """Items for which a model with this flip rate passes with this power: (z_a + z_b)^2 f / M^2 at a true drop of 0.

    Args:
        flip_ratio: share of items whose outcome differs, either way.
        max_drop: the margin M; ``drop``: the true drop, below or above it, on which the answer shall be found.
        confidence: one-sided.
        power: chance of the right answer.
        drop: see above.

    Two corrections for what counts in whole items: n becomes n/4 (1 + sqrt(1 + 2 / (n M)))^2, and is at least what passes
    without any flip, (1 - M)^n <= 1 - confidence.

    Source: two one-sided normal tests of a paired difference; the correction as in Fleiss 1981, section 3.2. The tests
    simulate power and false acceptance.
    """
    z = normal_quantile(confidence) + normal_quantile(power)
    room = abs(max_drop - drop)
    n = z * z * max(flip_ratio - drop * drop, 0.0) / room**2
    corrected = n / 4 * (1 + math.sqrt(1 + 2 / (n * room))) ** 2 if n else 0.0
    without_flips = math.log(1 - confidence - _MISS) / math.log1p(-room)
    return math.ceil(max(corrected, without_flips))


def items_still_needed(observed: ClusteredCounts, max_drop: float, confidence: float = 0.95) -> int:
    """How many more items would likely settle it at the flip rate seen; 0 when no number would.

    Planned for no true drop (the usual case of an honest variant) and for the drop that was seen, whichever takes more; where
    both say that there are enough already, the number is what doubles the evidence. Items of clusters count less, so more of
    them are needed.
    """
    counts = observed.counts
    if counts.n == 0:
        return 1
    if max_drop in (counts.drop, 0):
        return 0  # at the margin itself, or with no room at all, no number of items decides
    flips = max(counts.only_old + counts.only_new, 1) / counts.n
    plans = [items_to_plan(flips, max_drop, confidence)]
    plans.append(items_to_plan(max(flips, abs(counts.drop)), max_drop, confidence, drop=counts.drop))
    if counts.only_old + counts.only_new == 0:
        plans = [items_to_plan(0.0, max_drop, confidence)]
    wanted = math.ceil(max(plans) * observed.design_effect(confidence))
    return wanted - counts.n if wanted > counts.n else counts.n


def _effective(counts: PairedCounts, effect: float, *, against: int) -> tuple[float, float, float]:
    """(items, losses, gains) after the design effect; whole where the exact form needs it.

    Whole numbers keep the drop, rounded against the claim, and take the nearest number of flips that goes with it.

    Args:
        counts: all items.
        effect: at least 1.
        against: 1 rounds the drop up (for the claim of no loss), -1 down.
    """
    n, b, c = counts.n / effect, counts.only_old / effect, counts.only_new / effect
    if effect == 1.0 or b + c > FEW_FLIPS or n > FEW_ITEMS:
        return n, b, c
    balance = math.ceil(b - c - _NEGLIGIBLE) if against > 0 else math.floor(b - c + _NEGLIGIBLE)
    flips = max(abs(balance), 2 * round((b + c - abs(balance)) / 2) + abs(balance))
    whole = max(math.floor(n + _NEGLIGIBLE), flips, 1)
    return whole, (flips + balance) // 2, (flips - balance) // 2


def _is_exact(n: float, b: float, c: float) -> bool:
    return b + c <= FEW_FLIPS and n <= FEW_ITEMS


def _accept_p(n: float, b: float, c: float, margin: float) -> float:
    """P-value of "the drop is at least the margin"."""
    if _is_exact(n, b, c):
        return exact_p(round(n), round(b), round(c), margin)
    return normal_cdf(tango_score(n, b, c, margin))


@lru_cache(maxsize=4096)
def exact_p(n: int, b: int, c: int, margin: float) -> float:
    """Exact unconditional p-value of "P(right to wrong) - P(wrong to right) >= margin".

    Args:
        n: items.
        b: right to wrong.
        c: wrong to right.
        margin: -1 < margin < 1.

    Source: Hsueh, Liu and Chen 2001, Biometrics 57(2), with the interval of Berger and Boos 1994.
    """
    if margin >= 1:
        return 0.0
    if margin <= -1:
        return 1.0
    extreme = tango_score(n, b, c, margin) + _NEGLIGIBLE
    least, most = max(0.0, -margin), (1 - margin) / 2
    flips = b + c
    low = (lower_bound(flips, n, 1 - _MISS / 2) - margin) / 2
    high = (upper_bound(flips, n, 1 - _MISS / 2) - margin) / 2
    low, high = min(max(low, least), most), min(max(high, least), most)
    tail = _tail(n, margin, extreme, min(n, math.ceil(n * high + 8 * math.sqrt(n * high * (1 - high))) + 8))
    steps = _NUISANCE_POINTS if high > low else 0
    points = [low + (high - low) * step / max(steps, 1) for step in range(steps + 1)]
    return min(1.0, max(_mass(n, q, margin, tail) for q in points) + _MISS)


def _tail(n: int, margin: float, extreme: float, gains: int) -> list[int]:
    """For each number of gains c up to ``gains``, the most losses b whose score is still as extreme; -1 where there is none.

    The score grows with b and falls with c, so the border only rises.
    """
    border, most = [], -1
    for c in range(gains + 1):
        while most + 1 + c <= n and tango_score(n, most + 1, c, margin) <= extreme:
            most += 1
        border.append(min(most, n - c))
    return border


def _mass(n: int, q: float, margin: float, tail: Sequence[int]) -> float:
    """Probability of the tail when gains have probability q and losses q + margin."""
    p = min(max(q + margin, 0.0), 1.0)
    conditional = min(p / (1 - q), 1.0) if q < 1 else 0.0
    total, seen, weight = 0.0, 0.0, (1 - q) ** n
    if weight < _TINY:  # the recurrence would start from nothing: far from few flips
        return math.fsum(
            (binomial_cdf(c, n, q) - binomial_cdf(c - 1, n, q)) * binomial_cdf(most, n - c, conditional)
            for c, most in enumerate(tail)
        )
    for c, most in enumerate(tail):
        if weight > _NEGLIGIBLE and most >= 0:
            total += weight * _cumulative(most, n - c, conditional)
        seen += weight
        if 1 - seen < _NEGLIGIBLE:
            break
        weight *= (n - c) / (c + 1) * q / (1 - q)
    return total


def _cumulative(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k) by recurrence: some ten times faster than by logarithms, where it does not underflow."""
    if k >= n or p <= 0.0:
        return 1.0
    weight = (1 - p) ** n
    if p >= 1.0 or weight < _TINY:
        return binomial_cdf(k, n, p)
    total, odds = weight, p / (1 - p)
    for i in range(k):
        weight *= (n - i) / (i + 1) * odds
        total += weight
    return min(total, 1.0)


def _upper_limit(n: float, b: float, c: float, alpha: float) -> float:
    """The largest drop that is not rejected at ``alpha``, to 0.0005 on the side of the claim's loss."""
    low, high = (b - c) / n, min((b - c) / n + 0.25, 1.0)
    if _accept_p(n, b, c, high) > alpha:
        low, high = high, 1.0
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (middle, high) if _accept_p(n, b, c, middle) > alpha else (low, middle)
    return high
