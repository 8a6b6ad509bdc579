"""HTTP to the control plane: signed by the device key, every failure one of our errors, every byte checked.

The device's clock may be wrong by years. Each response carries the server's time, so tokens are issued in the server's
time; a token that was refused for its age is issued again once after learning the offset.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from slmops.artifact.digest import UNREADABLE_JSON, require_digest
from slmops.core.errors import (
    AuthError,
    BusyError,
    ConflictError,
    DeadlineError,
    DigestError,
    NetworkError,
    NotFoundError,
    SlmopsError,
    TokenError,
    TransientError,
    TrustError,
    UsageError,
    VersionMismatchError,
)
from slmops.protocol.messages import (
    DEVICE_AUDIENCE,
    DEVICE_TOKEN_S,
    PROTOCOL_HEADER,
    SCHEMA,
    TIME_HEADER,
    CheckinRequest,
    CheckinResponse,
    EnrollRequest,
    EnrollResponse,
    Problem,
    decode,
    encode,
)

_TIMEOUT = httpx.Timeout(connect=10.0, read=30.0, write=30.0, pool=30.0)
#: a token is used for this long before the next one is signed (its life is longer, for clocks that drift)
_TOKEN_REUSE_S = DEVICE_TOKEN_S / 2


class ServerClock:
    """This machine's clock plus the offset learned from the control plane."""

    def __init__(self) -> None:
        """Start with the machine's own time."""
        self.offset = timedelta(0)

    def now(self) -> datetime:
        """UTC."""
        return datetime.now(timezone.utc) + self.offset

    def learn(self, header: str | None) -> None:
        """Take the server's time from a response header; ignores what it cannot read."""
        if not header:
            return
        try:
            theirs = datetime.fromisoformat(header.replace("Z", "+00:00"))
        except ValueError:
            return
        if theirs.tzinfo is not None:
            self.offset = theirs - datetime.now(timezone.utc)


class HttpControlPlane:
    """The control plane over HTTP; see ``agent.ports.ControlPlane``."""

    def __init__(
        self,
        base_url: str,
        *,
        device_id: str = "",
        key_pem: bytes | None = None,
        clock: ServerClock | None = None,
    ) -> None:
        """Make a client.

        Args:
            base_url: of the control plane.
            device_id: empty before enrolment.
            key_pem: the device's private key; None before enrolment.
            clock: learns the server's time.
        """
        self._base_url = base_url.rstrip("/")
        self._device_id = device_id
        self._key: Any = load_pem_private_key(key_pem, password=None) if key_pem else None
        self.clock = clock or ServerClock()
        headers = {PROTOCOL_HEADER: str(SCHEMA), "Content-Type": "application/json"}
        self._client = httpx.AsyncClient(
            base_url=self._base_url, timeout=_TIMEOUT, headers=headers, trust_env=False
        )
        self._token = ""
        self._token_until = datetime.min.replace(tzinfo=timezone.utc)

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def enroll(self, request: EnrollRequest) -> EnrollResponse:
        """Exchange a token for an identity."""
        response = await self._send("POST", "/v1/enroll", encode(request), signed=False)
        return decode(response.content, EnrollResponse)

    async def checkin(self, request: CheckinRequest) -> tuple[CheckinResponse | None, float | None]:
        """Report; see the port."""
        body = encode(request)
        try:
            response = await self._send("POST", "/v1/checkin", body, signed=True)
        except AuthError:
            if self._token_until == datetime.min.replace(tzinfo=timezone.utc):
                raise
            self._token_until = datetime.min.replace(
                tzinfo=timezone.utc
            )  # the offset was just learned: sign anew, once
            response = await self._send("POST", "/v1/checkin", body, signed=True)
        retry_after = _seconds(response.headers.get("Retry-After"))
        if response.status_code == httpx.codes.NO_CONTENT:
            return None, retry_after
        answer = decode(response.content, CheckinResponse)
        return answer, answer.poll_s

    async def fetch_chunk(self, sha256: str, size_bytes: int) -> bytes:
        """Fetch a chunk; refuses more bytes than announced while they arrive (endless data)."""
        parts: list[bytes] = []
        received = 0
        try:
            async with self._client.stream("GET", f"/v1/chunks/sha256/{sha256}") as response:
                self.clock.learn(response.headers.get(TIME_HEADER))
                if response.status_code != httpx.codes.OK:
                    raise problem_error(
                        response.status_code,
                        await _read_some(response),
                        f"chunk {sha256[:12]}",
                        response.headers,
                    )
                async for part in response.aiter_bytes():
                    received += len(part)
                    if received > size_bytes:
                        raise DigestError(
                            f"chunk {sha256[:12]}: more than the announced {size_bytes} bytes arrived",
                            hint="the server or something before it is not serving what was signed",
                        )
                    parts.append(part)
        except httpx.TimeoutException as error:
            raise DeadlineError(
                f"chunk {sha256[:12]}: {self._base_url} stopped sending", hint="retried by itself"
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        content = b"".join(parts)
        require_digest(content, sha256, f"chunk {sha256[:12]} from {self._base_url}")
        return content

    def fetch_metadata(self, name: str, max_bytes: int) -> bytes | None:
        """Fetch a TUF file, blocking."""
        try:
            with (
                httpx.Client(base_url=self._base_url, timeout=_TIMEOUT, trust_env=False) as client,
                client.stream("GET", f"/v1/tuf/{name}") as response,
            ):
                if response.status_code == httpx.codes.NOT_FOUND:
                    return None
                content = b""
                for part in response.iter_bytes():
                    content += part
                    if len(content) > max_bytes:
                        raise TrustError(
                            f"{name}: more than {max_bytes} bytes arrived",
                            hint="the server is not serving TUF metadata",
                        )
                if response.status_code != httpx.codes.OK:
                    raise problem_error(response.status_code, content, name, response.headers)
                return content
        except httpx.TimeoutException as error:
            raise DeadlineError(
                f"{name}: {self._base_url} stopped sending", hint="retried by itself"
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _send(self, method: str, path: str, body: bytes, *, signed: bool) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._bearer()}"} if signed else {}
        try:
            response = await self._client.request(method, path, content=body, headers=headers)
        except httpx.TimeoutException as error:
            raise DeadlineError(
                f"{self._base_url}{path} did not answer in time", hint="retried by itself"
            ) from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self.clock.learn(response.headers.get(TIME_HEADER))
        if response.status_code >= httpx.codes.BAD_REQUEST:
            raise problem_error(response.status_code, response.content, path, response.headers)
        return response

    def _bearer(self) -> str:
        now = self.clock.now()
        if now >= self._token_until or self._token_until - now > timedelta(seconds=DEVICE_TOKEN_S):
            claims = {
                "iss": self._device_id,
                "aud": DEVICE_AUDIENCE,
                "iat": int(now.timestamp()),
                "exp": int(now.timestamp()) + DEVICE_TOKEN_S,
            }
            self._token = jwt.encode(claims, self._key, algorithm="ES256")
            self._token_until = now + timedelta(seconds=_TOKEN_REUSE_S)
        return self._token

    def _unreachable(self, error: Exception) -> NetworkError:
        reason = str(error) or type(error).__name__
        return NetworkError(
            f"cannot reach the control plane at {self._base_url}: {reason}",
            hint="check the URL, and that 'slmops server run' is up",
        )


async def _read_some(response: httpx.Response) -> bytes:
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > 64 << 10:
            break
    return content


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:
        return None


_BY_STATUS: dict[int, type[SlmopsError]] = {
    401: AuthError,
    403: AuthError,
    404: NotFoundError,
    409: ConflictError,
    426: VersionMismatchError,
    429: BusyError,
}


def problem_error(status: int, body: bytes, what: str, headers: httpx.Headers) -> SlmopsError:
    """The error behind a response: by its problem document where there is one, else by its status."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except UNREADABLE_JSON:
        problem = Problem("about:blank", "", status, f"{what}: the server answered {status}", "")
    kind: type[SlmopsError] = _BY_STATUS.get(status, TransientError if status >= 500 else UsageError)
    if problem.code.startswith(TokenError.code):
        kind = TokenError
    fields: dict[str, Any] = {k: v for k, v in problem.fields.items() if k not in ("message", "hint")}
    retry_after = _seconds(headers.get("Retry-After"))
    if retry_after is not None:
        fields["retry_after_s"] = retry_after
    return kind(
        problem.detail or problem.title or f"{what}: status {status}",
        hint=problem.hint or "see the control plane's log",
        **fields,
    )
