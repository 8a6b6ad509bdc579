"""The control plane's operator API as methods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from slmops.artifact.digest import UNREADABLE_JSON, is_digest
from slmops.client.problems import error_from
from slmops.client.records import (
    AuditRecord,
    BlueprintApplied,
    BlueprintPlan,
    BlueprintRecord,
    DeviceDetail,
    DeviceRecord,
    DeviceTokenCreated,
    EventRecord,
    FleetSummary,
    Promotion,
    ReleaseDetail,
    ReleaseRecord,
    RolloutDetail,
    RolloutRecord,
)
from slmops.core.errors import NetworkError, NotFoundError, UsageError, VersionMismatchError
from slmops.protocol.messages import PROTOCOL_HEADER, SCHEMA

Answer = TypeVar("Answer")

#: digests asked about in one request of :meth:`ControlPlane.missing_blobs`
_MISSING_BATCH = 5_000
_REFERENCE = re.compile(r"^(?P<model>[^@/]+)@(?P<version>[^/]+)\Z")


class ControlPlane:
    """A connection to one control plane.

    Errors are those of ``slmops.core.errors``: the server's own (by its problem document), NetworkError when it cannot
    be reached, VersionMismatchError when it speaks another protocol.

    Args:
        base_url: for example ``http://127.0.0.1:8420``.
        token: operator token (``slm_...``); empty for what needs none.
        timeout_s: for each step of a request, seconds.
        verify: CA bundle or False, as httpx takes it.
        transport: an httpx transport, for tests.
    """

    def __init__(
        self,
        base_url: str,
        token: str = "",
        *,
        timeout_s: float = 30.0,
        verify: str | bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Open nothing yet: the first call connects."""
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"server address {base_url!r} is not a URL", hint="write http://127.0.0.1:8420")
        headers = {PROTOCOL_HEADER: str(SCHEMA), "User-Agent": "slmops-client"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.base_url = base_url.rstrip("/")
        # trust_env=False: an HTTP_PROXY meant for the internet must not carry an operator token to it.
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=timeout_s,
            verify=verify,
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> ControlPlane:
        """Use as a context to close the connections."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ---- devices --------------------------------------------------------------------------------------------------

    def fleet(self) -> FleetSummary:
        """The fleet in numbers."""
        return self._get("/v1/fleet", FleetSummary)

    def devices(self, selector: str = "", *, retired: bool = False) -> list[DeviceRecord]:
        """Devices that a label selector matches, by name; retired ones only when asked for."""
        return self._get(
            "/v1/devices", list[DeviceRecord], {"selector": selector, "retired": str(retired).lower()}
        )

    def device(self, device_id: str) -> DeviceDetail:
        """One device with its history of outcomes."""
        return self._get(f"/v1/devices/{_part(device_id)}", DeviceDetail)

    def set_labels(self, device_id: str, labels: Mapping[str, str | None]) -> DeviceRecord:
        """Set labels of a device; None removes one; the others stay."""
        return self._send(
            "PATCH", f"/v1/devices/{_part(device_id)}/labels", DeviceRecord, {"labels": dict(labels)}
        )

    def retire(self, device_id: str) -> DeviceRecord:
        """Refuse this device from now on; its history stays."""
        return self._send("POST", f"/v1/devices/{_part(device_id)}/retire", DeviceRecord, {})

    def create_device_token(
        self, ttl_s: int = 3600, uses: int = 1, labels: Mapping[str, str] | None = None
    ) -> DeviceTokenCreated:
        """A token with which ``uses`` devices may enrol within ``ttl_s`` seconds; they get ``labels``."""
        return self._send(
            "POST",
            "/v1/device-tokens",
            DeviceTokenCreated,
            {"ttl_s": ttl_s, "uses": uses, "labels": dict(labels or {})},
        )

    # ---- blobs and releases ---------------------------------------------------------------------------------------

    def missing_blobs(self, digests: Sequence[str]) -> list[str]:
        """Those of the digests that the control plane does not have yet, in the order asked."""
        missing: list[str] = []
        for begin in range(0, len(digests), _MISSING_BATCH):
            batch = list(digests[begin : begin + _MISSING_BATCH])
            answer = self._send("POST", "/v1/blobs/missing", dict[str, list[str]], {"sha256": batch})
            missing.extend(answer["missing"])
        return missing

    def put_blob(self, sha256: str, content: bytes | memoryview) -> None:
        """Upload a blob under its digest; repeating it is safe.

        Raises:
            DigestError: the bytes do not hash to the name.
            NoSpaceError: the server's disk is full; nothing was kept.
        """
        self._request(
            "PUT",
            f"/v1/blobs/sha256/{_part(sha256)}",
            content=bytes(content),
            headers={"Content-Type": "application/octet-stream"},
        )

    def blob(self, sha256: str) -> bytes:
        """Fetch a blob; the caller verifies it."""
        return self._request("GET", f"/v1/chunks/sha256/{_part(sha256)}").content

    def tuf_file(self, name: str) -> bytes:
        """Signed metadata: ``timestamp.json``, ``3.snapshot.json``, ``2.targets.json``, ``1.root.json``."""
        return self._request("GET", f"/v1/tuf/{_part(name)}").content

    def published_targets(self) -> bytes:
        """The targets metadata that is published now; a new release is added to these bytes and signed.

        Follows timestamp and snapshot without checking signatures: the server checks what comes back, and devices check
        everything.
        """
        timestamp = msgspec.json.decode(self.tuf_file("timestamp.json"))
        snapshot_version = timestamp["signed"]["meta"]["snapshot.json"]["version"]
        snapshot = msgspec.json.decode(self.tuf_file(f"{snapshot_version}.snapshot.json"))
        return self.tuf_file(f"{snapshot['signed']['meta']['targets.json']['version']}.targets.json")

    def publish_release(self, target_path: str, targets: bytes | str, manifest: bytes | str) -> ReleaseRecord:
        """Publish a signed release whose blobs are all uploaded.

        Args:
            target_path: as in the targets metadata.
            targets: the new targets metadata, signed by the release keys.
            manifest: canonical bytes of the release manifest.
        """
        body = {"target_path": target_path, "targets": _text(targets), "manifest": _text(manifest)}
        return self._send("POST", "/v1/releases", ReleaseRecord, body)

    def releases(self, model: str = "") -> list[ReleaseRecord]:
        """Published releases, newest first."""
        return self._get("/v1/releases", list[ReleaseRecord], {"model": model} if model else None)

    def release(self, reference: str) -> ReleaseDetail:
        """One release with variants and evidence.

        Args:
            reference: ``model@version``, or the release digest or an unambiguous beginning of it.
        """
        model, version = self._resolve(reference)
        return self._get(f"/v1/releases/{_part(model)}/{_part(version)}", ReleaseDetail)

    def promote(self, reference: str, channel: str) -> Promotion:
        """Point a channel at a release; each blueprint that follows the channel begins a rollout."""
        model, version = self._resolve(reference)
        return self._send(
            "POST", f"/v1/releases/{_part(model)}/{_part(version)}/promote", Promotion, {"channel": channel}
        )

    # ---- blueprints -----------------------------------------------------------------------------------------------

    def plan_blueprint(self, source: str, source_name: str = "blueprint.yaml") -> BlueprintPlan:
        """What applying this text would do; changes nothing. ``source_name`` is for error messages."""
        return self._send(
            "POST", "/v1/blueprints/plan", BlueprintPlan, {"source": source, "source_name": source_name}
        )

    def apply_blueprint(self, source: str, source_name: str = "blueprint.yaml") -> BlueprintApplied:
        """Declare the state of a cohort; begins a rollout when that changes anything."""
        return self._send(
            "POST", "/v1/blueprints", BlueprintApplied, {"source": source, "source_name": source_name}
        )

    def blueprints(self) -> list[BlueprintRecord]:
        """The current revision of each blueprint."""
        return self._get("/v1/blueprints", list[BlueprintRecord])

    def blueprint(self, name: str) -> BlueprintRecord:
        """The current revision of one blueprint."""
        return self._get(f"/v1/blueprints/{_part(name)}", BlueprintRecord)

    def blueprint_history(self, name: str) -> list[BlueprintRecord]:
        """All revisions of a blueprint, newest first."""
        return self._get(f"/v1/blueprints/{_part(name)}/history", list[BlueprintRecord])

    # ---- rollouts -------------------------------------------------------------------------------------------------

    def rollouts(self) -> list[RolloutRecord]:
        """All rollouts, newest first."""
        return self._get("/v1/rollouts", list[RolloutRecord])

    def rollout(self, rollout_id: str) -> RolloutDetail:
        """One rollout with its waves, devices and the last judgement."""
        return self._get(f"/v1/rollouts/{_part(rollout_id)}", RolloutDetail)

    def rollout_action(self, rollout_id: str, action: str, reason: str = "") -> RolloutRecord:
        """Act on a rollout: approve, reject, pause, resume, abort or rollback."""
        return self._send(
            "POST", f"/v1/rollouts/{_part(rollout_id)}/{_part(action)}", RolloutRecord, {"reason": reason}
        )

    # ---- what happened --------------------------------------------------------------------------------------------

    def audit(self, limit: int = 100) -> list[AuditRecord]:
        """The latest entries of the audit trail, newest first."""
        return self._get("/v1/audit", list[AuditRecord], {"limit": str(limit)})

    def events(self, *, after: int | None = None) -> Iterator[EventRecord]:
        """Events as they happen, until the server goes away (NetworkError) or the caller stops.

        Args:
            after: id of the last event seen; None for new ones only.
        """
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
        # The server sends a comment every 15 s: a longer silence means that it is gone.
        timeout = httpx.Timeout(30.0, read=60.0)
        try:
            with self._http.stream("GET", "/v1/events", headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield msgspec.json.decode(line[6:].encode(), type=EventRecord)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    # ---- how ------------------------------------------------------------------------------------------------------

    def _resolve(self, reference: str) -> tuple[str, str]:
        match = _REFERENCE.match(reference)
        if match is not None:
            return match["model"], match["version"]
        digest = reference.removeprefix("sha256:")
        if not re.fullmatch(r"[0-9a-f]{6,64}", digest):
            raise UsageError(
                f"release {reference!r} cannot be read",
                hint="write MODEL@VERSION, for example home-intents@1.2.0, or a release digest",
            )
        found = [release for release in self.releases() if release.digest.startswith(digest)]
        if len(found) != 1:
            what = (
                f"no release has a digest that begins with {digest}"
                if not found
                else f"{digest} begins the digests of {len(found)} releases"
            )
            hint = "slmops release list shows what is published"
            raise (
                NotFoundError(what, hint=hint)
                if not found or is_digest(digest)
                else UsageError(what, hint=hint)
            )
        return found[0].model, found[0].version

    def _get(self, path: str, kind: type[Answer], query: dict[str, str] | None = None) -> Answer:
        return self._decode(self._request("GET", path, params=query), kind)

    def _send(self, method: str, path: str, kind: type[Answer], body: Any) -> Answer:
        response = self._request(
            method, path, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"}
        )
        return self._decode(response, kind)

    def _request(self, method: str, path: str, **extra: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **extra)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(response)
        return response

    def _unreachable(self, error: httpx.HTTPError) -> NetworkError:
        return NetworkError(
            f"{self.base_url} cannot be reached: {str(error) or type(error).__name__}",
            hint="is the control plane running? start it with: slmops server run",
            url=self.base_url,
        )

    def _check(self, response: httpx.Response) -> None:
        what = f"{response.request.method} {response.request.url.path}"
        spoken = response.headers.get(PROTOCOL_HEADER)
        if spoken is None and not response.is_error:
            raise NetworkError(
                f"{what}: {self.base_url} answers, but is no slmops control plane",
                hint="check address and port",
                url=self.base_url,
            )
        if spoken is not None and spoken != str(SCHEMA):
            raise VersionMismatchError(
                f"{self.base_url} speaks protocol {spoken}, this slmops speaks {SCHEMA}",
                hint="install the same slmops version on both sides",
                expected=str(SCHEMA),
                actual=spoken,
            )
        if response.is_error:
            raise error_from(
                response.status_code, response.content, response.headers.get("Content-Type", ""), what
            )

    def _decode(self, response: httpx.Response, kind: type[Answer]) -> Answer:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except UNREADABLE_JSON as error:
            what = f"{response.request.method} {response.request.url.path}"
            raise VersionMismatchError(
                f"{what}: answer is not what this slmops expects: {error}",
                hint="install the same slmops version on both sides",
            ) from error


def _part(name: str) -> str:
    """One path segment; a slash inside cannot reach another route."""
    return quote(name, safe="")


def _text(content: bytes | str) -> str:
    return content if isinstance(content, str) else content.decode()
