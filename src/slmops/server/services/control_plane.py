"""All services of one control plane, for the surfaces to call."""

from __future__ import annotations

from dataclasses import dataclass

from slmops.server.ports.store import Store
from slmops.server.ports.world import ChunkStore, Clock
from slmops.server.services.access import Access
from slmops.server.services.blueprints import Blueprints
from slmops.server.services.catalogue import Catalogue
from slmops.server.services.checkins import Checkins
from slmops.server.services.device_auth import DeviceTokens
from slmops.server.services.fleet import Fleet
from slmops.server.services.publication import Publication
from slmops.server.services.registry import Registry
from slmops.server.services.rollout_views import RolloutViews
from slmops.server.services.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a surface may use.

    Attributes:
        poll_s: how often devices check in.
    """

    store: Store
    chunks: ChunkStore
    clock: Clock
    access: Access
    registry: Registry
    device_tokens: DeviceTokens
    checkins: Checkins
    publication: Publication
    catalogue: Catalogue
    fleet: Fleet
    blueprints: Blueprints
    rollouts: Rollouts
    rollout_views: RolloutViews
    poll_s: float
