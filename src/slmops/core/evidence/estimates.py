"""Estimates with their uncertainty, from clusters of observations: a threshold is judged by the interval, not by the point.

The tokens of one text, and the texts of one template, are alike, so the cluster (template, else text) is what varies: standard
errors are those of a ratio of cluster sums (Miller 2024, arXiv:2411.00640, section 2), with Student's quantile for the number of
clusters.
Divergences and perplexities are judged on the log scale, where they are nearly normal and stay positive; rates by exact binomial
bounds on the effective number of observations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slmops.core.evidence.statistics import (
    binomial_cdf,
    lower_bound,
    normal_quantile,
    student_cdf,
    student_quantile,
    upper_bound,
)

Scale = Literal["log", "rate"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure with what is needed to bound it.

    Attributes:
        value: the figure.
        clusters: independent groups of observations behind it; fewer than two bound nothing.
        scale: ``log``: positive, ``error`` is the standard error of its logarithm. ``rate``: 0..1 of ``effective`` observations.
        error: see above; unused for a rate.
        effective: observations after the design effect; unused on the log scale.
    """

    value: float
    clusters: int
    scale: Scale
    error: float = 0.0
    effective: float = 0.0

    def bounds(self, confidence: float = 0.95) -> tuple[float, float]:
        """Lower and upper bound, each one-sided at this confidence."""
        if self.clusters < 2:
            return (0.0, 1.0) if self.scale == "rate" else (0.0, math.inf)
        if self.scale == "rate":
            n, fewer, more = self._counts()
            return lower_bound(fewer, n, confidence), upper_bound(more, n, confidence)
        reach = min(student_quantile(confidence, self.clusters - 1) * self.error, 700.0)
        return self.value * math.exp(-reach), self.value * math.exp(reach)

    def at_least_p(self, threshold: float) -> float:
        """P-value of "the true figure is at least the threshold": small when it is surely below."""
        if self.clusters < 2:
            return 1.0
        if self.scale == "rate":
            n, _, more = self._counts()
            return binomial_cdf(more, n, threshold)
        return (
            self._student_p(math.log(self.value) - math.log(threshold))
            if self._on_log(threshold)
            else self._step(threshold, -1)
        )

    def at_most_p(self, threshold: float) -> float:
        """P-value of "the true figure is at most the threshold": small when it is surely above."""
        if self.clusters < 2:
            return 1.0
        if self.scale == "rate":
            n, fewer, _ = self._counts()
            return 1.0 - binomial_cdf(fewer - 1, n, threshold)
        return (
            self._student_p(math.log(threshold) - math.log(self.value))
            if self._on_log(threshold)
            else self._step(threshold, 1)
        )

    def clusters_needed(self, threshold: float, confidence: float = 0.95, power: float = 0.8) -> int:
        """How many more clusters would likely settle it if the figure stayed; 0 when it lies on the threshold."""
        if self.clusters < 2:
            return 8
        z = normal_quantile(confidence) + normal_quantile(power)
        if self.scale == "rate":
            away = self.value - threshold
            spread = math.sqrt(max(self.value * (1 - self.value), 0.25 / max(self.effective, 1)))
            wanted = (z * spread / away) ** 2 * self.clusters / max(self.effective, 1) if away else 0.0
        elif self._on_log(threshold):
            away = math.log(self.value) - math.log(threshold)
            wanted = self.clusters * (z * self.error / away) ** 2 if away else 0.0
        else:
            wanted = 0.0
        return max(math.ceil(wanted) - self.clusters, 1) if wanted else 0

    def document(self, confidence: float = 0.95) -> dict[str, Any]:
        """As JSON, bounds included (``high`` None: without bound)."""
        low, high = self.bounds(confidence)
        return {
            "value": self.value,
            "low": low,
            "high": high if math.isfinite(high) else None,
            "confidence": confidence,
            "clusters": self.clusters,
            "scale": self.scale,
            "error": self.error,
            "effective": self.effective,
        }

    @staticmethod
    def read(document: dict[str, Any]) -> Estimate:
        """The opposite of :meth:`document`."""
        return Estimate(
            float(document["value"]),
            int(document["clusters"]),
            document["scale"],
            float(document["error"]),
            float(document["effective"]),
        )

    def _counts(self) -> tuple[int, int, int]:
        """Effective observations, and successes rounded down and up: against a claim either way."""
        n = max(math.floor(self.effective + 1e-9), 1)
        successes = self.value * n
        return n, math.floor(successes + 1e-9), math.ceil(successes - 1e-9)

    def _on_log(self, threshold: float) -> bool:
        return self.value > 0 and threshold > 0 and math.isfinite(self.value) and self.error > 0

    def _step(self, threshold: float, side: int) -> float:
        """Without spread (equal models, or a threshold of 0) the point decides."""
        return 0.0 if side * (self.value - threshold) > 0 else 1.0

    def _student_p(self, distance: float) -> float:
        return student_cdf(distance / self.error, self.clusters - 1)


def mean_estimate(sums: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean over all observations and its cluster-robust standard error.

    Args:
        sums: of the observations of each cluster; ``sizes``: how many they are.
        sizes: see above.
    """
    total, clusters = sum(sizes), len(sums)
    mean = math.fsum(sums) / total
    if clusters < 2:
        return mean, 0.0
    squares = math.fsum((value - mean * size) ** 2 for value, size in zip(sums, sizes, strict=True))
    return mean, math.sqrt(squares * clusters / (clusters - 1)) / total


def rate_estimate(successes: Sequence[int], sizes: Sequence[int]) -> Estimate:
    """A rate, with the effective number of observations from the cluster-robust variance: at most all of them."""
    n, rate = sum(sizes), sum(successes) / sum(sizes)
    _, error = mean_estimate([float(value) for value in successes], sizes)
    effective = float(n)
    if 0 < rate < 1 and len(sizes) > 1 and error > 0:
        effective = min(rate * (1 - rate) / error**2, float(n))
    elif len(sizes) < n:  # no variance to be seen: as if each cluster were one observation
        effective = float(len(sizes))
    return Estimate(rate, len(sizes), "rate", effective=max(effective, 1.0))


def log_estimate(value: float, error: float, clusters: int) -> Estimate:
    """A positive figure from its standard error (not of the logarithm)."""
    return Estimate(value, clusters, "log", error / value if value > 0 else 0.0)
