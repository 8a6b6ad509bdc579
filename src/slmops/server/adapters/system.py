"""The real clock and real chance."""

from __future__ import annotations

import random
import secrets
from datetime import datetime, timezone


class SystemClock:
    """``Clock`` of this machine."""

    def now(self) -> datetime:
        """UTC-aware."""
        return datetime.now(timezone.utc)


class RandomNames:
    """``Names`` from the operating system's generator."""

    def rollout_id(self) -> str:
        """Short enough to type: ``r-`` and ten characters without look-alikes."""
        return "r-" + "".join(secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(10))

    def secret(self) -> str:
        """256 unguessable bits, URL-safe."""
        return secrets.token_urlsafe(32)

    def jitter(self) -> float:
        """Uniform in 0..1; spreads polls, so it need not be unguessable."""
        return random.random()
