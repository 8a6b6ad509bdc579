"""Typed client of the control plane, for the command line and for users' scripts.

Light to import: httpx and msgspec only. Every problem document of the server comes back as the error class it was
raised as, so ``except TokenError`` works the same on both sides.
"""

from slmops.client.control_plane import ControlPlane

__all__ = ["ControlPlane"]
