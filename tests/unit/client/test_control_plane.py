"""The client turns answers into records and problem documents into the errors that they were."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import msgspec
import pytest

from slmops.client import ControlPlane
from slmops.client.problems import error_class, error_from
from slmops.core import errors
from slmops.core.errors import (
    AuthError,
    DigestError,
    IllegalTransitionError,
    NetworkError,
    NotFoundError,
    SlmopsError,
    TokenError,
    UsageError,
    VersionMismatchError,
)
from slmops.protocol.messages import PROTOCOL_HEADER, SCHEMA, Problem

HEADERS = {PROTOCOL_HEADER: str(SCHEMA)}


def plane(handler: object, token: str = "slm_t") -> ControlPlane:
    """A client whose server is a function."""
    return ControlPlane("http://plane", token, transport=httpx.MockTransport(handler))  # type: ignore[arg-type]


def problem(kind: type[SlmopsError], status: int | None = None, code: str | None = None) -> httpx.Response:
    """A response that carries an error."""
    document = Problem(
        "urn:x", "t", status or kind.http_status, "what happened", code or kind.code, "the fix", {"n": 1}
    )
    headers = {**HEADERS, "Content-Type": "application/problem+json"}
    return httpx.Response(status or kind.http_status, content=msgspec.json.encode(document), headers=headers)


ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SlmopsError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.code)
def test_every_error_comes_back_as_itself(kind: type[SlmopsError]) -> None:
    """With message, hint and fields."""
    with plane(lambda request: problem(kind)) as api, pytest.raises(kind) as caught:
        api.rollouts()
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint, caught.value.fields) == (
        "what happened",
        "the fix",
        {"n": 1},
    )


def test_a_code_that_is_more_precise_than_ours_is_its_family() -> None:
    """A newer server may say more; its own code is kept."""
    with (
        plane(lambda request: problem(TokenError, code="auth.token.used")) as api,
        pytest.raises(TokenError) as caught,
    ):
        api.fleet()
    assert caught.value.fields["server_code"] == "auth.token.used"
    assert error_class("auth.token.used.twice") is TokenError
    assert error_class("unheard.of") is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AuthError), (404, NotFoundError), (418, UsageError), (502, errors.TransientError)],
)
def test_answers_of_a_proxy_are_errors_by_their_status(status: int, kind: type[SlmopsError]) -> None:
    """There is no problem document in them."""
    assert type(error_from(status, b"<html>", "text/html", "GET /")) is kind
    assert isinstance(error_from(500, b"{", "application/problem+json", "GET /"), NetworkError)


def test_a_server_that_is_not_there_is_named_with_the_fix() -> None:
    """A closed port on loopback."""
    api = ControlPlane("http://127.0.0.1:9", timeout_s=5)
    with pytest.raises(NetworkError, match=r"http://127\.0\.0\.1:9 cannot be reached.*slmops server run"):
        api.devices()
    api.close()


def test_a_server_of_another_version_is_refused() -> None:
    """By its header, before its answer is read; an answer that does not fit is refused, too."""
    newer = {PROTOCOL_HEADER: str(SCHEMA + 1)}
    api = plane(lambda request: httpx.Response(200, json=[], headers=newer))
    with api, pytest.raises(VersionMismatchError, match=f"speaks protocol {SCHEMA + 1}"):
        api.rollouts()
    api = plane(lambda request: httpx.Response(200, json=[{"id": 1}], headers=HEADERS))
    with api, pytest.raises(VersionMismatchError, match="not what this slmops expects"):
        api.rollouts()


def test_something_that_is_no_control_plane_is_said_to_be_none() -> None:
    """A web server on that port."""
    api = plane(lambda request: httpx.Response(200, text="hello"))
    with api, pytest.raises(NetworkError, match="is no slmops control plane"):
        api.rollouts()


def test_names_in_paths_cannot_reach_another_route() -> None:
    """They are quoted."""
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return problem(NotFoundError)

    with plane(handler) as api:
        for call in (lambda: api.device("../audit"), lambda: api.rollout_action("a/b", "pause?x")):
            with pytest.raises(NotFoundError):
                call()
    assert asked == ["/v1/devices/..%2Faudit", "/v1/rollouts/a%2Fb/pause%3Fx"]


def test_many_digests_are_asked_about_in_several_requests() -> None:
    """In order."""
    batches: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["sha256"]
        batches.append(len(asked))
        return httpx.Response(200, json={"missing": asked[:1]}, headers=HEADERS)

    with plane(handler) as api:
        assert api.missing_blobs([f"{i:064x}" for i in range(12_000)]) == [
            f"{i:064x}" for i in (0, 5000, 10_000)
        ]
    assert batches == [5000, 5000, 2000]


def test_the_token_is_sent_and_a_release_is_found_by_name_or_digest() -> None:
    """``model@version``, or the beginning of a digest."""
    release = {
        "digest": "ab" * 32, "model": "m", "version": "1.0", "release_seq": 1, "target_path": "p", "published_at": "",
        "published_by": "", "licence": "", "channels": [], "profiles": [], "waivers": [],
    }  # fmt: skip
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer slm_t"
        paths.append(request.url.path)
        if request.url.path == "/v1/releases":
            return httpx.Response(200, json=[release], headers=HEADERS)
        return problem(DigestError)

    with plane(handler) as api:
        for reference in ("m@1.0", "ababab", "sha256:" + "ab" * 32):
            with pytest.raises(DigestError):
                api.promote(reference, "stable")
        with pytest.raises(UsageError, match="cannot be read"):
            api.release("nonsense")
        with pytest.raises(NotFoundError, match="no release has a digest"):
            api.release("cdcdcd")
    assert paths.count("/v1/releases/m/1.0/promote") == 3


def test_events_are_read_one_by_one() -> None:
    """Comments are skipped; the end of the stream ends the loop."""
    stream = (
        b': slmops events\n\nid: 4\nevent: k\ndata: {"id":4,"at":"t","kind":"k","subject":"s","detail":{"a":1}}\n\n'
        b': still here\n\nid: 5\nevent: k\ndata: {"id":5,"at":"t","kind":"k","subject":"s"}\n\n'
    )

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["last-event-id"] == "3"
        return httpx.Response(200, content=stream, headers=HEADERS)

    with plane(handler) as api:
        assert [(event.id, event.detail) for event in api.events(after=3)] == [(4, {"a": 1}), (5, {})]
    with plane(lambda request: problem(IllegalTransitionError)) as api, pytest.raises(IllegalTransitionError):
        next(api.events())


def test_an_address_without_a_scheme_is_refused_at_once() -> None:
    """With an example."""
    with pytest.raises(UsageError, match="is not a URL"):
        ControlPlane("localhost:8420")


def test_the_client_is_light_to_import() -> None:
    """Neither pydantic nor a web framework nor a database comes with it."""
    code = "import sys, slmops.client; print(','.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    names = set(loaded.stdout.strip().split(","))
    assert not names & {
        "pydantic",
        "fastapi",
        "starlette",
        "sqlalchemy",
        "yaml",
        "numpy",
        "uvicorn",
        "jinja2",
        "tuf",
    }
