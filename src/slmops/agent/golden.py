"""Running golden packs on this device's engine: rendering, tokenising and scoring happen here, judging in the core.

An engine whose runtime cannot score (some `external` ones) is asked for its answers at temperature 0 in place of that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

from slmops.agent.serving import Backend
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.slots import Baseline, Slot
from slmops.artifact.manifest import (
    GoldenExpectation,
    GoldenExpectations,
    GoldenPack,
    GoldenPrompt,
    decode,
    decode_trace,
    golden_tokens_digest,
)
from slmops.core.device.machine import Failure
from slmops.core.errors import SlmopsError
from slmops.core.evidence.golden import (
    OwnResult,
    PairedResult,
    PromptExpectation,
    PromptScore,
    Trace,
    by_answers,
    judge_own,
    judge_paired,
    keeps_answers,
)
from slmops.protocol.messages import GoldenReport
from slmops.runtimes import Engine

#: longest that one prompt may take before the engine counts as hung, seconds; and as much again for each token of it
PROMPT_TIMEOUT_S = 180.0
TOKEN_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Pack:
    """A golden pack with the expectations of the variant in a slot."""

    sha256: str
    pack: GoldenPack
    expectations: tuple[PromptExpectation, ...]

    @property
    def voting(self) -> frozenset[str]:
        """Prompts whose answers a later release must keep."""
        return frozenset(one.id for one in self.expectations if one.counts_later)


@dataclass(frozen=True, slots=True)
class ProbationResult:
    """What the golden packs said of a candidate.

    Attributes:
        report: the numbers, for the control plane.
        baseline: what the candidate kept of its own pack: the floor for the release after it.
        failure: None when it passed.
    """

    report: GoldenReport
    baseline: dict[str, bool]
    failure: Failure | None


def load_pack(store: ArtifactStore, slot: Slot) -> Pack:
    """Read a slot's pack and expectations, re-hashed from disk."""
    sha256 = slot.digest_of("golden-pack")
    pack = decode(store.read_blob(sha256), GoldenPack)
    expected = decode(store.read_blob(slot.digest_of("golden-expectations")), GoldenExpectations)
    return Pack(
        sha256,
        pack,
        tuple(map(expectation_of, expected.expectations)),
    )


def expectation_of(told: GoldenExpectation) -> PromptExpectation:
    """An expectation as the core judges it.

    Raises:
        TrustError: its trace is malformed.
    """
    trace = None
    if told.trace is not None:
        said = decode_trace(told.trace.logprobs)
        trace = Trace(told.trace.kv_cache, said, told.trace.tolerance, told.trace.tolerance_other_kv)
    return PromptExpectation(
        told.id, told.tokens_sha256, told.reference_logprob, told.tolerance, told.floor, trace
    )


async def score_pack(
    backend: Backend, pack: GoldenPack, voting: frozenset[str] = frozenset()
) -> dict[str, PromptScore]:
    """Score every prompt of a pack: log-probabilities of its answer under this engine, teacher-forced.

    Args:
        backend: the engine; one that cannot score is asked for its answers.
        pack: the prompts.
        voting: of these alone an answer is asked, where answers are all that there is (none: of all); the long text is no answer.
    """
    if not backend.capabilities.score:
        asked = [prompt for prompt in pack.prompts if not voting or prompt.id in voting]
        return {prompt.id: await _ask_prompt(backend, prompt) for prompt in asked}
    return await score_prompts(backend.engine, pack)


async def score_prompts(engine: Engine, pack: GoldenPack) -> dict[str, PromptScore]:
    """Score every prompt of a pack with an engine that can score."""
    return {prompt.id: await _score_prompt(engine, prompt) for prompt in pack.prompts}


async def _ask_prompt(backend: Backend, prompt: GoldenPrompt) -> PromptScore:
    """Whether the engine says the answer to the letter, but for space around it, when it takes the likeliest tokens."""
    body = {
        "model": backend.slot.model_name,
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "temperature": 0,
        "max_tokens": len(prompt.answer.encode())
        + 1,  # a token is a byte at least; the last may be the end's
    }
    try:
        response = await asyncio.wait_for(
            backend.client.post("/v1/chat/completions", json=body), PROMPT_TIMEOUT_S
        )
        said = response.json()["choices"][0]["message"]["content"] if response.is_success else None
    except (asyncio.TimeoutError, httpx.HTTPError, ValueError, LookupError, TypeError):
        said = None
    return PromptScore("", None, same_answer=isinstance(said, str) and said.strip() == prompt.answer.strip())


async def _score_prompt(engine: Engine, prompt: GoldenPrompt) -> PromptScore:
    async def render() -> tuple[list[int], int]:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        asked = await engine.apply_template(messages)
        answer = await engine.tokenize(prompt.answer, add_special=False, parse_special=False)
        return [*asked, *answer], len(asked)

    try:
        tokens, start = await asyncio.wait_for(render(), PROMPT_TIMEOUT_S)
        room = engine.spec.context_tokens
        if len(tokens) > room:  # served with less context than it was built for: the beginning must do
            logprobs: tuple[float, ...] = ()
            if room > start + 1:
                cut = engine.score(tokens[:room], start=start)
                logprobs = (await asyncio.wait_for(cut, PROMPT_TIMEOUT_S + TOKEN_TIMEOUT_S * room)).logprobs
            return PromptScore(golden_tokens_digest(tokens), None, logprobs, cut=True)
        allowed_s = PROMPT_TIMEOUT_S + TOKEN_TIMEOUT_S * len(tokens)
        result = await asyncio.wait_for(engine.score(tokens, start=start), allowed_s)
        return PromptScore(golden_tokens_digest(tokens), -result.mean_nll, result.logprobs)
    except (asyncio.TimeoutError, SlmopsError):
        return PromptScore("", None)


async def run_probation_packs(
    candidate: Backend, own: Pack, committed: Pack | None, baseline: Baseline | None, old: Backend | None
) -> ProbationResult:
    """Let a candidate prove itself by its own pack and by the committed release's.

    Args:
        candidate: the engine on trial.
        own: the candidate's pack.
        committed: the pack of the release that this device has proved; None on a device without one.
        baseline: what that release kept of its pack when it committed.
        old: its engine, asked only when there is no baseline.
    """
    scores = await score_pack(candidate, own.pack, own.voting)
    own_result = judge_own(own.expectations, scores, candidate.engine.spec.kv_cache)
    paired: PairedResult | None = None
    if committed is not None:
        voting = committed.voting
        kept_before = {i: kept for i, kept in baseline.kept.items() if i in voting} if baseline else {}
        if not kept_before and old is not None:
            kept_before = keeps_answers(committed.expectations, await score_pack(old, committed.pack, voting))
        same = committed.sha256 == own.sha256
        new_scores = scores if same else await score_pack(candidate, committed.pack, voting)
        paired = judge_paired(
            kept_before, keeps_answers(committed.expectations, new_scores), committed.pack.max_drop_ratio
        )
    report = _report(own_result, paired, by_answers(scores))
    return ProbationResult(report, keeps_answers(own.expectations, scores), _failure(own_result, paired))


def _report(own: OwnResult, paired: PairedResult | None, answers_only: bool) -> GoldenReport:
    if paired is None:
        return GoldenReport(own.passed, len(own.problems), by_answers=answers_only)
    counts = paired.counts
    return GoldenReport(
        own.passed,
        len(own.problems),
        counts.both,
        counts.only_old,
        counts.only_new,
        counts.neither,
        paired.lost,
        by_answers=answers_only,
    )


def _failure(own: OwnResult, paired: PairedResult | None) -> Failure | None:
    """The committed release's verdict comes first: it is the one that a bad release cannot write itself."""
    if paired is not None and not paired.ok:
        counts = paired.counts
        detail = (
            f"the committed release's golden pack refuses it: {counts.only_old} of {counts.n} answers lost "
            f"({', '.join(paired.lost[:5])}), {paired.max_drop_ratio:.0%} allowed"
        )
        return Failure("content", "golden.committed_pack", detail)
    if not own.ok:
        return Failure(
            "content",
            "golden.own_pack",
            f"its own golden pack fails: {'; '.join(own.problems[:3]) or 'no prompts'}",
        )
    return None
