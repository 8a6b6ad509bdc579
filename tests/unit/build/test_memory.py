"""How a model is served, as part of what memory leaves for weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.tiny_model import make_tiny_gguf

from slmops.build.steps.memory import Way, budget_of, prices, ways
from slmops.core.device.fit import ModelShape, Serving, kv_cache_bytes

SHAPE = ModelShape(100_000_000, 135_000_000, 30, 192, 192, 576, 1536, 49_152, 8192)
ASKED = {"context_tokens": 2048, "kv_cache": "q8_0", "parallel": 2, "micro_batch_tokens": 64}
TIGHT = {"serving": ASKED, "artifact_bytes": 200_000_000, "ram_bytes": 250_000_000}
FREE = {"kv_caches": ["f16", "q8_0", "q4_0"]}


def settings(found: list[Way]) -> list[tuple[str, int]]:
    return [(way.serving["kv_cache"], way.serving["context_tokens"]) for way in found]


def test_only_what_was_asked_is_tried_where_memory_is_no_bound_or_nothing_is_free() -> None:
    loose = {**TIGHT, "ram_bytes": 1 << 32, **FREE}
    assert settings(ways(loose, SHAPE, 1000, None)) == [("q8_0", 2048)]
    assert settings(ways(TIGHT, SHAPE, 1000, None)) == [("q8_0", 2048)]


def test_cache_types_and_contexts_are_tried_and_leave_what_they_save() -> None:
    """The context is halved only as far as the recipe allows; bytes that a cache saves go to the file."""
    found = ways({**TIGHT, **FREE, "least_context_tokens": 1024}, SHAPE, 1000, {"kld": {"q4_0": 0.02}})
    assert settings(found) == [
        ("q8_0", 2048),
        ("f16", 2048),
        ("q4_0", 2048),
        ("f16", 1024),
        ("q8_0", 1024),
        ("q4_0", 1024),
    ]
    assert settings(ways({**TIGHT, **FREE}, SHAPE, 1000, None)) == settings(found)[:3]
    saved = kv_cache_bytes(SHAPE, Serving(**ASKED)) - kv_cache_bytes(SHAPE, Serving(**found[2].serving))
    assert found[2].budget_bytes - found[0].budget_bytes == saved
    assert [way.price for way in found[:3]] == [0.0, 0.0, 0.02]
    # half the context must at least halve the divergence, the cache's own part included
    assert found[5].worth(0.01) == pytest.approx(2 * (0.01 + 0.02))


def test_a_derived_budget_is_what_it_would_be_without_memory() -> None:
    derived = {"because": "memory", "artifact_bytes": 10, "without_memory": 20}
    assert budget_of({"artifact_bytes": None}, derived)["artifact_bytes"] == 20
    assert budget_of({"artifact_bytes": None}, {**derived, "because": "knee"})["artifact_bytes"] == 10
    assert budget_of({"artifact_bytes": 5}, None)["artifact_bytes"] == 5


def test_prices_are_measured_where_memory_is_the_bound_and_only_there(tmp_path: Path) -> None:
    """Fewer bits of cache cost more; one target that memory bounds is enough; where none is, no text is even read."""
    model = make_tiny_gguf(tmp_path / "tiny.gguf", seed=3, scale=0.8)
    text = tmp_path / "text.json"
    text.write_text(
        json.dumps([[index % 250 + 3 for index in range(start, start + 70)] for start in range(0, 700, 70)])
    )
    targets: dict[str, Any] = {"roomy": {"artifact_bytes": 10_000, "ram_bytes": 1 << 32}}
    context = SimpleNamespace(
        files={"model": model, "text": tmp_path / "missing.json"},
        values={"budget-derived": {"because": "memory", "artifact_bytes": 1, "without_memory": 1 << 30}},
        params={"serving": ASKED, **FREE, "targets": targets},
        progress=lambda ratio, note: None,
    )
    assert prices(context) == {"bound": [], "kld": {}, "tokens": 0}
    targets["derived"] = {"artifact_bytes": None, "ram_bytes": 150_000_000}
    context.files = {"model": model, "text": text}
    told = prices(context)
    assert told["bound"] == ["derived"] and told["tokens"] == 384
    assert 0 == told["kld"]["f16"] < told["kld"]["q8_0"] < told["kld"]["q4_0"]
    assert told == prices(context)
