"""What the device's logic needs from the outside world."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from slmops.core.device.fit import ModelShape
from slmops.protocol.messages import CheckinRequest, CheckinResponse, EnrollRequest, EnrollResponse

__all__ = ["Clock", "ControlPlane", "ModelShape"]


class ControlPlane(Protocol):
    """The control plane as a device sees it. Only ``SlmopsError`` leaves these calls."""

    async def enroll(self, request: EnrollRequest) -> EnrollResponse:
        """Exchange a token for an identity."""
        ...

    async def checkin(self, request: CheckinRequest) -> tuple[CheckinResponse | None, float | None]:
        """Report; returns the response (None when unchanged) and the wished seconds to the next check-in."""
        ...

    async def fetch_chunk(self, sha256: str, size_bytes: int) -> bytes:
        """Fetch one chunk or small file; the caller checks nothing, the digest is verified inside."""
        ...

    def fetch_metadata(self, name: str, max_bytes: int) -> bytes | None:
        """Fetch a TUF metadata file (blocking: python-tuf's client runs in a thread); None when there is none."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class Clock(Protocol):
    """Time, as an argument."""

    def now(self) -> datetime:
        """UTC, corrected by the control plane's clock where that is known."""
        ...
