"""Which rows stand for a matrix, and what the tables together say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.steps.calibrate import packed, unpacked
from slmops.build.steps.choose import sensitivity_of, space_of
from slmops.build.steps.predicted import sampled_rows
from slmops.build.steps.sensitivity import is_quantisable


def test_sampled_rows_estimate_a_heavy_tailed_sum() -> None:
    """A few rows carry most: they are always in the sample, and the weights make up for the rest."""
    rng = np.random.default_rng(0)
    score = rng.gamma(0.3, size=3000)
    score[[5, 70, 2900]] = 400.0
    rows, weight = sampled_rows(score, 64)
    assert len(rows) == len(set(rows.tolist())) == 64
    assert {5, 70, 2900} <= set(rows.tolist())
    assert weight.sum() == pytest.approx(3000)
    assert (score[rows] * weight).sum() == pytest.approx(score.sum(), rel=0.25)
    every, ones = sampled_rows(score[:10], 64)
    assert every.tolist() == list(range(10)) and ones.sum() == 10


def test_a_triangle_gives_its_matrix_back() -> None:
    """Packing keeps a symmetric matrix to the bit."""
    values = np.random.default_rng(1).standard_normal((50, 33)).astype(np.float32)
    matrix = values.T @ values
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    np.testing.assert_array_equal(unpacked(packed(matrix)), matrix)


def tables(*, available: bool) -> dict[str, Any]:
    names = [f"blk.{i}.ffn_up.weight" for i in range(4)]
    errors = {
        name: {"error": {"Q4_0": 0.01 * (i + 1), "Q8_0": 0.0001}, "swallowed": {}, "change": 0.0}
        for i, name in enumerate(names)
    }
    damage = {
        "groups": [{"tensors": [name], "damage": 0.1 * (4 - i)} for i, name in enumerate(names)],
        "undone": 0.0,
    }
    predicted = {
        "available": available,
        "reason": "" if available else "architecture is not llama",
        "kld": {name: {"Q4_0": 0.03 * (4 - i), "Q8_0": 0.0} for i, name in enumerate(names)}
        if available
        else {},
        "probe": {name: 0.1 * (4 - i) for i, name in enumerate(names)} if available else {},
    }
    return {"errors": errors, "damage-1": damage, "predictions-1": predicted}


def test_predictions_are_used_where_there_are_some() -> None:
    """With gradients the losses are theirs; the evidence says how well they rank what was measured."""
    found = sensitivity_of(tables(available=True))
    assert found.losses["blk.0.ffn_up.weight"]["Q4_0"] == pytest.approx(0.12)
    assert found.report["method"] == "kfac"
    assert found.report["rank_correlation"] == pytest.approx(1.0)


def projections(*, order: int) -> dict[str, Any]:
    names = [f"blk.{i}.ffn_up.weight" for i in range(4)]
    probe = {name: 0.2 * (4 - i if order > 0 else i + 1) for i, name in enumerate(names)}
    return {
        "available": True,
        "reason": "",
        "kld": {name: {"Q4_0": value / 4, "Q8_0": 0.0} for name, value in probe.items()},
        "probe": probe,
    }


def test_of_two_predictions_the_one_that_ranks_better_is_used() -> None:
    """Both correlations are told; among equals KFAC stays; a recipe may insist on either."""
    values = tables(available=True)
    values["predictions-1"]["probe"] = {f"blk.{i}.ffn_up.weight": 0.1 * (i + 1) for i in range(4)}
    better = sensitivity_of(values | {"projections": projections(order=1)})
    assert better.report["method"] == "fisher"
    assert better.report["rank_correlations"] == {
        "errors": pytest.approx(-1.0),
        "kfac": pytest.approx(-1.0),
        "fisher": pytest.approx(1.0),
    }
    assert better.report["rank_correlation"] == pytest.approx(1.0)
    # measured .4 against predicted .8: half, to the power of the correction
    assert better.losses["blk.0.ffn_up.weight"]["Q4_0"] == pytest.approx(0.2 * 0.5**0.75)
    assert sensitivity_of(values | {"projections": projections(order=-1)}).report["method"] == "kfac"
    insisted = sensitivity_of(values | {"projections": projections(order=1)}, prefer="kfac")
    assert insisted.report["method"] == "kfac"
    del values["damage-1"]
    unmeasured = sensitivity_of(values | {"projections": projections(order=1)})
    assert unmeasured.report["method"] == "kfac" and unmeasured.report["rank_correlation"] is None


def test_without_them_measured_damage_is_used_and_the_reason_told() -> None:
    """An architecture that torch cannot read falls back, by name; plain errors rank these groups backwards."""
    found = sensitivity_of(tables(available=False))
    assert found.losses["blk.0.ffn_up.weight"]["Q4_0"] == pytest.approx(0.4)
    assert found.report["method"] == "measured damage"
    assert found.report["reason"] == "architecture is not llama"
    assert found.report["rank_correlation"] == pytest.approx(-1.0)


def test_a_type_whose_loss_is_not_known_is_no_option(tmp_path: Path) -> None:
    """Asked for a type that no table has: it is left out, never taken for free."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    with open_gguf(path) as model:
        names = [t.name for t in model.layout.tensors if is_quantisable(t)]
        errors = {
            name: {"error": {"Q4_0": 0.01, "Q8_0": 0.0001}, "swallowed": {}, "change": 0.0} for name in names
        }
        space = space_of(model, {"errors": errors}, {"types": ["Q4_0", "Q5_1", "Q8_0"]})
    assert all({option.name for option in row} == {"Q4_0", "Q8_0", "F16"} for row in space.table)
