"""Plain words follow the figures, and the picture shows them: what is not measured is not said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.support.build_directory import make_build_directory

from slmops.artifact.build_index import Build
from slmops.build import load_build
from slmops.build.picture import svg
from slmops.build.report import explain, plot, points

ROW: dict[str, Any] = {
    "profile": "pi5-8gb",
    "artifact_bytes": 80_000_000,
    "budget": {"allowed_bytes": 81_000_000, "bound": "artifact_bytes", "derived": None},
    "quantised": {"F32": 5, "IQ4_NL": 10, "Q8_0": 20},
    "gates": [],
    "figures": {
        "bits_per_weight": 4.7,
        "decode_tps": 120.0,
        "predicted_decode_tps": 55.4,
        "rss_bytes": 210_000_000,
        "flips_ratio": 0.025,
        "items": 80,
        "same_top_ratio": 0.9,
        "scored_tokens": 2000,
        "kld_mean": 0.05,
        "exact_match_ratio": 0.6,
    },
}
EVIDENCE = {"reference": {"exact_match_ratio": 0.65, "items": 80}, "split": None}
SHAPE = {"vocabulary": 49_152, "hidden": 576, "parameters": 134_515_008}


class _Variant:
    profile = "pi5-8gb"
    shape = SHAPE


class _Build:
    variants = (_Variant(),)


def said(row: dict[str, Any] | None = None, **evidence: Any) -> dict[str, str]:
    (found,) = explain(_Build(), EVIDENCE | evidence | {"variants": [row or ROW]})  # type: ignore[arg-type]
    return {key: "\n".join(value) for key, value in found.items() if key != "profile"}


def changed(**figures: Any) -> dict[str, Any]:
    row = copy.deepcopy(ROW)
    row["figures"] |= figures
    return row


def test_what_was_chosen() -> None:
    chosen = said()["chosen"]
    assert "80.0 MB, 4.7 bits a weight; 81.0 MB were allowed: the recipe's budget" in chosen
    assert "20 in Q8_0, 10 in IQ4_NL" in chosen
    assert "120 tokens/s measured here with one thread, 55 predicted" in chosen
    derived = copy.deepcopy(ROW)
    derived["budget"]["derived"] = {"because": "knee"}
    assert "quality falls steeply below this size" in said(derived)["chosen"]


def test_what_probation_costs_a_device() -> None:
    """In tokens, and in seconds at a speed that was measured; nothing where it was not."""
    assert "golden pack" not in said()["chosen"]
    row = changed(prefill_tps=200.0) | {"golden": {"tokens": 800}}
    assert (
        "scores 800 tokens of its golden pack before it commits, 4 s at the 200 tokens/s"
        in said(row)["chosen"]
    )


def test_what_it_costs() -> None:
    cost = said()["cost"]
    assert "answers 1 in 40 held-out items (2 of 80) differently from the unquantised model" in cost
    assert "at 1 in 10 of 2000 places its likeliest next token is another one" in cost
    assert "exactly right: 48 of 80, unquantised 52 of 80" in cost
    nothing = said(changed(flips_ratio=0.0, same_top_ratio=1.0))["cost"]
    assert "all 80 held-out items word for word" in nothing
    assert "at all of 2000 places" in nothing
    assert "held-out items" not in said(changed(flips_ratio=None))["cost"]
    assert "answers all held-out items (80 of 80) differently" in said(changed(flips_ratio=1.0))["cost"]
    assert (
        "answers 75% of the held-out items (60 of 80) differently" in said(changed(flips_ratio=0.75))["cost"]
    )
    failing = copy.deepcopy(ROW)
    failing["gates"] = [{"gate": "kld.mean", "verdict": "fail", "reason": "0.3 is too much", "needed": 0}]
    assert "gate kld.mean did not pass: 0.3 is too much" in said(failing)["cost"]


def test_what_would_help() -> None:
    """More bytes when divergence is high, a smaller vocabulary below the knee, items when a gate lacks them, training."""
    helping = said()["help"]
    assert "a budget larger by 16.8 MB" in helping
    assert "49152 tokens take 21% of the weights" in helping
    assert said(changed(kld_mean=0.004, bits_per_weight=8.5))["help"] == ""
    unsettled = copy.deepcopy(ROW)
    unsettled["gates"] = [
        {"gate": "task.exact_match", "verdict": "inconclusive", "reason": "", "needed": 240}
    ]
    assert "about 240 more items would settle gate task.exact_match" in said(unsettled)["help"]
    unsettled["gates"][0]["gate"] = "kld.mean"
    assert "about 240 more held-out texts would settle gate kld.mean" in said(unsettled)["help"]
    unsettled["gates"][0]["gate"] = "decode_tps"
    assert "a measurement on a device of the profile would settle gate decode_tps" in said(unsettled)["help"]
    few = said(split={"examples": 12, "held_out": 6})["help"]
    assert "12 were given, so 6 could be held out" in few
    weak = said(reference={"exact_match_ratio": 0.1, "items": 80})["help"]
    assert "exactly right on 10% of the items, which no file format mends" in weak


def test_how_it_is_served_and_what_another_way_would_leave_for_weights() -> None:
    """What the blueprint should say; another cache or context only where it would gain something, its own price counted."""
    row = copy.deepcopy(ROW)
    row |= {
        "serving": {"kv_cache": "q4_0", "context_tokens": 2048, "parallel": 2},
        "kv_cache_kld": 0.01,
        "expected_kld": 0.05,
        "memory": [],
    }
    assert "kv_cache q4_0, 2048 tokens of context, 2 at once: say so" in said(row)["chosen"]
    assert "costs about 0.0100 nats" in said(row)["chosen"]
    assert "served with" not in said(row)["help"]
    way = {"kv_cache": "q4_0", "context_tokens": 1024, "allowed_bytes": 90_000_000, "expected_kld": 0.02}
    row["memory"] = [
        way | {"kv_cache_kld": 0.01},
        way | {"kv_cache": "f16", "expected_kld": None, "kv_cache_kld": 0.0},
    ]
    helping = said(row)["help"]
    assert "kv_cache q4_0 and 1024 tokens of context" in helping
    assert "90.0 MB for the file: divergence 0.030 expected where this one has 0.060" in helping
    row["memory"] = [way | {"kv_cache_kld": None}]
    assert "not counting what the cache type itself costs" in said(row)["help"]
    row["memory"] = [way | {"kv_cache_kld": 0.03}]  # .050 instead of .060: not worth a sentence
    assert "served with" not in said(row)["help"]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return load_build(make_build_directory(tmp_path / "b"))


POINTS = [
    {"profile": "small", "artifact_bytes": 70_000_000, "kld_mean": 0.2, "decode_tps": 150.0, "pareto": True},
    {
        "profile": "a<b & c",
        "artifact_bytes": 90_000_000,
        "kld_mean": 0.05,
        "decode_tps": 110.0,
        "pareto": True,
    },
    {
        "profile": "large",
        "artifact_bytes": 140_000_000,
        "kld_mean": 0.06,
        "decode_tps": 90.0,
        "pareto": False,
    },
]


def test_which_variants_are_beaten(build: Build) -> None:
    found = points(build)
    assert {p["profile"] for p in found} == {v.profile for v in build.variants}
    assert any(p["pareto"] for p in found)
    json.dumps(found)


def test_the_picture_is_whole() -> None:
    """Well-formed, names escaped, every point inside the frame, faster ones larger, beaten ones hollow."""
    root = ElementTree.fromstring(svg("t <x>", POINTS))
    circles = root.findall("{*}circle")
    texts = [text.text for text in root.findall("{*}text")]
    assert len(circles) == 3
    assert any("a<b & c · 110 tokens/s" in str(text) for text in texts)
    assert all(90 <= float(c.get("cx", 0)) <= 720 and 60 <= float(c.get("cy", 0)) <= 390 for c in circles)
    radii = [float(c.get("r", 0)) for c in circles]
    assert radii == sorted(radii, reverse=True)
    assert [c.get("fill") for c in circles].count("#ffffff") == 1
    assert "<script" not in svg("<script>", POINTS[:1])


def test_the_text_plot_has_every_point() -> None:
    lines = plot(POINTS)
    assert [sum(str(n) in line.partition("|")[2] for line in lines[:12]) for n in (1, 2, 3)] == [1, 1, 1]
    assert lines[0].strip().startswith("0.200 |1")
    assert "70.0 MB" in lines[-2]
    assert len(plot(POINTS[:1])) == 15
