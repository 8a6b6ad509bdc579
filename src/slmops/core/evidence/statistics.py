"""Exact small-sample statistics, in the standard library alone.

Fleets and evaluation sets are small here (5 to 500 devices, 50 to 2,000 items), so the forms are the exact
ones: binomial tails are summed, intervals are inverted by bisection. An observation is a device or an item,
    never a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_LARGEST_LOG = math.log(1e300)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p), summed in log space."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    return min(
        1.0, math.fsum(math.exp(_log_choose(n, i) + i * log_p + (n - i) * log_q) for i in range(k + 1))
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def upper_bound(failures: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound on a rate: 0 of 10 proves no more than 0.26.

    Args:
        failures: observed failures.
        n: observations; 0 bounds nothing and returns 1.
        confidence: one-sided.

    Source: Clopper and Pearson 1934, Biometrika 26(4).
    """
    if n == 0 or failures >= n:
        return 1.0
    low, high = failures / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_cdf(failures, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def lower_bound(successes: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson lower bound on a rate."""
    return 1.0 - upper_bound(n - successes, n, confidence)


def failure_e_value(failures: int, n: int, p0: float, p1: float) -> float:
    """Evidence against "the failure rate is at most p0", valid however often it is looked at.

    A mixture of likelihood ratios over alternatives from p1 upwards. Each ratio is a test martingale under p0
    and a supermartingale under any smaller rate, and so is their mean: by Ville's inequality the chance that
    it ever reaches 1/alpha while the rate is at most p0 is at most alpha. ``reference``: Ramdas et al. 2023,
    arXiv:2210.01948, section 2.

    Args:
        failures: failed devices so far.
        n: settled devices so far.
        p0: tolerated failure rate, 0 < p0 < p1 < 1.
        p1: the smallest rate worth stopping for.

    Returns:
        The e-value, at most 1e300: a large fleet that fails entirely must not overflow into an error.
    """
    alternatives = [p1, *(p for p in ((p1 + 0.5) / 2, 0.5, 0.9) if p > p1)]
    logs = [failures * math.log(p / p0) + (n - failures) * math.log((1 - p) / (1 - p0)) for p in alternatives]
    largest = max(logs)
    log_mean = largest + math.log(math.fsum(math.exp(log - largest) for log in logs) / len(logs))
    return math.exp(min(log_mean, _LARGEST_LOG))


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Outcomes of the same items under an old and a new model."""

    both: int
    only_old: int
    only_new: int
    neither: int

    @property
    def n(self) -> int:
        """Items."""
        return self.both + self.only_old + self.only_new + self.neither

    @property
    def drop(self) -> float:
        """Old rate minus new rate, absolute; positive is a loss."""
        return (self.only_old - self.only_new) / self.n if self.n else 0.0

    @staticmethod
    def of(old: Sequence[bool], new: Sequence[bool]) -> PairedCounts:
        """Count two equally long outcome lists."""
        pairs = list(zip(old, new, strict=True))
        return PairedCounts(
            sum(o and n for o, n in pairs),
            sum(o and not n for o, n in pairs),
            sum(n and not o for o, n in pairs),
            sum(not o and not n for o, n in pairs),
        )


def paired_drop_bounds(counts: PairedCounts, confidence: float = 0.95) -> tuple[float, float]:
    """One-sided lower and upper confidence bounds of the paired drop (old rate minus new rate).

    Tango's score interval, which keeps its level at small n and at zero discordant pairs where Wald's
    collapses to a point. Found by bisection on the score statistic.

    Source: Tango 1998, Statistics in Medicine 17(8), 891-908.

    Args:
        counts: paired outcomes.
        confidence: one-sided.
    """
    if counts.n == 0:
        return -1.0, 1.0
    z = normal_quantile(confidence)
    return _tango_limit(counts, -z), _tango_limit(counts, z)


def tango_score(n: float, losses: float, gains: float, delta: float) -> float:
    """Score of "P(loss) - P(gain) is delta", with the constrained estimate of the flips' probability.

    Negative when fewer were lost than delta says; standard normal for large n. Counts need not be whole (design effects).

    Source: Tango 1998, Statistics in Medicine 17(8), 891-908.
    """
    quad_b = -losses - gains + (2 * n - losses + gains) * delta
    quad_c = -gains * delta * (1 - delta)
    q21 = (math.sqrt(max(quad_b * quad_b - 8 * n * quad_c, 0.0)) - quad_b) / (4 * n)
    variance = n * (2 * q21 + delta * (1 - delta))
    difference = losses - gains - n * delta
    if variance <= 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def _tango_limit(counts: PairedCounts, z: float) -> float:
    """The drop at which Tango's score statistic equals -z (upper limit for z > 0)."""
    n, b, c = counts.n, counts.only_old, counts.only_new
    low, high = -1.0, 1.0
    for _ in range(60):  # the statistic falls as delta grows
        middle = (low + high) / 2
        if tango_score(n, b, c, middle) > -z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


_NORMAL = NormalDist()


def normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution function."""
    return _NORMAL.inv_cdf(p)


def normal_cdf(z: float) -> float:
    """The standard normal distribution function, also of an infinite score."""
    return 0.0 if z == -math.inf else 1.0 if z == math.inf else _NORMAL.cdf(z)


def student_cdf(t: float, freedom: int) -> float:
    """Distribution function of Student's t, by the finite sums for whole degrees of freedom.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    angle = math.atan2(t, math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term = total = math.cos(angle) if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        two_sided = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        two_sided = sine * total
    return (1 + two_sided) / 2


def student_quantile(p: float, freedom: int) -> float:
    """Inverse of :func:`student_cdf`, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: rejecting those at most alpha errs anywhere with chance alpha at most.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def median(values: Sequence[float]) -> float:
    """Middle value; the mean of the two middle ones for an even count."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_bounds(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free one-sided bounds of a median from order statistics; infinite where n is too small.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, n = sorted(values), len(values)
    k = -1
    while binomial_cdf(k + 1, n, 0.5) <= 1 - confidence:
        k += 1
    if k < 0:
        return -math.inf, math.inf
    return ordered[k], ordered[n - 1 - k]
