"""Measured tables: what a type does to weights, and where in a model the damage sits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from slmops.build.steps.sensitivity import groups_of, losses_of, split_worst
from slmops.runtimes.llama_cpp.quantise import dequantise_rows, quantise_rows


def test_a_type_that_rounds_the_change_away_is_seen() -> None:
    """Weights on the Q4_1 grid plus a small change: Q4_1 undoes it with a tiny error, Q5_0 keeps it with a larger one."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((16, 256)).astype(np.float32)
    base = dequantise_rows("Q4_1", quantise_rows("Q4_1", base), 256)
    change = (rng.standard_normal((16, 256)) * 0.01).astype(np.float32)
    found = losses_of(["Q4_1", "Q5_0", "Q8_0"], base + change, change, None)
    assert found["error"]["Q4_1"] < found["error"]["Q5_0"]
    assert found["swallowed"]["Q4_1"] > 0.2
    assert found["swallowed"]["Q5_0"] < 0.01
    assert found["change"] == pytest.approx(1e-4, rel=0.2)


def test_without_a_change_nothing_is_swallowed() -> None:
    """A base that was not changed has only errors; importance weighs them."""
    rows = np.random.default_rng(4).standard_normal((8, 256)).astype(np.float32)
    plain = losses_of(["Q4_0", "Q8_0"], rows, np.zeros_like(rows), None)
    assert plain["change"] == 0.0
    assert plain["swallowed"] == {"Q4_0": 0.0, "Q8_0": 0.0}
    assert plain["error"]["Q8_0"] < plain["error"]["Q4_0"] / 50
    only_first = np.zeros(256, np.float32)
    only_first[0] = 1.0
    assert (
        losses_of(["Q4_0"], rows, np.zeros_like(rows), only_first)["error"]["Q4_0"] < plain["error"]["Q4_0"]
    )


def test_groups_cover_every_tensor_once() -> None:
    """One kind at one third of the depth each; tensors outside the layers alone."""
    names = [
        "token_embd.weight",
        *(f"blk.{layer}.{kind}.weight" for layer in range(7) for kind in ("attn_q", "ffn_down")),
    ]
    groups = groups_of(names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert ("token_embd.weight",) in groups
    assert ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight") in groups
    assert len(groups) == 7


def test_splitting_finds_the_one_tensor_that_does_the_damage() -> None:
    """Four measurements isolate one of ten; damages still add up to what was measured."""
    own = {f"t{i}": 0.01 for i in range(10)} | {"t7": 1.0, "u": 0.05}
    asked: list[tuple[str, ...]] = []

    def measure(group: Sequence[str]) -> float:
        asked.append(tuple(group))
        return sum(own[name] for name in group)

    groups = [(tuple(f"t{i}" for i in range(10)), 1.09), (("u",), 0.05)]
    found = dict(split_worst(groups, measure, 4))
    assert found[("t7",)] == pytest.approx(1.0)
    assert sum(found.values()) == pytest.approx(1.14)
    assert sorted(name for group in found for name in group) == sorted(own)
    assert len(asked) == 4


def test_splitting_stops_when_nothing_is_left_to_split() -> None:
    """Single tensors stay as they are."""
    assert split_worst([(("a",), 1.0)], lambda group: pytest.fail("nothing to measure"), 3) == [(("a",), 1.0)]
