"""Judging a golden pack: does a candidate behave as the build proved, and as the committed release did?

Two questions with two standards (ADR 0004):

* **own** pack: every prompt must tokenise to the expected ids, and the mean log-probability of its answer
  must lie within the variant's tolerance of the unquantised reference. This catches a damaged file, template,
  tokenizer or engine.
* **committed** pack: the release that the device has proved sets a floor for each answer. Old and new model
  are compared on the same device and the same prompts; the new one may lose at most ``max_drop_ratio`` of
  them. This catches a release that is internally consistent and bad.

A prompt may carry a **trace**: what this very file said at every token of a long text when it was built. Its mean over a text
hides most faults, because one token gains what another loses; the mean of the absolute differences does not. What is tolerated
there is what other kernels and KV-cache types do to a good file (ADR 0012).

An engine that gives no log-probabilities is judged by its **answers**: what it says at temperature 0, against the
answer in the pack. That notices less (no token ids, no drift below a changed word) and may notice what is no fault: a
quantised model may choose another word where two are about equally likely. So only answers that a later release must
keep are judged, and ``SAME_ANSWERS_RATIO`` of them suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slmops.core.evidence.statistics import PairedCounts

#: of the answers judged, so many must be the pack's to the letter, where answers are all that an engine gives
SAME_ANSWERS_RATIO = 0.75
#: the floor of a release for an answer that a later one need not keep; any floor below the second says so: no model is
#: that unsure on average
NO_FLOOR, LEAST_FLOOR = -1000.0, -100.0
#: KV-cache types between which a model differs no more than between two machines
FINE_KV_TYPES = frozenset({"f32", "f16", "bf16", "q8_0"})
#: of a traced text that the context cuts off: tokens below which it is not judged, and how much wider its tolerance is
LEAST_OF_TRACE, CUT_TOLERANCE = 16, 2.0
#: a trace tells no smaller log-probability than this
TRACE_LEAST = -15.9375


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What the engine on this device said of one prompt.

    Attributes:
        tokens_sha256: digest of the token ids that the device made of prompt and answer.
        mean_logprob: mean log-probability per answer token, nats; None when the engine could not score it.
        logprobs: of each answer token.
        cut: the context that it is served with holds only the beginning: ``logprobs`` are of that, and there is no mean.
        same_answer: where an engine cannot score at all: whether it says the answer at temperature 0.
    """

    tokens_sha256: str
    mean_logprob: float | None
    logprobs: tuple[float, ...] = ()
    cut: bool = False
    same_answer: bool | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """What the file said at each answer token when it was built; see ``artifact.manifest.GoldenTrace``."""

    kv_cache: str
    logprobs: tuple[float, ...]
    tolerance: float
    tolerance_other_kv: float

    def distance(self, logprobs: Sequence[float], *, cut: bool = False) -> float:
        """Mean absolute difference, nats a token; NaN when there are others than expected.

        Args:
            logprobs: of every token; of the first ones when ``cut``.
            cut: see :class:`PromptScore`.
        """
        if not logprobs or len(logprobs) > len(self.logprobs):
            return math.nan
        if len(logprobs) < len(self.logprobs) and not cut:
            return math.nan
        pairs = zip(logprobs, self.logprobs, strict=False)
        return sum(abs(max(now, TRACE_LEAST) - then) for now, then in pairs) / len(logprobs)

    def allowed(self, kv_cache: str) -> float:
        """What is tolerated of an engine with this KV-cache type."""
        alike = kv_cache == self.kv_cache or {kv_cache, self.kv_cache} <= FINE_KV_TYPES
        return self.tolerance if alike else self.tolerance_other_kv


@dataclass(frozen=True, slots=True)
class PromptExpectation:
    """What the release says of one prompt; see ``artifact.manifest.GoldenExpectation``."""

    id: str
    tokens_sha256: str
    reference_logprob: float
    tolerance: float
    floor: float
    trace: Trace | None = None

    @property
    def counts_later(self) -> bool:
        """Whether a later release must keep this answer."""
        return self.floor > LEAST_FLOOR


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


def judge_own(
    expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore], kv_cache: str = ""
) -> OwnResult:
    """Judge a candidate by its own pack; a missing score is a failure.

    Args:
        expectations: of the pack.
        scores: by prompt id.
        kv_cache: the engine's KV-cache type.
    """
    if by_answers(scores):
        return _judge_answers(expectations, scores)
    problems: list[str] = []
    for expected in expectations:
        score = scores.get(expected.id)
        if score is not None and score.cut and expected.trace is not None:
            problems += _judge_beginning(expected, expected.trace, score, kv_cache)
        elif score is None or score.mean_logprob is None:
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
        elif expected.trace is not None:
            distance, allowed = expected.trace.distance(score.logprobs), expected.trace.allowed(kv_cache)
            if not distance <= allowed:  # NaN fails, too
                problems.append(
                    f"{expected.id}: its tokens' log-probabilities are {distance:.3f} nats from what this file said when it "
                    f"was built, on average; at most {allowed:.3f} is expected of a whole file"
                )
    return OwnResult(len(expectations) - len(problems), tuple(problems))


def _judge_beginning(
    expected: PromptExpectation, trace: Trace, score: PromptScore, kv_cache: str
) -> list[str]:
    """Judge what fits of a traced text: fewer tokens have a wider mean, and too few say nothing."""
    if score.tokens_sha256 != expected.tokens_sha256:
        return [f"{expected.id}: tokens differ (chat template or tokenizer is not the one that was built)"]
    if len(score.logprobs) < LEAST_OF_TRACE:
        return []
    distance, allowed = trace.distance(score.logprobs, cut=True), CUT_TOLERANCE * trace.allowed(kv_cache)
    if distance <= allowed:  # NaN fails
        return []
    return [
        f"{expected.id}: the log-probabilities of its first {len(score.logprobs)} tokens are {distance:.3f} nats from what this "
        f"file said when it was built, on average; at most {allowed:.3f} is expected of a whole file"
    ]


def by_answers(scores: Mapping[str, PromptScore]) -> bool:
    """Whether answers are all that these scores hold."""
    return any(score.same_answer is not None for score in scores.values())


def _judge_answers(expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore]) -> OwnResult:
    sure = [one for one in expectations if one.counts_later] or list(expectations)
    lost = [one.id for one in sure if (score := scores.get(one.id)) is None or not score.same_answer]
    kept = len(sure) - len(lost)
    if kept >= SAME_ANSWERS_RATIO * len(sure):
        return OwnResult(kept, ())
    return OwnResult(kept, tuple(f"{name}: another answer at temperature 0" for name in lost))


def keeps_answers(
    expectations: Sequence[PromptExpectation], scores: Mapping[str, PromptScore]
) -> dict[str, bool]:
    """For each prompt, whether the model still finds the expected answer likely enough (its floor).

    Prompts without a floor are left out: they have no vote on a later release, and must not dilute what it may lose.
    """
    kept: dict[str, bool] = {}
    for expected in expectations:
        if not expected.counts_later:
            continue
        score = scores.get(expected.id)
        if score is not None and score.same_answer is not None:
            kept[expected.id] = score.same_answer
        else:
            kept[expected.id] = (
                score is not None and score.mean_logprob is not None and score.mean_logprob >= expected.floor
            )
    return kept


def judge_paired(old: Mapping[str, bool], new: Mapping[str, bool], max_drop_ratio: float) -> PairedResult:
    """Compare which answers of the committed pack the old and the new model keep.

    Args:
        old: prompt id to whether it was kept; ``new``: the same; a prompt that is missing there is lost.
        new: see above.
        max_drop_ratio: share of the prompts that may be lost.
    """
    ids = sorted(old)
    counts = PairedCounts.of([old[i] for i in ids], [new.get(i, False) for i in ids])
    lost = tuple(i for i in ids if old[i] and not new.get(i, False))
    return PairedResult(counts, max_drop_ratio, lost)
