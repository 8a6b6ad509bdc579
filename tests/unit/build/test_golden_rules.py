"""Golden expectations: what the variant may lose on a device, and what a later release must keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.artifact.manifest import GoldenPack, decode
from slmops.build.graph import StepContext
from slmops.build.steps.golden import (
    BASE_TOLERANCE,
    FLOOR_SLACK,
    NO_FLOOR,
    candidates_of,
    expectations_of,
    select,
)
from slmops.build.steps.golden_trace import TEXT_ID
from slmops.core.errors import BuildError


def scores(**logprobs: float) -> dict[str, dict[str, Any]]:
    return {name: {"tokens_sha256": "a" * 64, "mean_logprob": value} for name, value in logprobs.items()}


def test_tolerance_follows_the_variants_own_loss() -> None:
    """An exact variant gets the base tolerance; a lossy one twice its loss more, at least twice its mean loss."""
    reference = scores(x=-0.10, y=-0.20)
    exact = expectations_of(reference, reference, [reference])
    assert [e.tolerance for e in exact] == [BASE_TOLERANCE, BASE_TOLERANCE]
    lossy = expectations_of(reference, scores(x=-0.40, y=-0.20), [reference])
    assert [e.tolerance for e in lossy] == pytest.approx([BASE_TOLERANCE + 0.6, BASE_TOLERANCE + 0.3])
    assert [e.reference_logprob for e in lossy] == [-0.10, -0.20]


def test_the_floor_is_below_every_variant_of_the_release() -> None:
    """A fixed slack below the worst: all variants of this release hold it, a model that forgot does not."""
    reference, small, large = scores(x=-0.1), scores(x=-0.5), scores(x=-0.05)
    for own in (small, large):
        (expected,) = expectations_of(reference, own, [reference, small, large])
        assert expected.floor == pytest.approx(-0.5 - FLOOR_SLACK)
        assert all(s["x"]["mean_logprob"] > expected.floor for s in (reference, small, large))
        assert expected.floor > -1.0


def test_another_tokenisation_is_refused() -> None:
    """Reference and variant carry the same tokenizer; if not, no likelihood can be compared."""
    other = {"x": {"tokens_sha256": "b" * 64, "mean_logprob": -0.1}}
    with pytest.raises(BuildError, match="tokenise it differently"):
        expectations_of(scores(x=-0.1), other, [other])


def test_the_long_text_has_no_say_in_what_answers_may_lose() -> None:
    """No model is sure of it: its distance would widen every answer's tolerance."""
    reference = scores(x=-0.1) | {TEXT_ID: scores(x=-3.0)["x"]}
    own = scores(x=-0.1) | {TEXT_ID: scores(x=-3.4)["x"]}
    by_id = {e.id: e for e in expectations_of(reference, own, [reference], frozenset({TEXT_ID}))}
    assert by_id["x"].tolerance == BASE_TOLERANCE
    assert by_id[TEXT_ID].tolerance == pytest.approx(BASE_TOLERANCE + 0.8)
    assert by_id[TEXT_ID].floor == NO_FLOOR


def chosen(tmp_path: Path, said: dict[str, tuple[str, bool]], count: int, text: str = "") -> GoldenPack:
    """The pack for a reference that said these things; the gold answer of every item is "gold"."""
    items = [{"id": name, "messages": [{"role": "user", "content": name}], "answer": "gold"} for name in said]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"id": n, "got": got}) + "\n" for n, (got, _) in said.items())
    )
    asked = {"free": {"items": list(said), "exact": [right for _, right in said.values()]}}
    files = {"eval": tmp_path / "eval.jsonl", "answers": tmp_path / "answers.jsonl"}
    (tmp_path / "out").mkdir()
    context = StepContext(
        files,
        {"asked": asked, "text": {"text": text}},
        {"count": count, "max_drop_ratio": 0.0},
        tmp_path / "out",
        lambda r, n: None,
    )
    value = select(context)
    pack = decode((tmp_path / "out" / "golden-pack.json").read_bytes(), GoldenPack)
    assert value["prompts"] == len(pack.prompts)
    return pack


def test_right_answers_come_first_in_the_seeded_order(tmp_path: Path) -> None:
    """Wrong ones fill up, with what the model said; where it said nothing, with the gold answer."""
    said = {
        "a": ("wrong", False),
        "b": ("gold", True),
        "c": ("", False),
        "d": ("gold", True),
        "e": ("x" * 500, False),
    }
    pack = chosen(tmp_path, said, 4)
    assert [(p.id, p.answer) for p in pack.prompts] == [
        ("b", "gold"),
        ("d", "gold"),
        ("a", "wrong"),
        ("c", "gold"),
    ]


def test_the_long_text_comes_last(tmp_path: Path) -> None:
    pack = chosen(tmp_path, {"a": ("gold", True)}, 1, "A long text.")
    assert [(p.id, p.answer) for p in pack.prompts] == [("a", "gold"), (TEXT_ID, "A long text.")]


def test_enough_right_answers_leave_the_wrong_ones_out(tmp_path: Path) -> None:
    """A model that knows its task is held to right answers only."""
    said = {"a": ("wrong", False), "b": ("gold", True), "d": ("gold", True)}
    assert [p.id for p in chosen(tmp_path, said, 2).prompts] == ["b", "d"]


def test_an_unsure_answer_may_get_better() -> None:
    """It has a tolerance like any other, but no floor: a later release that answers right has not lost it."""
    reference = scores(right=-0.1, wrong=-0.2)
    by_id = {e.id: e for e in expectations_of(reference, reference, [reference], frozenset({"wrong"}))}
    assert by_id["right"].floor == pytest.approx(-0.1 - FLOOR_SLACK)
    assert by_id["wrong"].floor == NO_FLOOR
    assert by_id["wrong"].tolerance == BASE_TOLERANCE


def test_candidates_are_half_right_and_half_unsure() -> None:
    """In their order; what one half lacks the other fills; an item without a usable answer comes last."""
    ranked = ["r1", "r2", "r3", "r4", "w1", "w2", "w3"]
    exact = {name: name.startswith("r") for name in ranked}
    said = dict.fromkeys(ranked, "x") | {"w2": ""}
    assert candidates_of(ranked, exact, said, 4) == ["r1", "r2", "w1", "w3"]
    assert candidates_of(ranked, exact, said, 6) == ["r1", "r2", "r3", "r4", "w1", "w3"]
    assert candidates_of(["w2"], exact, said, 4) == ["w2"]
    assert candidates_of(["r1", "w1", "w3"], exact, said, 4) == ["r1", "w1", "w3"]
    assert candidates_of(["r1", "r2", "r3", "w1"], exact, said, 4) == ["r1", "r2", "r3", "w1"]
