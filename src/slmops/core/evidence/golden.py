"""Judging a golden pack: does a candidate behave as the build proved, and as the committed release did?

Two questions with two standards (ADR 0004):

* **own** pack: every prompt must tokenise to the expected ids, and the mean log-probability of its answer
  must lie within the variant's tolerance of the unquantised reference. This catches a damaged file, template,
  tokenizer or engine.
* **committed** pack: the release that the device has proved sets a floor for each answer. Old and new model
  are compared on the same device and the same prompts; the new one may lose at most ``max_drop_ratio`` of
  them. This catches a release that is internally consistent and bad.

An engine that gives no log-probabilities is judged by its **answers**: what it says at temperature 0, against the
answer in the pack. That notices less (no token ids, no drift below a changed word) and may notice what is no fault: a
quantised model may choose another word where two are about equally likely. So only answers that a later release must
keep are judged, and ``SAME_ANSWERS_RATIO`` of them suffice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slmops.core.evidence.statistics import PairedCounts

#: of the answers judged, so many must be the pack's to the letter, where answers are all that an engine gives
SAME_ANSWERS_RATIO = 0.75
#: an answer with a floor below is one that a later release need not keep: no model is that unsure on average
_NO_FLOOR = -100.0


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What the engine on this device said of one prompt.

    Attributes:
        tokens_sha256: digest of the token ids that the device made of prompt and answer.
        mean_logprob: mean log-probability per answer token, nats; None when the engine could not score it.
        same_answer: where an engine cannot score at all: whether it says the answer at temperature 0.
    """

    tokens_sha256: str
    mean_logprob: float | None
    same_answer: bool | None = None


@dataclass(frozen=True, slots=True)
class PromptExpectation:
    """What the release says of one prompt; see ``artifact.manifest.GoldenExpectation``."""

    id: str
    tokens_sha256: str
    reference_logprob: float
    tolerance: float
    floor: float


@dataclass(frozen=True, slots=True)
class OwnResult:
    """Outcome of the candidate's own pack; ``problems`` names each failing prompt and why."""

    passed: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every prompt passed, and there was at least one."""
        return not self.problems and self.passed > 0


@dataclass(frozen=True, slots=True)
class PairedResult:
    """Outcome of the committed release's pack under old and new model."""

    counts: PairedCounts
    max_drop_ratio: float
    lost: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """The new model lost no more prompts than the committed release allows."""
        return self.counts.n == 0 or self.counts.drop <= self.max_drop_ratio + 1e-12


def judge_own(expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore]) -> OwnResult:
    """Judge a candidate by its own pack; a missing score is a failure."""
    if by_answers(scores):
        return _judge_answers(expectations, scores)
    problems: list[str] = []
    for expected in expectations:
        score = scores.get(expected.id)
        if score is None or score.mean_logprob is None:
            problems.append(f"{expected.id}: not scored")
        elif score.tokens_sha256 != expected.tokens_sha256:
            problems.append(
                f"{expected.id}: tokens differ (chat template or tokenizer is not the one that was built)"
            )
        elif not abs(score.mean_logprob - expected.reference_logprob) <= expected.tolerance:  # NaN fails, too
            problems.append(
                f"{expected.id}: log-probability {score.mean_logprob:.3f}, "
                f"expected {expected.reference_logprob:.3f} ± {expected.tolerance:.3f}"
            )
    return OwnResult(len(expectations) - len(problems), tuple(problems))


def by_answers(scores: Mapping[str, PromptScore]) -> bool:
    """Whether answers are all that these scores hold."""
    return any(score.same_answer is not None for score in scores.values())


def _judge_answers(expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore]) -> OwnResult:
    sure = [one for one in expectations if one.floor > _NO_FLOOR] or list(expectations)
    lost = [one.id for one in sure if (score := scores.get(one.id)) is None or not score.same_answer]
    kept = len(sure) - len(lost)
    if kept >= SAME_ANSWERS_RATIO * len(sure):
        return OwnResult(kept, ())
    return OwnResult(kept, tuple(f"{name}: another answer at temperature 0" for name in lost))


def keeps_answers(
    expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore]
) -> dict[str, bool]:
    """For each prompt, whether the model still finds the expected answer likely enough (its floor)."""
    kept: dict[str, bool] = {}
    for expected in expectations:
        score = scores.get(expected.id)
        if score is not None and score.same_answer is not None:
            kept[expected.id] = score.same_answer or expected.floor <= _NO_FLOOR
        else:
            kept[expected.id] = (
                score is not None and score.mean_logprob is not None and score.mean_logprob >= expected.floor
            )
    return kept


def judge_paired(old: Mapping[str, bool], new: Mapping[str, bool], max_drop_ratio: float) -> PairedResult:
    """Compare which answers of the committed pack the old and the new model keep."""
    ids = sorted(old)
    counts = PairedCounts.of([old[i] for i in ids], [new.get(i, False) for i in ids])
    lost = tuple(i for i in ids if old[i] and not new.get(i, False))
    return PairedResult(counts, max_drop_ratio, lost)
