"""Content-defined cuts: within their limits, repeatable for ever, and moved only near an insertion."""

from __future__ import annotations

import hashlib

import pytest
from gguf_files import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.artifact.fastcdc import GEAR, cut_points

LIMITS = {"min_bytes": 256, "average_bytes": 1024, "max_bytes": 4096}


def pieces(content: bytes) -> list[bytes]:
    cuts = cut_points(content, **LIMITS)
    return [content[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]


@settings(max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=9000), st.integers(0, 9000).map(bytes), st.text().map(lambda s: noise(s, 9000))
    )
)
def test_pieces_add_up_and_keep_their_limits(content: bytes) -> None:
    cut = pieces(content)
    assert b"".join(cut) == content
    assert all(256 < len(piece) <= 4096 for piece in cut[:-1])
    assert all(0 < len(piece) <= 4096 for piece in cut)


def test_the_average_is_about_what_was_asked() -> None:
    cut = pieces(noise("average", 1 << 20))
    assert 700 < (1 << 20) / len(cut) < 1800


@pytest.mark.parametrize("at", [0, 1, 5000, 250_000, 499_999])
@pytest.mark.parametrize("inserted", [b"x", b"a longer insertion " * 40])
def test_an_insertion_moves_only_the_cuts_around_it(at: int, inserted: bytes) -> None:
    content = noise("shift", 500_000)
    old = set(pieces(content))
    new = pieces(content[:at] + inserted + content[at:])
    fresh = [piece for piece in new if piece not in old]
    assert len(fresh) <= 4
    assert sum(map(len, fresh)) <= len(inserted) + 4 * 4096


def test_nothing_has_no_pieces() -> None:
    assert cut_points(b"", **LIMITS) == []


def test_the_gear_table_is_the_published_one() -> None:
    """Derived from SHA-256 so that every implementation, for ever, cuts alike."""
    assert len(GEAR) == 256
    assert GEAR[0] == int.from_bytes(hashlib.sha256(b"slmops-gear\x00").digest()[:8], "little")
    digest = hashlib.sha256(b"".join(gear.to_bytes(8, "little") for gear in GEAR)).hexdigest()
    assert digest == "82a9a69d6c9a8967016893a5ac08a695636856eb2e8f71986d2491ce40aeb749"


def test_the_cuts_are_the_published_ones() -> None:
    """Golden: changing any of these cuts would make every device fetch every file again."""
    assert cut_points(noise("golden", 20_000), **LIMITS) == [
        1738,
        2970,
        3410,
        6406,
        8015,
        9214,
        10251,
        10810,
        11102,
        14985,
        16134,
        17702,
        18357,
        18976,
        20000,
    ]
