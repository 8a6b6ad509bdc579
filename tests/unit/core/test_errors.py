"""The error tree: stable codes, exit codes by family, messages with the fix."""

from __future__ import annotations

import pytest

from slmops.core import errors
from slmops.core.errors import SlmopsError

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SlmopsError)]
FAMILIES = {
    errors.UsageError: 2,
    errors.AuthError: 4,
    errors.TrustError: 3,
    errors.TransientError: 75,
    errors.DeviceError: 1,
    errors.BuildError: 1,
    errors.GateError: 5,
    errors.BugError: 1,
}


def test_codes_are_unique_and_follow_the_family() -> None:
    codes = [kind.code for kind in TREE]
    assert len(set(codes)) == len(codes)
    for kind in TREE:
        parent = kind.__bases__[0]
        if parent is not Exception and parent is not SlmopsError:
            assert kind.code.startswith(f"{parent.code}.")


@pytest.mark.parametrize(
    ("family", "exit_code"), FAMILIES.items(), ids=lambda v: getattr(v, "__name__", str(v))
)
def test_exit_codes_go_by_family(family: type[SlmopsError], exit_code: int) -> None:
    assert {kind.exit_code for kind in TREE if issubclass(kind, family)} == {exit_code}


def test_only_transient_errors_are_worth_another_try() -> None:
    assert {kind for kind in TREE if kind.retry == "backoff"} == {
        kind for kind in TREE if issubclass(kind, errors.TransientError)
    }


def test_every_error_has_an_http_status() -> None:
    assert all(400 <= kind.http_status < 600 for kind in TREE)


def test_the_text_is_the_message_then_the_fix() -> None:
    error = errors.NoSpaceError(
        "needs 10 bytes, 3 are free", hint="remove old models", needed_bytes=10, path="/x"
    )
    assert str(error) == "needs 10 bytes, 3 are free (hint: remove old models)"
    assert error.fields == {"needed_bytes": 10, "path": "/x"}
    assert str(errors.BugError("odd")) == "odd"
