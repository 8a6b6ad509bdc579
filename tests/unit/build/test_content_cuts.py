"""The fast cuts are the slow ones, byte for byte."""

from __future__ import annotations

import random

import pytest

from slmops.artifact import fastcdc
from slmops.build.content_cuts import cut_points


@pytest.mark.parametrize("seed", range(24))
def test_same_cuts_as_the_reference(seed: int) -> None:
    """Random content of random sizes, with limits smaller and larger than the hash's window."""
    rng = random.Random(seed)
    content = rng.randbytes(rng.randint(0, 30_000))
    limits = {
        "min_bytes": rng.choice([1, 64, 200, 2048]),
        "average_bytes": rng.choice([256, 1024, 4096]),
        "max_bytes": rng.choice([4096, 9000, 16384]),
    }
    assert cut_points(content, **limits) == fastcdc.cut_points(content, **limits)


def test_content_without_chance_is_cut_at_the_maximum() -> None:
    limits = {"min_bytes": 64, "average_bytes": 256, "max_bytes": 1000}
    assert cut_points(bytes(5000), **limits) == fastcdc.cut_points(bytes(5000), **limits)
