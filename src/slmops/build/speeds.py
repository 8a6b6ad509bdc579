"""Speed tables: how long one weight takes in each type, measured here (:mod:`slmops.build.steps.type_speed`) or given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.core.errors import DocumentError

TABLE = "speed-table"


def read_table(path: Path) -> dict[str, Any]:
    """A table from a file: ``{"machine": name, "seconds_per_weight": {type: s}, "fixed_s": s}``.

    Raises:
        DocumentError: it is none.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        seconds = {str(name): float(value) for name, value in table["seconds_per_weight"].items()}
        result = {
            "machine": str(table["machine"]),
            "seconds_per_weight": seconds,
            "fixed_s": float(table.get("fixed_s", 0.0)),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"{path}: no speed table: {type(error).__name__} {error}",
            hint='write {"machine": NAME, "seconds_per_weight": {"Q4_0": 1.1e-11, ...}, "fixed_s": 0.0005}',
        ) from error
    if not seconds or min(seconds.values()) < 0:
        raise DocumentError(
            f"{path}: seconds_per_weight must be positive", hint="seconds that one weight takes of one token"
        )
    return result


def speed_table(files: Mapping[str, Path], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table among a step's inputs; None without one."""
    if TABLE in files:
        return read_table(files[TABLE])
    found: dict[str, Any] | None = values.get(TABLE)
    return found


def budget_seconds(table: Mapping[str, Any] | None, params: Mapping[str, Any]) -> float:
    """What one token may take for weights; infinite when no speed was asked for or nothing is known."""
    asked = params.get("decode_tps")
    if table is None or not asked:
        return math.inf
    return max(1 / float(asked) - float(table["fixed_s"]), 0.0)


def rates_of(speeds: Mapping[str, Any], types: Sequence[str]) -> dict[str, float]:
    """Seconds of one weight in every type: measured, else the slowest known; F16 at least twice Q8_0."""
    known: Mapping[str, float] = speeds["seconds_per_weight"]
    slowest = max(known.values())
    rates = {name: known.get(name, slowest) for name in types}
    if "F16" not in known:
        rates["F16"] = max(slowest, 2 * known.get("Q8_0", 0.0))
    return rates
