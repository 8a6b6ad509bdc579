"""Digests guard every path and every byte; canonical JSON refuses what has no canonical form."""

from __future__ import annotations

import math

import msgspec
import pytest

from slmops.artifact.digest import (
    canonical_json,
    digest_of,
    is_digest,
    require_digest,
    sha256_hex,
    sha256_of_parts,
)
from slmops.core.errors import DigestError, UsageError

#: FIPS 180-4 example
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256() -> None:
    assert sha256_hex(b"abc") == ABC
    assert sha256_of_parts([b"a", memoryview(b"b"), b"", b"c"]) == ABC


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (ABC, True),
        ("", False),
        (ABC.upper(), False),
        (ABC[:-1], False),
        (ABC + "0", False),
        (ABC + "\n", False),
        ("\n" + ABC, False),
        ("../" + ABC[3:], False),
        (ABC[:-1] + "g", False),
        ("\u0660" * 64, False),  # a digit for str.isdigit, not for us
    ],
)
def test_only_a_digest_is_a_digest(text: str, answer: bool) -> None:
    assert is_digest(text) is answer


def test_wrong_bytes_are_named_with_both_digests() -> None:
    require_digest(b"abc", ABC, "chunk 3")
    with pytest.raises(DigestError) as caught:
        require_digest(b"abd", ABC, "chunk 3")
    error = caught.value
    assert error.message == f"chunk 3: expected sha256 {ABC}, got {sha256_hex(b'abd')} (3 bytes)"
    assert error.fields == {"expected": ABC, "actual": sha256_hex(b"abd")}
    assert "nothing of it was kept" in error.hint


def test_a_struct_and_its_dictionary_have_one_identity() -> None:
    class Thing(msgspec.Struct, omit_defaults=True):
        b: int
        a: float = 0.5
        later: str = ""

    assert canonical_json(Thing(1)) == b'{"b":1}'
    assert digest_of(Thing(1, 2.0)) == digest_of({"b": 1, "a": 2})


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"n": 2**53}, {"n": -(2**53)}])
def test_numbers_without_canonical_form_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="no canonical JSON form"):
        canonical_json(value)
