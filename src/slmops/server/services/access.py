"""Who may enter: enrolment tokens for devices, tokens and sessions for operators.

Tokens carry 256 random bits and are stored as SHA-256 only; they are found by that hash and compared in constant time.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from slmops.client.records import DeviceTokenCreated
from slmops.core.errors import TokenError, UsageError
from slmops.protocol.messages import SCHEMA, EnrollRequest, EnrollResponse
from slmops.server.ports.rows import DeviceRow, EnrolmentTokenRow, OperatorTokenRow, SessionRow
from slmops.server.ports.store import Store, Transaction
from slmops.server.ports.world import Clock, Names
from slmops.server.services.words import Caller, Role, rfc3339, role_named, token_hash

OPERATOR_PREFIX = "slm_"
ENROLMENT_PREFIX = "slme_"
SESSION_S = 12 * 3600
MAX_TOKEN_S = 10 * 365 * 86_400

_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}\Z")
_LABEL_KEY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\Z")
_LABEL_VALUE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\Z")
#: labels that come from the device's identity; a label of this name would be a lie waiting to happen
RESERVED_LABELS = frozenset({"id", "profile"})


class TokenUnknownError(TokenError):
    """No such token was ever made, or it was mistyped."""

    code = "auth.token.unknown"


class TokenExpiredError(TokenError):
    """The token's time is over."""

    code = "auth.token.expired"


class TokenUsedError(TokenError):
    """The token has no uses left."""

    code = "auth.token.used"


class Access:
    """Enrolment and operators."""

    def __init__(self, store: Store, clock: Clock, names: Names) -> None:
        """Keep the ports."""
        self._store = store
        self._clock = clock
        self._names = names

    # ---- devices --------------------------------------------------------------------------------------------------

    def create_enrolment_token(
        self, caller: Caller, ttl_s: int, uses: int, labels: Mapping[str, str]
    ) -> DeviceTokenCreated:
        """A token with which ``uses`` devices may enrol within ``ttl_s`` seconds."""
        caller.require(Role.OPERATOR, "making an enrolment token")
        if not 0 < ttl_s <= MAX_TOKEN_S or not 0 < uses <= 1_000_000:
            raise UsageError(
                f"ttl_s {ttl_s} and uses {uses} must be positive", hint="ttl_s: 3600, uses: 1 is the usual"
            )
        check_labels(labels)
        now = self._clock.now()
        token = ENROLMENT_PREFIX + self._names.secret()
        expires_at = now + timedelta(seconds=ttl_s)
        row = EnrolmentTokenRow(token_hash(token), uses, 0, expires_at, dict(labels), caller.name, now)
        with self._store.write() as tx:
            tx.access.add_enrolment_token(row)
            tx.journal.audit(
                now, caller.name, "device_token.create", row.sha256[:12], {"ttl_s": ttl_s, "uses": uses}
            )
        return DeviceTokenCreated(token=token, expires_at=rfc3339(expires_at), uses=uses, labels=dict(labels))

    def enroll(self, request: EnrollRequest, tuf_root: str, poll_s: float) -> EnrollResponse:
        """Take a device in.

        A request that is repeated with the same token and key (its answer was lost) gets the same device back.

        Raises:
            TokenError: unknown, expired or used up, each with its own code.
            UsageError: name, labels or key are not valid.
        """
        if not _NAME.match(request.name):
            raise UsageError(
                f"device name {request.name!r} is not valid",
                hint="use a-z, 0-9, '.', '_', '-', at most 63 characters",
            )
        check_labels({key: value for key, value in request.labels.items() if key != "profile"})
        read_device_key(request.public_key_pem)
        now = self._clock.now()
        sha256 = token_hash(request.token)
        with self._store.write() as tx:
            token = tx.access.enrolment_token(sha256)
            if token is None or not hmac.compare_digest(token.sha256, sha256):
                raise TokenUnknownError(
                    "this enrolment token is not known here",
                    hint="copy it whole, or make one: slmops device token create",
                )
            known = tx.devices.by_enrolment(sha256, request.public_key_pem)
            if known is None:
                if token.expires_at <= now:
                    raise TokenExpiredError(
                        f"this enrolment token expired at {rfc3339(token.expires_at)}, it is {rfc3339(now)}",
                        hint="make a new one: slmops device token create",
                    )
                if not tx.access.use_enrolment_token(sha256):
                    raise TokenUsedError(
                        f"this enrolment token was for {token.uses} devices, and all of them have enrolled",
                        hint="make a new one for each device: slmops device token create",
                        uses=token.uses,
                    )
                known = DeviceRow(
                    id=_free_name(tx, request.name),
                    profile=request.profile,
                    labels={**_own_labels(request.labels), **token.labels},
                    public_key_pem=request.public_key_pem,
                    enrolment_token_sha256=sha256,
                    enrolled_at=now,
                    facts=request.facts,
                )
                tx.devices.add(known)
                tx.journal.event(now, "device.enrolled", known.id, {"profile": known.profile})
                tx.journal.audit(now, f"device:{known.id}", "device.enroll", known.id, {"token": sha256[:12]})
        return EnrollResponse(SCHEMA, known.id, tuf_root, poll_s)

    # ---- operators ------------------------------------------------------------------------------------------------

    def create_operator_token(self, actor: str, role: str, name: str, ttl_s: int | None) -> str:
        """A token for a person or a script; the only time that it is known."""
        if not _NAME.match(name):
            raise UsageError(
                f"token name {name!r} is not valid", hint="use a-z, 0-9, '.', '_', '-', at most 63 characters"
            )
        if ttl_s is not None and not 0 < ttl_s <= MAX_TOKEN_S:
            raise UsageError(f"ttl_s {ttl_s} must be positive", hint="86400 is a day")
        wanted = role_named(role)
        now = self._clock.now()
        token = OPERATOR_PREFIX + self._names.secret()
        expires_at = None if ttl_s is None else now + timedelta(seconds=ttl_s)
        with self._store.write() as tx:
            row = OperatorTokenRow(token_hash(token), name, wanted.name.lower(), now, expires_at)
            tx.access.add_operator_token(row)
            tx.journal.audit(now, actor, "operator_token.create", name, {"role": row.role})
        return token

    def operator(self, token: str) -> Caller:
        """Who holds this token.

        Raises:
            TokenError: unknown or expired.
        """
        with self._store.read() as tx:
            row = tx.access.operator_token(token_hash(token))
        return self._caller(row, token_hash(token))

    def sign_in(self, token: str) -> str:
        """Begin a browser session; the result is the cookie."""
        caller = self.operator(token)
        cookie = self._names.secret()
        now = self._clock.now()
        with self._store.write() as tx:
            row = tx.access.operator_token(token_hash(token))
            expires_at = now + timedelta(seconds=SESSION_S)
            if row is not None and row.expires_at is not None:
                expires_at = min(expires_at, row.expires_at)
            tx.access.expire_sessions(now)
            tx.access.add_session(SessionRow(token_hash(cookie), token_hash(token), expires_at))
            tx.journal.audit(now, caller.name, "session.begin", caller.name, {})
        return cookie

    def session(self, cookie: str) -> Caller:
        """Who is signed in with this cookie.

        Raises:
            TokenError: nobody, or not any more.
        """
        with self._store.read() as tx:
            session = tx.access.session(token_hash(cookie))
            row = None if session is None else tx.access.operator_token(session.token_sha256)
        if session is None or session.expires_at <= self._clock.now():
            raise TokenExpiredError("you are not signed in any more", hint="sign in again with your token")
        return self._caller(row, session.token_sha256)

    def sign_out(self, cookie: str) -> None:
        """End a session."""
        with self._store.write() as tx:
            tx.access.end_session(token_hash(cookie))

    def _caller(self, row: OperatorTokenRow | None, sha256: str) -> Caller:
        if row is None or not hmac.compare_digest(row.sha256, sha256):
            raise TokenUnknownError(
                "this operator token is not known here",
                hint="make one on the server: slmops server token create",
            )
        if row.expires_at is not None and row.expires_at <= self._clock.now():
            raise TokenExpiredError(
                f"this operator token expired at {rfc3339(row.expires_at)}",
                hint="make a new one on the server: slmops server token create",
            )
        return Caller(row.name, role_named(row.role))


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that no selector could name.

    Raises:
        UsageError: a key or value is not of the selectors' grammar, or the key is reserved.
    """
    for key, value in labels.items():
        if key in RESERVED_LABELS:
            raise UsageError(f"label {key!r} is set by slmops itself", hint="choose another key")
        if not _LABEL_KEY.match(key) or not _LABEL_VALUE.match(value):
            raise UsageError(
                f"label {key!r}: {value!r} is not valid",
                hint="use letters, digits, '.', '_', '/', '-', at most 63 characters, for example site: hki",
            )


def read_device_key(pem: str) -> ec.EllipticCurvePublicKey:
    """A device's public key.

    Raises:
        UsageError: it is not a P-256 public key in PEM.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"device key cannot be read: {error}", hint="send a P-256 public key in PEM"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("device key is not on the curve P-256", hint="send a P-256 public key in PEM")
    return key


def _own_labels(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key not in RESERVED_LABELS}


def _free_name(tx: Transaction, wished: str) -> str:
    taken = tx.devices.ids_with_prefix(wished)
    if wished not in taken:
        return wished
    number = 2
    while f"{wished}-{number}" in taken:
        number += 1
    return f"{wished}-{number}"


def relabelled(device: DeviceRow, changes: Mapping[str, str | None]) -> DeviceRow:
    """A device with labels set and (None) removed."""
    check_labels({key: value for key, value in changes.items() if value is not None})
    labels = {**device.labels, **{key: value for key, value in changes.items() if value is not None}}
    for key, value in changes.items():
        if value is None:
            labels.pop(key, None)
    return replace(device, labels=labels)
