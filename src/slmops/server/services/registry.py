"""What every check-in needs, in memory: keys, sequence numbers and current orders of all devices.

The database stays the truth: the registry is filled from it at the start and told about every change after its commit.
Only ``seq`` and its companions run ahead of it, between a check-in's arrival and its flush.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from slmops.protocol.messages import Assignment
from slmops.server.ports.rows import DeviceRow
from slmops.server.ports.store import Store
from slmops.server.services.access import read_device_key


@dataclass(slots=True)
class Known:
    """One device as the check-in route sees it."""

    device_id: str
    key: EllipticCurvePublicKey
    retired: bool
    boot_id: str
    seq: int
    content_sha256: str
    delivered_generation: int
    order: Assignment | None


class Registry:
    """All devices by id."""

    def __init__(self, store: Store) -> None:
        """Fill it."""
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        with store.read() as tx:
            for device in tx.devices.all():
                self._known[device.id] = _known(device)

    def get(self, device_id: str) -> Known | None:
        """A device; one that another process enrolled is looked up."""
        known = self._known.get(device_id)
        if known is None:
            self.refresh((device_id,))
            known = self._known.get(device_id)
        return known

    def refresh(self, device_ids: Iterable[str]) -> None:
        """Take over what a committed transaction changed: orders, retirement, new devices."""
        ids = tuple(device_ids)
        with self._lock, self._store.read() as tx:
            for device in tx.devices.all(ids):
                known = self._known.get(device.id)
                if known is None:
                    self._known[device.id] = _known(device)
                else:
                    known.retired = device.retired_at is not None
                    known.order = device.assignment

    def forget(self, device_id: str) -> None:
        """Drop a device whose check-in could not be written: the database is asked again."""
        with self._lock:
            self._known.pop(device_id, None)


def _known(device: DeviceRow) -> Known:
    return Known(
        device_id=device.id,
        key=read_device_key(device.public_key_pem),
        retired=device.retired_at is not None,
        boot_id=device.boot_id,
        seq=device.seq,
        content_sha256=device.content_sha256,
        delivered_generation=device.delivered_generation,
        order=device.assignment,
    )
