"""HTTP to the control plane: every failure is one of our errors, every token in the server's time."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import httpx
import pytest

from slmops.agent.transport import ServerClock, problem_error
from slmops.core.errors import (
    AuthError,
    BusyError,
    ConflictError,
    NotFoundError,
    SlmopsError,
    TokenError,
    TransientError,
    UsageError,
    VersionMismatchError,
)
from slmops.protocol.messages import Problem, encode


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "auth", AuthError),
        (401, "auth.token", TokenError),
        (403, "auth.permission", AuthError),
        (404, "usage.not_found", NotFoundError),
        (409, "usage.conflict", ConflictError),
        (426, "usage.version_mismatch", VersionMismatchError),
        (429, "transient.busy", BusyError),
        (422, "usage.document", UsageError),
        (500, "bug", TransientError),
        (503, "transient", TransientError),
    ],
)
def test_a_problem_document_becomes_its_error(status: int, code: str, kind: type[SlmopsError]) -> None:
    body = encode(Problem("about:blank", "t", status, "what happened", code, "the fix", {"expected": 1}))
    error = problem_error(status, body, "/v1/x", httpx.Headers({"Retry-After": "7"}))
    assert type(error) is kind
    assert error.message == "what happened"
    assert error.hint == "the fix"
    assert error.fields["retry_after_s"] == 7.0


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "x"}'])
def test_a_body_in_another_form_is_judged_by_its_status(body: bytes) -> None:
    assert isinstance(problem_error(502, body, "/v1/x", httpx.Headers()), TransientError)
    assert isinstance(problem_error(400, body, "/v1/x", httpx.Headers()), UsageError)


def test_the_clock_takes_the_servers_time_and_ignores_nonsense() -> None:
    clock = ServerClock()
    far = datetime.now(timezone.utc) + timedelta(days=3000)
    for header in (None, "", "yesterday", "2020-01-01T00:00:00"):
        clock.learn(header)
        assert abs(clock.offset) < timedelta(seconds=1)
    clock.learn(far.isoformat().replace("+00:00", "Z"))
    assert abs(clock.now() - far) < timedelta(seconds=5)
