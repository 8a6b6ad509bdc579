"""Metrics for Prometheus, in a registry of their own (several control planes may live in one process, as in tests)."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slmops.server.ports.store import Store


class Metrics:
    """What the control plane counts; numbers about fleet and rollouts are read when they are asked for."""

    def __init__(self, store: Store) -> None:
        """Register everything."""
        self.registry = CollectorRegistry()
        self.checkins = Counter(
            "slmops_checkins",
            "Check-ins by result (unchanged, changed, or the error's code)",
            ["result"],
            registry=self.registry,
        )
        self.batches = Histogram(
            "slmops_checkin_batch_size",
            "Check-ins that shared one flush",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1024),
            registry=self.registry,
        )
        self.tick_s = Histogram(
            "slmops_worker_tick_seconds",
            "Duration of one turn of the rollout worker",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10),
            registry=self.registry,
        )
        self.tick_failures = Counter(
            "slmops_worker_tick_failures", "Turns of the rollout worker that failed", registry=self.registry
        )
        self.registry.register(_StoreCollector(store))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _StoreCollector(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        with self._store.read() as tx:
            active = [device for device in tx.devices.all() if device.retired_at is None]
            rollouts = tx.rollouts.all()
        devices = GaugeMetricFamily(
            "slmops_devices", "Active devices by phase and profile", labels=["phase", "profile"]
        )
        for (phase, profile), number in Tally((d.phase or "never_seen", d.profile) for d in active).items():
            devices.add_metric([phase, profile], number)
        yield devices
        by_phase = GaugeMetricFamily("slmops_rollouts", "Rollouts by phase", labels=["phase"])
        for phase, number in Tally(str(rollout.state.phase.value) for rollout in rollouts).items():
            by_phase.add_metric([phase], number)
        yield by_phase
        requests = GaugeMetricFamily(
            "slmops_device_requests", "Client requests answered by devices since their start"
        )
        requests.add_metric([], sum(device.requests for device in active))
        yield requests
        failed = GaugeMetricFamily(
            "slmops_device_failed_requests", "Client requests that ended in a 5xx on devices"
        )
        failed.add_metric([], sum(device.failed_requests for device in active))
        yield failed
        fetched = GaugeMetricFamily(
            "slmops_device_fetched_bytes", "Bytes that active devices fetched since enrolment"
        )
        fetched.add_metric([], sum(device.fetched_bytes for device in active))
        yield fetched
