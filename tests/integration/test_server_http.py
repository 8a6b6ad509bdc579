"""The HTTP surface of a running control plane: errors, roles, open content, events, numbers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime

import httpx
import pytest
from tests.support.control_plane import Keys, Plane, blueprint, enrolled, make_release, publish, running_plane

from slmops.artifact.digest import sha256_hex
from slmops.client import ControlPlane
from slmops.client.records import EventRecord
from slmops.core.errors import (
    AuthError,
    ConflictError,
    DigestError,
    DocumentError,
    DowngradeError,
    NotFoundError,
    PermissionDeniedError,
    SignatureError,
    TokenError,
    TrustError,
    UsageError,
)
from slmops.protocol.messages import PROTOCOL_HEADER, SCHEMA, TIME_HEADER
from slmops.server.main import create_operator_token


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A control plane that this file's tests share; each uses names of its own."""
    with running_plane(tmp_path_factory.mktemp("plane") / "data") as running:
        yield running


@pytest.fixture
def api(plane: Plane) -> Iterator[ControlPlane]:
    """The admin's client."""
    with plane.api() as client:
        yield client


@pytest.fixture
def http(plane: Plane) -> Iterator[httpx.Client]:
    """Plain HTTP, nobody signed in."""
    with httpx.Client(base_url=plane.url, trust_env=False) as client:
        yield client


def test_every_response_says_version_and_time(http: httpx.Client) -> None:
    """Also errors, also routes that FastAPI does not see."""
    for method, path in (
        ("GET", "/healthz"),
        ("GET", "/v1/devices"),
        ("GET", "/nowhere"),
        ("POST", "/v1/checkin"),
    ):
        response = http.request(method, path)
        assert response.headers[PROTOCOL_HEADER] == str(SCHEMA)
        assert datetime.fromisoformat(response.headers[TIME_HEADER].replace("Z", "+00:00")).tzinfo is not None


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/devices", None, 401, "auth"),
        ("GET", "/nowhere", None, 404, "usage.not_found"),
        ("DELETE", "/v1/devices", None, 405, "usage.method"),
        ("POST", "/v1/checkin", b"{}", 401, "auth"),
        ("GET", "/v1/checkin", None, 400, "usage"),
        ("POST", "/v1/enroll", b"{", 400, "usage"),
        ("POST", "/v1/enroll", b"x" * 300_000, 400, "usage"),
        ("GET", "/v1/chunks/sha256/abc", None, 400, "usage"),
        ("GET", "/v1/chunks/sha256/" + "0" * 64, None, 404, "usage.not_found"),
        ("GET", "/v1/tuf/9.root.json", None, 404, "usage.not_found"),
        ("GET", "/v1/tuf/..%2f..%2fkeys%2fonline.pem", None, 404, "usage.not_found"),
    ],
)
def test_every_error_is_a_problem_document(
    http: httpx.Client, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    """With our code and, where there is one, the fix."""
    response = http.request(method, path, content=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"]
    assert problem["type"] == f"urn:slmops:error:{code}"


def test_a_peer_of_a_newer_protocol_is_told_which_one_is_spoken_here(http: httpx.Client) -> None:
    """426, on every device and operator route; an older one is served."""
    for path in ("/v1/checkin", "/v1/devices"):
        response = http.post(path, headers={PROTOCOL_HEADER: str(SCHEMA + 1)})
        assert (response.status_code, response.json()["code"]) == (426, "usage.version_mismatch")
    assert http.get("/v1/tuf/timestamp.json", headers={PROTOCOL_HEADER: "0"}).status_code == 200


def test_requests_that_do_not_validate_say_where(plane: Plane, http: httpx.Client) -> None:
    """Unknown fields are refused, so that a typo is not a silent default."""
    headers = {"Authorization": f"Bearer {plane.token}"}
    response = http.post("/v1/device-tokens", json={"ttl": 3}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "usage.request")
    assert response.json()["fields"]["field"] == "body.ttl"


def test_a_role_may_do_what_its_name_says_and_no_more(plane: Plane) -> None:
    """Viewer < operator < approver < admin; the refusal names both roles."""
    clients = {
        role: ControlPlane(plane.url, create_operator_token(plane.options, role, f"role-{role}"))
        for role in ("viewer", "operator", "approver")
    }
    clients["viewer"].devices()
    for call in (
        lambda c: c.create_device_token(),
        lambda c: c.set_labels("nobody", {"a": "b"}),
        lambda c: c.apply_blueprint(blueprint("roles", version="1")),
        lambda c: c.missing_blobs(["0" * 64]),
        lambda c: c.put_blob("0" * 64, b""),
        lambda c: c.publish_release("x", "{}", "{}"),
    ):
        with pytest.raises(PermissionDeniedError, match="role-viewer has viewer"):
            call(clients["viewer"])
    clients["operator"].create_device_token()
    with pytest.raises(PermissionDeniedError, match="needs the role approver, role-operator has operator"):
        clients["operator"].rollout_action("r-none", "approve")
    with pytest.raises(NotFoundError):
        clients["approver"].rollout_action("r-none", "approve")
    for client in clients.values():
        client.close()


def test_tokens_that_are_not_known_are_refused(plane: Plane) -> None:
    """With the command that makes one; a name is taken once."""
    with (
        ControlPlane(plane.url, "slm_wrong") as api,
        pytest.raises(TokenError, match="slmops server token create"),
    ):
        api.devices()
    with ControlPlane(plane.url, "") as api, pytest.raises(AuthError, match="nobody is signed in"):
        api.devices()
    create_operator_token(plane.options, "viewer", "twice")
    with pytest.raises(ConflictError, match="'twice' exists"):
        create_operator_token(plane.options, "viewer", "twice")
    with pytest.raises(UsageError, match="role 'king' is not known"):
        create_operator_token(plane.options, "king", "somebody")


def test_the_openapi_document_knows_every_route_and_record(http: httpx.Client) -> None:
    """Also the two that pass FastAPI by; every reference leads somewhere."""
    document = http.get("/openapi.json").json()
    assert {"/v1/enroll", "/v1/checkin", "/v1/devices", "/v1/rollouts/{rollout_id}", "/v1/events"} <= set(
        document["paths"]
    )
    schemas = document["components"]["schemas"]
    assert {"DeviceRecord", "RolloutDetail", "CheckinRequest", "Problem", "LabelChanges"} <= set(schemas)
    text = json.dumps(document)
    assert "x-record" not in text
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in schemas, reference


def test_monitors_get_health_readiness_and_numbers(http: httpx.Client) -> None:
    """In the usual places."""
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}
    http.post("/v1/checkin")
    text = http.get("/metrics").text
    assert 'slmops_checkins_total{result="auth"}' in text
    assert "slmops_worker_tick_seconds_count" in text


# ---- content ------------------------------------------------------------------------------------------------------


def test_chunks_are_served_whole_in_ranges_and_for_ever(api: ControlPlane, http: httpx.Client) -> None:
    """Open to everybody; caches may keep them: the name is the hash."""
    content = bytes(range(256)) * 40
    name = sha256_hex(content)
    api.put_blob(name, content)
    api.put_blob(name, content)
    path = f"/v1/chunks/sha256/{name}"
    whole = http.get(path)
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["etag"] == f'"{name}"'
    assert "immutable" in whole.headers["cache-control"]
    part = http.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    rest = http.get(path, headers={"Range": "bytes=10000-", "If-Range": f'"{name}"'})
    assert rest.content == content[10000:]
    changed = http.get(path, headers={"Range": "bytes=10-19", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, content)
    beyond = http.get(path, headers={"Range": "bytes=99999-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert http.get(path, headers={"If-None-Match": f'"{name}"'}).status_code == 304
    head = http.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(content)), b"")


def test_a_blob_with_other_bytes_than_its_name_is_refused(api: ControlPlane) -> None:
    """Nothing of it is kept."""
    name = sha256_hex(b"right")
    with pytest.raises(DigestError, match=f"expected sha256 {name}"):
        api.put_blob(name, b"wrong")
    assert api.missing_blobs([name]) == [name]
    with pytest.raises(UsageError, match="is not a SHA-256"):
        api.put_blob("nonsense", b"")
    with pytest.raises(UsageError, match="is not a SHA-256"):
        api.missing_blobs(["nonsense"])


def test_timestamp_is_fresh_and_the_rest_of_the_metadata_is_immutable(http: httpx.Client) -> None:
    """A cache in front must not freeze a fleet."""
    assert http.get("/v1/tuf/timestamp.json").headers["cache-control"] == "no-cache"
    assert "immutable" in http.get("/v1/tuf/1.root.json").headers["cache-control"]


# ---- releases -----------------------------------------------------------------------------------------------------


def test_only_complete_properly_signed_releases_are_published(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each attempt is refused by name, and leaves the published metadata as it was."""
    keys = Keys()
    with (
        running_plane(tmp_path_factory.mktemp("releases") / "data", keys=keys, work=False) as plane,
        plane.api() as api,
    ):
        made = make_release("1.0.0", 1)
        before = api.published_targets()
        from slmops.artifact.trust import add_release

        def sign(made_: object, signer: object = keys.release, seq: int = 1) -> bytes:
            now = datetime.fromisoformat("2026-11-08T00:00:00+00:00")
            return add_release(before, made.release.target_path(), made.manifest, seq, [signer], now)  # type: ignore[list-item]

        path = made.release.target_path()
        with pytest.raises(UsageError, match="not complete: 1 blobs were not uploaded"):
            api.publish_release(path, sign(made), made.manifest)
        for digest, blob in list(made.blobs.items())[:-1]:
            api.put_blob(digest, blob)
        last = list(made.blobs)[-1]
        with pytest.raises(UsageError, match="not complete"):
            api.publish_release(path, sign(made), made.manifest)
        api.put_blob(last, made.blobs[last])
        with pytest.raises(SignatureError):
            api.publish_release(path, sign(made, Keys().release), made.manifest)
        with pytest.raises(DigestError):
            api.publish_release(path, sign(made), made.manifest + b" ")
        with pytest.raises(NotFoundError, match=r"is not in targets\.json"):
            api.publish_release("releases/home-intents/2.0.0.json", sign(made), made.manifest)
        with pytest.raises(TrustError, match="release_seq is 1 in the manifest and 5 in targets"):
            api.publish_release(path, sign(made, seq=5), made.manifest)
        with pytest.raises(TrustError, match="cannot be read"):
            api.publish_release(path, b"{}", made.manifest)
        assert api.published_targets() == before
        assert api.releases() == []
        record = api.publish_release(path, sign(made), made.manifest)
        assert record.digest == made.digest
        assert api.publish_release(path, sign(made), made.manifest) == record  # a retried request
        with pytest.raises(DowngradeError, match="drops or changes"):
            other = make_release("1.0.1", 2)
            for digest, blob in other.blobs.items():
                api.put_blob(digest, blob)
            now = datetime.fromisoformat("2026-11-08T00:00:00+00:00")
            forked = add_release(
                add_release(before, other.release.target_path(), other.manifest, 2, [keys.release], now),
                "releases/home-intents/x.json", b"{}", 3, [keys.release], now,
            )  # fmt: skip
            api.publish_release(other.release.target_path(), forked, other.manifest)
        detail = api.release("home-intents@1.0.0")
        assert detail.variants[0].measured.kld_mean == 0.01
        assert detail.evidence == {"gates": []}
        assert api.blob(record.digest) == made.manifest  # devices fetch the manifest as a chunk


def test_releases_may_be_published_in_another_order_than_they_were_signed_and_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Somebody signs 1.0.0 and 1.1.0 and publishes the second first; later the store has lost a blob."""
    from slmops.artifact.trust import add_release, load_targets

    keys = Keys()
    with (
        running_plane(tmp_path_factory.mktemp("order") / "data", keys=keys, work=False) as plane,
        plane.api() as api,
    ):
        now = datetime.fromisoformat("2026-11-08T00:00:00+00:00")
        older, newer = make_release("1.0.0", 1), make_release("1.1.0", 2)
        first = add_release(
            api.published_targets(), older.release.target_path(), older.manifest, 1, [keys.release], now
        )
        second = add_release(first, newer.release.target_path(), newer.manifest, 2, [keys.release], now)
        for made, targets in ((newer, second), (older, first), (newer, second), (older, first)):
            for digest, blob in made.blobs.items():
                api.put_blob(digest, blob)
            assert (
                api.publish_release(made.release.target_path(), targets, made.manifest).digest == made.digest
            )
        assert {release.version for release in api.releases()} == {"1.0.0", "1.1.0"}
        assert load_targets(api.published_targets()).signed.version == load_targets(second).signed.version


def test_a_release_that_was_signed_before_a_crash_is_taken_in_at_the_next_start(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Metadata first, then the row: what lies between is healed."""
    from slmops.server.adapters.database import SqlStore
    from slmops.server.adapters.database.schema import releases

    folder = tmp_path_factory.mktemp("crash") / "data"
    keys = Keys()
    with running_plane(folder, keys=keys, work=False) as plane, plane.api() as api:
        published = publish(api, keys, make_release("1.0.0", 1))
    store = SqlStore.in_folder(folder)
    with store.engine.begin() as connection:
        connection.execute(releases.delete())
    store.close()
    with running_plane(folder, keys=keys, work=False) as plane, plane.api() as api:
        (found,) = api.releases()
        assert (found.digest, found.published_by) == (published.digest, "server")


# ---- blueprints, events, audit ------------------------------------------------------------------------------------


def test_a_rollout_over_real_sockets_with_its_events(
    plane: Plane, api: ControlPlane, http: httpx.Client
) -> None:
    """From enrolment to completed, as a stream of events that can be resumed."""
    publish(api, plane.keys, make_release("1.0.0", 1, model="socket-model"))
    devices = enrolled(api, http, ["sock-a", "sock-b", "sock-b"], labels={"room": "socket"})
    assert [device.name for device in devices] == ["sock-a", "sock-b", "sock-b-2"]
    seen: list[EventRecord] = []
    ended = threading.Event()
    started = threading.Event()

    def listen() -> None:
        with plane.api() as mine:
            for event in mine.events(after=0):
                started.set()
                seen.append(event)
                if event.kind == "rollout.closed":
                    ended.set()
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    assert started.wait(20)
    text = blueprint("sockets", model="socket-model", version="1.0.0", selector="room = socket")
    with pytest.raises(DocumentError, match=r"f\.yaml:3:"):
        api.apply_blueprint(text.replace("metadata: {name: sockets}", "metadata: {nam: sockets}"), "f.yaml")
    plan = api.plan_blueprint(text, "f.yaml")
    assert sorted(device for wave in plan.waves for device in wave.devices) == [
        "sock-a",
        "sock-b",
        "sock-b-2",
    ]
    applied = api.apply_blueprint(text, "f.yaml")
    for _ in range(2000):
        for device in devices:
            device.checkin()
        if ended.is_set():
            break
    listener.join(20)
    detail = api.rollout(applied.rollout_id)
    assert (detail.phase, detail.counts.committed) == ("completed", 3)
    kinds = [event.kind for event in seen]
    assert kinds.count("device.offered") == 3
    assert [event.id for event in seen] == sorted({event.id for event in seen})
    device = api.device("sock-a")
    assert (device.release, device.phase, device.outcomes[0].status) == (
        "socket-model 1.0.0",
        "committed",
        "committed",
    )
    assert api.blueprint_history("sockets")[0].rollout_id == applied.rollout_id
    assert {"blueprint.apply", "release.publish", "device_token.create"} <= {
        row.action for row in api.audit(1000)
    }
    assert api.fleet().by_release["socket-model 1.0.0"] == 3


def test_labels_select_devices(api: ControlPlane, http: httpx.Client) -> None:
    """Set, removed, and not forged."""
    enrolled(api, http, ["label-a", "label-b"])
    assert api.set_labels("label-a", {"floor": "2", "wing": "east"}).labels == {"floor": "2", "wing": "east"}
    assert api.set_labels("label-a", {"wing": None}).labels == {"floor": "2"}
    assert [device.id for device in api.devices("floor = 2")] == ["label-a"]
    assert [device.id for device in api.devices("id in (label-a, label-b) and floor != 2")] == ["label-b"]
    with pytest.raises(UsageError, match="'profile' is set by slmops itself"):
        api.set_labels("label-a", {"profile": "other"})
    with pytest.raises(UsageError, match="cannot read"):
        api.devices("floor ==== 2")
    with pytest.raises(NotFoundError):
        api.set_labels("nobody", {"a": "b"})
