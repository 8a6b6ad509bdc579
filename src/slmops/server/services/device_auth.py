"""Device tokens: ES256 JWTs that a device signs for itself, verified once each and remembered while they live."""

from __future__ import annotations

from typing import Any

import jwt

from slmops.core.errors import AuthError, PermissionDeniedError
from slmops.protocol.messages import DEVICE_AUDIENCE, DEVICE_TOKEN_S
from slmops.server.services.registry import Known, Registry

#: how far the clocks of device and server may be apart, seconds; devices learn the offset from every response
LEEWAY_S = 30
#: verified tokens that are remembered; two per device and life are more than enough for 50,000 devices
MAX_REMEMBERED = 100_000


class DeviceTokens:
    """Verifies and remembers device tokens."""

    def __init__(self, registry: Registry) -> None:
        """Begin with nothing remembered."""
        self._registry = registry
        self._verified: dict[str, tuple[str, float]] = {}

    def device(self, authorization: str | None, now_s: float) -> Known:
        """The device that signed this request.

        Args:
            authorization: the header.
            now_s: seconds since 1970.

        Raises:
            AuthError: no token, a wrong signature, a wrong audience, or a token that is not alive now.
            PermissionDeniedError: the device is retired.
        """
        if authorization is None or not authorization.startswith("Bearer "):
            raise AuthError(
                "a device signs each request with its key",
                hint="send Authorization: Bearer JWT; slmops agent does",
            )
        token = authorization[7:]
        found = self._verified.get(token)
        if found is None or now_s > found[1] + LEEWAY_S:
            found = self._verify(token, now_s)
            if len(self._verified) >= MAX_REMEMBERED:
                self._verified = {t: v for t, v in self._verified.items() if v[1] + LEEWAY_S >= now_s}
                if len(self._verified) >= MAX_REMEMBERED:
                    self._verified = {}
            self._verified[token] = found
        known = self._registry.get(found[0])
        if known is None:
            raise _unknown(found[0])
        if known.retired:
            raise PermissionDeniedError(
                f"device {known.device_id} is retired",
                hint="a retired identity does not come back: enrol it as a new device, in an empty folder: "
                "slmops agent enroll URL TOKEN --dir NEW_DIR",
                device=known.device_id,
            )
        return known

    def _verify(self, token: str, now_s: float) -> tuple[str, float]:
        try:
            unverified: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
            device_id = str(unverified.get("iss", ""))
            known = self._registry.get(device_id) if device_id else None
            if known is None:
                raise _unknown(device_id)
            # Times are checked below against the injected clock, not by PyJWT against its own.
            claims: dict[str, Any] = jwt.decode(
                token,
                known.key,
                algorithms=["ES256"],
                audience=DEVICE_AUDIENCE,
                options={
                    "require": ["iss", "aud", "iat", "exp"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except jwt.PyJWTError as error:
            raise AuthError(
                f"the device's token is not valid: {error}",
                hint="the key changed? enrol it as a new device, in an empty folder: "
                "slmops agent enroll URL TOKEN --dir NEW_DIR",
            ) from error
        issued_at, expires_at = float(claims["iat"]), float(claims["exp"])
        if not issued_at - LEEWAY_S <= now_s <= expires_at + LEEWAY_S:
            raise AuthError(
                f"the device's token lives from {issued_at:.0f} to {expires_at:.0f}, here it is {now_s:.0f}",
                hint="take the clock offset from the X-Slmops-Time header of this response and sign again",
                now_s=round(now_s),
            )
        if expires_at - issued_at > DEVICE_TOKEN_S:
            raise AuthError(
                f"the device's token lives {expires_at - issued_at:.0f} s, {DEVICE_TOKEN_S} are allowed",
                hint="sign shorter ones",
            )
        return device_id, expires_at


def _unknown(device_id: str) -> AuthError:
    return AuthError(
        f"device {device_id!r} is not enrolled here",
        hint="enrol it: slmops agent enroll URL TOKEN",
        device=device_id,
    )
