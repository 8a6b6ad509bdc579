"""Counts and durations of served requests, in Prometheus' terms. No label can hold anything that a client sent.

Names and buckets follow OpenTelemetry's GenAI conventions (``gen_ai.server.*``), with wider tails for slow devices.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_DURATION = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
    163.84,
    327.68,
)
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)


class Measures:
    """One device's figures."""

    def __init__(self) -> None:
        """Start at zero, in a registry of our own."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slmops_requests",
            "Requests answered, by route and status class.",
            ["route", "status"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From request to last byte.",
            ["route"],
            buckets=_DURATION,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From request to first streamed byte.",
            buckets=_TTFT,
            registry=self.registry,
        )
        self.restarts = Gauge(
            "slmops_engine_restarts", "Engines that died and were started again.", registry=self.registry
        )
        self.phase = Gauge(
            "slmops_device_phase",
            "1 for the phase that the device machine is in.",
            ["phase"],
            registry=self.registry,
        )
        self.answered = 0
        self.failed = 0

    def count(self, route: str, status: int, seconds: float) -> None:
        """Note one finished request."""
        self.requests.labels(route, f"{status // 100}xx").inc()
        self.duration.labels(route).observe(seconds)
        self.answered += 1
        if status >= 500:
            self.failed += 1

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
