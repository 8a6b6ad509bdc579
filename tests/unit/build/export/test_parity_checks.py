"""Parity arithmetic: what passes, what fails, and the cause that a failure names."""

from __future__ import annotations

import numpy as np
import pytest

from slmops.build.export.formats import EXACT, INT8
from slmops.build.parity.checks import (
    Check,
    cause_of_ids,
    close_enough,
    divergences,
    same_answers,
    same_ids,
    same_in_steps,
    same_special,
    same_template,
)
from slmops.build.parity.texts import COUNT, SCRIPTS, strings

SPECIAL = {1: "<s>", 2: "</s>"}
LIMITS = {"kld_mean": 0.01, "kld_p99": 0.1, "same_top_ratio": 0.9}


def test_the_strings_are_a_thousand_unlike_ones_of_every_script() -> None:
    """The same ones every time; nearly all unlike; each script has some."""
    made = strings(("<|im_start|>",))
    assert len(made) == COUNT == 1000
    assert made == strings(("<|im_start|>",))
    assert len(set(made)) > 980
    for name, (first, last) in SCRIPTS.items():
        assert any(first <= ord(letter) <= last for text in made for letter in text), name
    assert any("<|im_start|>" in text for text in made)


@pytest.mark.parametrize(
    ("source", "export", "text", "cause"),
    [
        ([5, 6], [1, 5, 6], "ab", "adds BOS where the source adds none"),
        ([1, 5, 6], [1, 1, 5, 6], "ab", "double BOS"),
        ([1, 5, 6], [5, 6], "ab", "leaves out BOS"),
        ([2, 5], [7, 8, 9, 5], "</s>b", "control tokens in the text is read as plain text"),
        ([7, 8, 9, 5], [2, 5], "</s>b", "plain text is read as control tokens"),
        ([5, 6], [9, 6], "ab", "puts a space before"),
        ([5, 6], [], "ab", "drops the text"),
        ([5, 6, 7], [8, 7], "a12", "digits"),
        ([5, 6, 7], [8, 7], "abc", ""),
    ],
)
def test_causes_of_other_ids_are_named(source: list[int], export: list[int], text: str, cause: str) -> None:
    found = cause_of_ids(source, export, bos=1, special=SPECIAL, text=text)
    assert (cause in found) if cause else found == ""


def test_the_first_difference_of_ids_is_shown() -> None:
    check = same_ids(["x", "ab"], [[3], [5, 6]], [[3], [5, 7]], bos=1, special=SPECIAL)
    assert not check.passed and check.differing == 1
    assert "'ab': at token 1 source has [6], export [7]" in check.first
    assert same_ids(["x"], [[3]], [[3]], bos=1, special=SPECIAL).passed


def test_a_template_that_begins_a_prompt_twice_is_named() -> None:
    check = same_template([[]], ["hi"], ["<s>hi"], bos_text="<s>")
    assert not check.passed and "begun twice" in check.cause
    trimmed = same_template([[]], ["hi\n"], ["hi"], bos_text="<s>")
    assert "white space" in trimmed.cause
    assert same_template([[]], ["hi"], ["hi"], bos_text="").passed


def test_stop_tokens_are_compared_as_sets() -> None:
    source = {"bos_token": 1, "eos_tokens": [2, 0], "add_bos": False}
    assert same_special(source, {"eos_tokens": [0, 2]}).passed
    check = same_special(source, {"eos_tokens": [2], "bos_token": 1})
    assert not check.passed and "eos_tokens" in check.first


def test_greedy_answers_may_part_where_the_source_is_even() -> None:
    """A parting where the source is sure is a difference; where two tokens were even it is none."""
    ours, theirs = [[1, 2, 3, 4]], [[1, 9, 3, 4]]

    def check(first_tokens: int, margin: float, even_nats: float = 0.05) -> Check:
        return same_answers(ours, theirs, first_tokens=first_tokens, margins=[margin], even_nats=even_nats)

    assert not check(4, 0.5).passed
    assert check(4, 0.01).passed and check(4, 0.5, even_nats=0.6).passed
    assert check(1, 0.5).passed
    assert check(0, 9.0).figures["same_prefix_ratio"] == 0.25


def test_a_coarser_precision_may_turn_a_surer_choice() -> None:
    """0.33 nats, as an int8 file of a small model turned: noise at its limit; fp32 has no such noise."""
    assert EXACT.even_nats < 0.1
    assert 0.33 < INT8.even_nats < 0.5


def test_divergence_is_the_textbooks() -> None:
    """Against the definition, on a padded vocabulary."""
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    padded = np.concatenate([np.log(q), [-30.0]]).astype(np.float32)
    kld, same = divergences(np.log(p)[None].astype(np.float32), padded[None])
    assert kld[0] == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)
    assert not same[0]


def test_thresholds_hold_and_are_named_when_not() -> None:
    good, top = np.full(200, 0.001), np.ones(200, dtype=bool)
    assert close_enough(good, top, **LIMITS).passed
    bad = good.copy()
    bad[150:] = 0.5
    check = close_enough(bad, top, **LIMITS)
    assert not check.passed and "kld_mean" in check.first and "kld_p99" in check.first
    top[:50] = False
    assert "same_top_ratio" in close_enough(good, top, **LIMITS).first


def test_numbers_that_are_none_never_pass() -> None:
    broken = np.full(10, np.nan)
    check = close_enough(broken, np.ones(10, dtype=bool), **LIMITS)
    assert not check.passed and "no numbers" in check.cause


def test_decoding_must_agree_with_a_whole_pass() -> None:
    rows = np.array([[0.0, 5.0, 1.0], [0.0, 1.0, 1.001]], dtype=np.float32)
    assert same_in_steps(rows, [1, 2], [1, 2]).passed
    assert same_in_steps(rows, [1, 1], [1, 2]).passed  # even
    assert not same_in_steps(rows, [0, 2], [1, 2]).passed
