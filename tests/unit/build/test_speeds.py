"""Speed tables: what is not known counts as slow, and what is none is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slmops.build.speeds import budget_seconds, rates_of, read_table, speed_table
from slmops.core.errors import DocumentError

TABLE = {
    "machine": "pi5",
    "seconds_per_weight": {"Q4_0": 1e-11, "Q5_0": 3e-11, "Q8_0": 2e-11},
    "fixed_s": 0.001,
}


def test_a_table_of_another_machine_is_read(tmp_path: Path) -> None:
    """A file gives the same as a measured value."""
    path = tmp_path / "pi5.json"
    path.write_text(json.dumps(TABLE))
    assert speed_table({"speed-table": path}, {}) == speed_table({}, {"speed-table": TABLE}) == TABLE
    assert speed_table({}, {}) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"machine": "x"}', '{"machine": "x", "seconds_per_weight": {"Q4_0": -1}}']
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    """With the path and an example."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match=r"bad\.json"):
        read_table(path)


def test_unknown_types_count_as_slow() -> None:
    """A type that was not measured never wins by that."""
    rates = rates_of(TABLE, ["Q4_0", "Q6_K", "F16"])
    assert rates == {"Q4_0": 1e-11, "Q6_K": 3e-11, "F16": 4e-11}


def test_the_budget_of_a_token() -> None:
    """What the speed asked for leaves after what does not depend on types."""
    assert budget_seconds(TABLE, {"decode_tps": 100}) == pytest.approx(0.009)
    assert budget_seconds(TABLE, {"decode_tps": None}) == math.inf
    assert budget_seconds(None, {"decode_tps": 100}) == math.inf
