"""Exact small-sample statistics, in the standard library alone.

Fleets and evaluation sets are small here (5 to 500 devices, 50 to 2,000 items), so the forms are the exact
ones: binomial tails are summed, intervals are inverted by bisection. An observation is a device or an item,
    never a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def _tango_limit(counts: PairedCounts, z: float) -> float:
    """The drop at which Tango's score statistic equals -z (upper limit for z > 0)."""
    n, b, c = counts.n, counts.only_old, counts.only_new

    def statistic(delta: float) -> float:
        # Score test of H: p_old - p_new = delta, with the constrained estimate of the discordant probability.
        quad_b = -b - c + (2 * n - b + c) * delta
        quad_c = -c * delta * (1 - delta)
        q21 = (math.sqrt(max(quad_b * quad_b - 8 * n * quad_c, 0.0)) - quad_b) / (4 * n)
        variance = n * (2 * q21 + delta * (1 - delta))
        difference = b - c - n * delta
        if variance <= 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(variance)

    low, high = -1.0, 1.0
    for _ in range(60):  # the statistic falls as delta grows
        middle = (low + high) / 2
        if statistic(middle) > -z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def items_needed(counts: PairedCounts, max_drop: float, confidence: float = 0.95) -> int:
    """How many more items would settle a paired comparison if the rates stayed; 0 if none would help.

    Uses the normal approximation of the discordant pairs, so it is a planning figure, not a promise.
    """
    if counts.n == 0:
        return 1
    margin = max_drop - counts.drop
    if margin == 0:
        return 0
    discordant = max(counts.only_old + counts.only_new, 1) / counts.n
    needed = math.ceil(
        (normal_quantile(confidence) ** 2) * max(discordant - counts.drop**2, 1 / counts.n) / margin**2
    )
    return max(needed - counts.n, 1)


def normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution function."""
    from statistics import NormalDist  # noqa: PLC0415 - pure standard library, kept beside its only use

    return NormalDist().inv_cdf(p)


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
