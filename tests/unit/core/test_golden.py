"""Golden packs: the candidate's own, and the committed release's."""

from __future__ import annotations

import math

import pytest

from slmops.core.evidence.golden import (
    OwnResult,
    PairedResult,
    PromptExpectation,
    PromptScore,
    judge_own,
    judge_paired,
    keeps_answers,
)
from slmops.core.evidence.statistics import PairedCounts

TOKENS = "t" * 64
EXPECTED = [PromptExpectation(name, TOKENS, -0.5, 0.1, -1.0) for name in ("p1", "p2", "p3")]


def scores(*values: float | None, tokens: str = TOKENS) -> dict[str, PromptScore]:
    return {f"p{n}": PromptScore(tokens, value) for n, value in enumerate(values, 1)}


def test_a_healthy_candidate_passes_its_own_pack() -> None:
    result = judge_own(EXPECTED, scores(-0.5, -0.41, -0.59))
    assert (result.ok, result.passed, result.problems) == (True, 3, ())


@pytest.mark.parametrize(
    ("scored", "problem"),
    [
        (scores(-0.5, -0.5), "p3: not scored"),
        (scores(-0.5, -0.5, None), "p3: not scored"),
        (scores(-0.5, -0.5, -0.61), "p3: log-probability -0.610, expected -0.500 ± 0.100"),
        (scores(-0.5, -0.5, -0.39), "p3: log-probability -0.390"),
        (scores(-0.5, -0.5, math.nan), "p3: log-probability nan"),
    ],
)
def test_one_prompt_out_of_tolerance_fails_and_is_named(scored: dict[str, PromptScore], problem: str) -> None:
    """Too likely is as suspicious as too unlikely; no score and NaN are failures."""
    result = judge_own(EXPECTED, scored)
    assert (result.ok, result.passed) == (False, 2)
    assert result.problems[0].startswith(problem)


def test_other_tokens_mean_another_template() -> None:
    result = judge_own(EXPECTED, scores(-0.5, -0.5, -0.5, tokens="u" * 64))
    assert result.passed == 0
    assert "tokens differ" in result.problems[0]


def test_an_empty_pack_proves_nothing() -> None:
    assert not judge_own([], {}).ok


def test_an_answer_is_kept_above_its_floor() -> None:
    assert keeps_answers(EXPECTED, scores(-1.0, -1.01, math.nan)) == {"p1": True, "p2": False, "p3": False}
    assert keeps_answers(EXPECTED, scores(-0.1, None)) == {"p1": True, "p2": False, "p3": False}


def test_the_new_model_may_lose_what_the_committed_release_allows() -> None:
    old = {f"p{n}": True for n in range(10)}
    one_lost = {**old, "p3": False}
    assert judge_paired(old, one_lost, 0.1) == PairedResult(PairedCounts(9, 1, 0, 0), 0.1, ("p3",))
    assert judge_paired(old, one_lost, 0.1).ok
    assert not judge_paired(old, one_lost, 0.05).ok
    assert judge_paired(old, {}, 0.5).lost == tuple(sorted(old))


def test_what_the_old_model_lost_already_is_not_held_against_the_new_one() -> None:
    result = judge_paired({"a": False, "b": True}, {"a": False, "b": True}, 0.0)
    assert (result.ok, result.lost) == (True, ())


def test_a_device_without_a_committed_release_has_nothing_to_lose() -> None:
    assert judge_paired({}, {"a": True}, 0.0).ok


def answers(*same: bool) -> dict[str, PromptScore]:
    return {f"p{n}": PromptScore("", None, same_answer=one) for n, one in enumerate(same, 1)}


def test_an_engine_without_scores_is_judged_by_its_answers() -> None:
    """Three of four suffice; fewer name the lost ones; answers that need not be kept do not count."""
    four = [PromptExpectation(f"p{n}", TOKENS, -0.5, 0.1, -1.0) for n in range(1, 5)]
    assert judge_own(four, answers(True, True, True, False)) == OwnResult(3, ())
    failed = judge_own(four, answers(True, True, False, False))
    assert (failed.ok, failed.passed) == (False, 2)
    assert failed.problems[0] == "p3: another answer at temperature 0"
    unsure = [*four[:2], *(PromptExpectation(f"p{n}", TOKENS, -2.0, 0.1, -1000.0) for n in (3, 4))]
    assert judge_own(unsure, answers(True, True, False, False)).ok
    assert not judge_own(unsure, answers(True, False, True, True)).ok
    kept = keeps_answers(unsure, answers(True, False, False, True))
    assert kept == {"p1": True, "p2": False, "p3": True, "p4": True}
