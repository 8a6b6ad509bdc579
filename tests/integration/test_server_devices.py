"""What devices say to a running control plane, and what is believed of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.control_plane import FACTS, FakeClock, Plane, SimDevice, enrolled, over_http, running_plane

from slmops.client import ControlPlane
from slmops.core.errors import AuthError, ConflictError, PermissionDeniedError, TokenError, UsageError
from slmops.protocol.messages import DEVICE_AUDIENCE, SCHEMA, CheckinRequest, encode


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    """The server's clock, which tests move."""
    return FakeClock()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, clock: FakeClock) -> Iterator[Plane]:
    """A control plane that this file's tests share."""
    with running_plane(tmp_path_factory.mktemp("plane") / "data", clock=clock, work=False) as running:
        yield running


@pytest.fixture
def api(plane: Plane) -> Iterator[ControlPlane]:
    """The admin's client."""
    with plane.api() as client:
        yield client


@pytest.fixture
def http(plane: Plane) -> Iterator[httpx.Client]:
    """Devices' connection."""
    with httpx.Client(base_url=plane.url, trust_env=False) as client:
        yield client


def device(http: httpx.Client, name: str, clock: FakeClock) -> SimDevice:
    """A device that has not enrolled."""
    made = SimDevice(over_http(http), name)
    made.now = clock.now
    return made


# ---- enrolment ----------------------------------------------------------------------------------------------------


def test_a_token_is_good_for_as_many_devices_as_it_says(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """The next one is told that it is used up; labels come with it; the root is pinned."""
    token = api.create_device_token(uses=2, labels={"site": "hki"}).token
    for _ in range(2):
        new = device(http, "counted", clock)
        new.enroll(token, labels={"site": "forged", "own": "label", "profile": "pi5-8gb"})
        assert '"_type":"root"' in new.tuf_root.replace(" ", "")
    with pytest.raises(TokenError, match="was for 2 devices, and all of them have enrolled") as caught:
        device(http, "counted", clock).enroll(token)
    assert caught.value.fields["server_code"] == "auth.token.used"
    assert [found.id for found in api.devices("site = hki and own = label")] == ["counted", "counted-2"]


def test_an_expired_and_an_unknown_token_are_told_apart(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """By code and by words."""
    token = api.create_device_token(ttl_s=60).token
    clock.advance(61)
    with pytest.raises(TokenError, match="expired at") as expired:
        device(http, "late", clock).enroll(token)
    with pytest.raises(TokenError, match="is not known here") as unknown:
        device(http, "late", clock).enroll(token + "x")
    codes = {error.value.fields["server_code"] for error in (expired, unknown)}
    assert codes == {"auth.token.expired", "auth.token.unknown"}
    assert api.devices("id = late") == []


def test_an_enrolment_whose_answer_was_lost_is_repeated_safely(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """Same token, same key: the same device, and no second use."""
    token = api.create_device_token().token
    new = device(http, "again", clock)
    new.enroll(token)
    new.enroll(token)
    assert new.name == "again"
    with pytest.raises(TokenError):
        device(http, "again", clock).enroll(token)


@pytest.mark.parametrize("name", ["", "Pi", "../x", "a b", "x" * 64, "pi\n"])
def test_names_that_no_command_could_take_are_refused(
    api: ControlPlane, http: httpx.Client, clock: FakeClock, name: str
) -> None:
    """And the token is not used up by that."""
    token = api.create_device_token().token
    with pytest.raises(UsageError, match="is not valid"):
        device(http, name, clock).enroll(token)
    device(http, "fine", clock).enroll(token)


# ---- tokens of devices --------------------------------------------------------------------------------------------


def claims(clock: FakeClock, name: str, **changes: object) -> dict[str, object]:
    """What a device signs."""
    now = int(clock.now().timestamp())
    return {"iss": name, "aud": DEVICE_AUDIENCE, "iat": now, "exp": now + 120, **changes}


def test_only_a_fresh_token_of_the_devices_own_key_is_believed(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """Wrong key, wrong algorithm, wrong audience, too old, too long, not yet, somebody else's name."""
    (mine, other) = enrolled(api, http, ["jwt-a", "jwt-b"], now=clock.now)
    now = int(clock.now().timestamp())
    wrong_key = ec.generate_private_key(ec.SECP256R1())
    bad = {
        "wrong key": jwt.encode(claims(clock, mine.name), wrong_key, "ES256"),
        "somebody else's name": jwt.encode(claims(clock, mine.name), other.key, "ES256"),
        "nobody": jwt.encode(claims(clock, "nobody"), mine.key, "ES256"),
        "other audience": jwt.encode(claims(clock, mine.name, aud="x"), mine.key, "ES256"),
        "expired": jwt.encode(claims(clock, mine.name, iat=now - 300, exp=now - 180), mine.key, "ES256"),
        "not yet": jwt.encode(claims(clock, mine.name, iat=now + 60, exp=now + 120), mine.key, "ES256"),
        "too long": jwt.encode(claims(clock, mine.name, exp=now + 4000), mine.key, "ES256"),
        "no end": jwt.encode({"iss": mine.name, "aud": DEVICE_AUDIENCE, "iat": now}, mine.key, "ES256"),
        "symmetric": jwt.encode(claims(clock, mine.name), "k" * 32, "HS256"),
        "unsigned": jwt.encode(claims(clock, mine.name), None, "none"),
        "nonsense": "a.b.c",
    }
    body = encode(CheckinRequest(SCHEMA, "boot", 100, 0, "idle"))
    for what, token in bad.items():
        response = http.post("/v1/checkin", content=body, headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 401, what
        assert response.headers["www-authenticate"] == "Bearer"
    almost = jwt.encode(claims(clock, mine.name, iat=now - 145, exp=now - 25), mine.key, "ES256")
    assert (
        http.post("/v1/checkin", content=body, headers={"Authorization": f"Bearer {almost}"}).status_code
        == 204
    )


def test_a_remembered_token_is_not_believed_after_its_time(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """The cache of verified tokens knows when they end."""
    (mine,) = enrolled(api, http, ["cached"], now=clock.now)
    bearer = mine.bearer()
    send = over_http(http)
    assert send("/v1/checkin", encode(mine.report()), bearer)[0] == 204
    clock.advance(151)
    assert send("/v1/checkin", encode(mine.report()), bearer)[0] == 401


def test_a_retired_device_is_refused_at_once(api: ControlPlane, http: httpx.Client, clock: FakeClock) -> None:
    """Also with a token that was verified before."""
    (mine,) = enrolled(api, http, ["retiring"], now=clock.now)
    mine.checkin()
    api.retire("retiring")
    with pytest.raises(PermissionDeniedError, match="device retiring is retired"):
        mine.checkin()
    assert [found.id for found in api.devices("id = retiring")] == []
    assert api.devices("id = retiring", retired=True)[0].state == "retired"


# ---- check-ins ----------------------------------------------------------------------------------------------------


def test_nothing_new_is_204_with_the_time_of_the_next_poll(
    api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """And facts or an outcome are acknowledged with a body."""
    (mine,) = enrolled(api, http, ["polling"], now=clock.now)
    headers = {"Authorization": mine.bearer()}
    response = http.post("/v1/checkin", content=encode(mine.report()), headers=headers)
    assert (response.status_code, response.content) == (204, b"")
    assert 27 <= int(response.headers["retry-after"]) <= 33
    report = msgspec.structs.replace(mine.report(), facts=FACTS)
    answer = http.post("/v1/checkin", content=encode(report), headers=headers)
    assert (answer.status_code, answer.json()["accepted_seq"]) == (200, report.seq)
    assert "assignment" not in answer.json()


def test_a_sequence_number_is_accepted_once(api: ControlPlane, http: httpx.Client, clock: FakeClock) -> None:
    """The same request again gets its answer; the same number with other content, or a lower one, is a replay."""
    (mine,) = enrolled(api, http, ["replayed"], now=clock.now)
    report = mine.report()
    send, bearer = over_http(http), mine.bearer()
    assert send("/v1/checkin", encode(report), bearer)[0] == 204
    assert send("/v1/checkin", encode(report), bearer)[0] == 204
    for forged in (
        msgspec.structs.replace(report, phase="committed"),
        msgspec.structs.replace(report, seq=report.seq - 1),
        msgspec.structs.replace(report, boot_id="other"),
    ):
        status, body, _ = send("/v1/checkin", encode(forged), bearer)
        assert (status, msgspec.json.decode(body)["fields"]["accepted_seq"]) == (409, report.seq)
    assert api.device("replayed").phase == "idle"
    with pytest.raises(ConflictError):
        mine.seq = 0
        mine.checkin()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"schema":1}',
        b'{"schema":1,"boot_id":"b","seq":"x","generation":0,"phase":"idle"}',
        b"\xff\xfe",
    ],
)
def test_malformed_reports_are_refused_and_change_nothing(
    api: ControlPlane, http: httpx.Client, clock: FakeClock, body: bytes
) -> None:
    """400, with the place."""
    (mine,) = enrolled(api, http, [f"malformed-{len(body)}"], now=clock.now)
    before = api.device(mine.name)
    status, content, _ = over_http(http)("/v1/checkin", body, mine.bearer())
    assert status == 400
    assert b"CheckinRequest is malformed" in content
    assert api.device(mine.name) == before


def test_many_devices_at_once_share_flushes_and_none_is_lost(
    plane: Plane, api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """Every acknowledged sequence number is in the database."""
    devices = enrolled(api, http, ["crowd"] * 24, now=clock.now)

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=plane.url, trust_env=False) as client:

            async def several(mine: SimDevice) -> int:
                bearer = {"Authorization": mine.bearer()}
                answers = [
                    await client.post("/v1/checkin", content=encode(mine.report()), headers=bearer)
                    for _ in range(10)
                ]
                return sum(answer.status_code == 204 for answer in answers)

            return await asyncio.gather(*(several(mine) for mine in devices))

    assert asyncio.run(crowd()) == [10] * 24
    with plane.application.services.store.read() as tx:
        stored = {row.id: row.seq for row in tx.devices.all([mine.name for mine in devices])}
    assert stored == {mine.name: mine.seq for mine in devices}


def test_operators_tokens_and_devices_tokens_do_not_open_each_others_doors(
    plane: Plane, api: ControlPlane, http: httpx.Client, clock: FakeClock
) -> None:
    """A device is no operator, an operator no device."""
    (mine,) = enrolled(api, http, ["doors"], now=clock.now)
    response = http.get("/v1/devices", headers={"Authorization": mine.bearer()})
    assert (response.status_code, response.json()["code"]) == (401, "auth")
    with pytest.raises(AuthError):
        mine.bearer = lambda: f"Bearer {plane.token}"  # type: ignore[method-assign]
        mine.checkin()
