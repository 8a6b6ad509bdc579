"""Golden packs: the candidate's own, and the committed release's."""

from __future__ import annotations

import math

import pytest

from slmops.core.evidence.golden import (
    NO_FLOOR,
    TRACE_LEAST,
    OwnResult,
    PairedResult,
    PromptExpectation,
    PromptScore,
    Trace,
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
    assert kept == {"p1": True, "p2": False}


# ---- traces: a long text, token by token

SAID = (-1.0, -3.0, -0.5, -8.0)
TRACED = [
    PromptExpectation("text", TOKENS, -3.125, 0.5, NO_FLOOR, Trace("q8_0", SAID, 0.2, 0.4)),
]


def traced(*logprobs: float, kv_cache: str = "q8_0") -> OwnResult:
    score = PromptScore(TOKENS, sum(logprobs) / max(len(logprobs), 1), logprobs)
    return judge_own(TRACED, {"text": score}, kv_cache)


def test_a_fault_that_leaves_the_mean_alone_is_noticed_in_the_trace() -> None:
    """One token gains what another loses: the mean is to the digit what it was."""
    assert traced(*SAID).ok
    result = traced(-1.5, -2.5, -1.0, -7.5)
    assert sum((-1.5, -2.5, -1.0, -7.5)) == sum(SAID)
    assert not result.ok
    assert "0.500 nats from what this file said when it was built" in result.problems[0]


@pytest.mark.parametrize(
    ("kv_cache", "passes"), [("q8_0", False), ("f16", False), ("bf16", False), ("q5_1", True), ("q4_0", True)]
)
def test_another_kv_cache_type_has_a_tolerance_of_its_own(kv_cache: str, passes: bool) -> None:
    """Types that are as good as the build's share its tolerance."""
    assert traced(-1.3, -3.3, -0.2, -8.3, kv_cache=kv_cache).ok is passes


def test_a_trace_with_other_tokens_or_none_or_nan_fails() -> None:
    assert not traced(*SAID[:3], kv_cache="q8_0").ok
    assert not judge_own(TRACED, {"text": PromptScore(TOKENS, -3.125)}, "q8_0").ok
    assert not traced(-1.0, math.nan, -0.5, -8.0).ok


def beginning(*logprobs: float, tokens: str = TOKENS) -> OwnResult:
    long = Trace("q8_0", (-1.0,) * 40, 0.2, 0.4)
    expected = [PromptExpectation("text", TOKENS, -1.0, 0.5, NO_FLOOR, long)]
    return judge_own(expected, {"text": PromptScore(tokens, None, logprobs, cut=True)}, "q8_0")


def test_a_text_that_the_context_cuts_off_is_judged_by_its_beginning() -> None:
    """A blueprint may serve less context than the build had: a good file passes, a damaged one and another tokenizer do not."""
    assert beginning(*(-1.1,) * 20).ok
    assert "first 20 tokens are 0.500 nats" in beginning(*(-1.5,) * 20).problems[0]
    assert not beginning(*(math.nan,) * 20).ok
    assert beginning(*(-9.0,) * 15).ok
    assert "tokens differ" in beginning(*(-1.0,) * 20, tokens="b" * 64).problems[0]
    assert not beginning(*(-1.0,) * 41).ok


def test_what_is_beyond_a_traces_range_is_as_it_was() -> None:
    """A trace tells no less than -15.9: a token that was less likely than that is no fault."""
    expected = [PromptExpectation("t", TOKENS, -20.0, 9.0, NO_FLOOR, Trace("f16", (TRACE_LEAST,), 0.1, 0.1))]
    assert judge_own(expected, {"t": PromptScore(TOKENS, -21.0, (-21.0,))}, "f16").ok


def test_a_prompt_without_a_floor_has_no_vote_on_a_later_release() -> None:
    """Else it would dilute the share of answers that a release may lose."""
    assert keeps_answers([*EXPECTED, *TRACED], scores(-0.5, -0.5, -0.5)) == {
        "p1": True,
        "p2": True,
        "p3": True,
    }
