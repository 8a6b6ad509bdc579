"""The complete walks, made once for all tests of a run."""

from __future__ import annotations

from itertools import product

import pytest
from machine_walks import (
    BAKE_MAX_S,
    BAKE_MIN_S,
    WAVES,
    DeviceEdge,
    RolloutEdge,
    walk_device,
    walk_rollout,
)

from slmops.core.rollout.machine import Policy


@pytest.fixture(scope="session")
def device_edges() -> list[DeviceEdge]:
    """Every event in every reachable state of a device."""
    return walk_device()


@pytest.fixture(scope="session")
def rollout_edges() -> list[tuple[Policy, RolloutEdge]]:
    """Every event in every reachable state of a rollout, for every kind of policy."""
    policies = [
        Policy(WAVES, approvals, BAKE_MIN_S, BAKE_MAX_S, on_abort)
        for approvals, on_abort in product((0, 1, 2), ("hold", "revert_uncommitted", "revert_all"))
    ]
    return [(policy, edge) for policy in policies for edge in walk_rollout(policy)]
