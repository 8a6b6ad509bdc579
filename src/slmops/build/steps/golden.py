"""The golden pack: a few prompts with the answers that a good model finds likely, and what each variant says of them.

**Which prompts.** Candidates are held-out items that the unquantised model answers right, in the seeded order of the evaluation
and one of each group before a second; when it answers too few right, others are filled in. The answer in the pack is the
unquantised model's own (for a right item that is the right answer; where it says nothing, the gold answer): the pack states how
this model behaves, right or wrong. Of the candidates those are taken that notice most (:mod:`slmops.build.golden_choice`): a
variant is made faulty in the ways that the catalogue marks as probes, and scored as a device would score it. Half of the
candidates are items that the model answers wrong, because it is unsure of them; they are at most half of the pack, and a later
release need not keep such an answer (its floor is ``NO_FLOOR``): to answer better must not look like a fault.

**Own expectations** of a variant: the mean log-probability of each answer under the unquantised reference, with a tolerance
made from the variant's own distance to it: 0.05 + 2 * max(its distance on this prompt, its mean distance). A device runs the
same file with other kernels and maybe another KV-cache type, which moved a mean log-probability by 0.018 at most (q8_0
against f16, three variants, eight prompts), so 0.05 leaves room where the variant itself is exact.

**Floor for later releases**: 0.35 nats below the worst of reference and this release's variants: a later release keeps an
answer as long as it finds each token, on average, at least 70 % as likely as the worst variant of this release did. Measured
on SmolLM2 with the example's task (mean log-probability of an answer, nats a token):

    adapter                       variants, 84 to 145 MB    attention rows permuted       base, not fine-tuned
    after 48 minutes              -0.000 to -0.009          -4.6 to -6.1 (six layers)     -2.8 to -4.9
    after 5 minutes (too few)     -0.04 to -0.16            -0.75 to -1.7 (three layers)  -2.8 to -4.9

So a floor at 0.35 below is far above every bad model and leaves a legitimate one more than twice the loss that was seen, even
for the weak model. Every variant of a release is above its floors by construction.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmops.artifact.digest import sha256_hex
from slmops.artifact.manifest import (
    GoldenExpectation,
    GoldenExpectations,
    GoldenMessage,
    GoldenPack,
    GoldenPrompt,
    decode,
    encode,
    golden_tokens_digest,
)
from slmops.build.conversations import Item, read_items
from slmops.build.fault_catalogue import PROBES
from slmops.build.faults import faulty_copy
from slmops.build.files import sha256_of_file
from slmops.build.golden_choice import choose, pulls, vocabulary_parts
from slmops.build.graph import StepContext
from slmops.build.steps.golden_trace import TEXT_ID, moved, text_prompt, trace_of
from slmops.build.steps.memory import serving_of_step
from slmops.core.device.fit import Serving
from slmops.core.errors import BuildError, DeviceError, UsageError
from slmops.core.evidence.golden import NO_FLOOR
from slmops.runtimes import Engine, EngineSpec, open_engine
from slmops.runtimes.llama_cpp.scorer import Scorer

USES = (
    "slmops.artifact.manifest",
    "slmops.build.conversations",
    "slmops.build.faults",
    "slmops.build.fault_edits",
    "slmops.build.fault_catalogue",
    "slmops.build.gguf_file",
    "slmops.build.golden_choice",
    "slmops.build.steps.golden_trace",
    "slmops.build.steps.memory",
    "slmops.runtimes.llama_cpp.native",
    "slmops.runtimes.llama_cpp.quantise",
    "slmops.runtimes.llama_cpp.scorer",
)
SCHEMA = 1
#: slack for other kernels and KV-cache types, nats a token
BASE_TOLERANCE = 0.05
#: a later release may find an answer's tokens this much less likely, nats a token
FLOOR_SLACK = 0.35
_LONGEST_ANSWER_CHARACTERS = 400


def select(context: StepContext) -> dict[str, Any]:
    """Choose the prompts.

    Files in: ``eval``, ``answers`` (of the reference), ``reference`` and ``variant`` (models; without them the first candidates
    are taken); maybe the value ``text`` (of :func:`slmops.build.steps.golden_trace.cut`); out: ``golden-pack.json``. Params:
    ``count``, ``max_drop_ratio``, ``candidates`` (how many are scored), ``serving``. Value: ``prompts``, ``right``; ``unsure``:
    prompts whose answer a later release need not keep; and ``noticed``: for each probe the largest pull in the pack (beyond 1
    it is noticed).
    """
    items = {item.id: item for item in read_items(context.files["eval"])}
    lines = (
        context.files["answers"].read_text(encoding="utf-8").rstrip("\n").split("\n")
    )  # answers may hold U+2028
    said = {a["id"]: str(a["got"]) for a in map(json.loads, lines)}
    asked = context.values["asked"]["free"]
    exact = dict(zip(asked["items"], asked["exact"], strict=True))
    answers = {name: got if _usable(got) else items[name].answer for name, got in said.items()}
    turns = _turns([items[name] for name in answers])
    ranked = sorted(answers, key=lambda name: (not exact[name], not _usable(said[name]), turns[name]))
    count, candidates = int(context.params["count"]), int(context.params.get("candidates", 0))
    noticed: dict[str, float] = {}
    if candidates > count and "variant" in context.files:
        tried = candidates_of(ranked, exact, said, candidates)
        prompts = [_prompt(items[name], answers[name]) for name in tried]
        wrong = frozenset(name for name in tried if not exact[name])
        chosen, noticed = _most_telling(context, prompts, count, wrong)
    else:
        chosen = ranked[:count]
    right = sum(exact[i] for i in chosen)
    unsure = [i for i in chosen if not exact[i]] if noticed and 2 * right >= len(chosen) else []
    made = [_prompt(items[i], answers[i]) for i in chosen]
    text = context.values.get("text", {}).get("text", "")
    if text and TEXT_ID not in chosen:
        made.append(text_prompt(text))
        unsure.append(TEXT_ID)
    pack = GoldenPack(SCHEMA, tuple(made), float(context.params["max_drop_ratio"]))
    (context.out / "golden-pack.json").write_bytes(encode(pack))
    return {"prompts": len(made), "right": right, "unsure": unsure, "noticed": noticed}


def candidates_of(
    ranked: Sequence[str], exact: Mapping[str, bool], said: Mapping[str, str], count: int
) -> list[str]:
    """Half right answers, half wrong ones that can be used, each in the given order; what is lacking the others fill."""
    right = [name for name in ranked if exact[name]]
    wrong = [name for name in ranked if not exact[name] and _usable(said[name])]
    few = min(len(wrong), max(count // 2, count - len(right)))
    tried = [*right[: count - few], *wrong[:few]]
    rest = [name for name in ranked if name not in tried]
    return [*tried, *rest[: max(count - len(tried), 0)]]


def _turns(items: Sequence[Item]) -> dict[str, int]:
    """For each item, how many of its group came before it: sorting by it takes one of each group before a second."""
    count: Counter[str] = Counter()
    turns = {}
    for item in items:
        turns[item.id] = count[item.group] if item.group is not None else 0
        if item.group is not None:
            count[item.group] += 1
    return turns


def _most_telling(
    context: StepContext, prompts: Sequence[GoldenPrompt], count: int, wrong: frozenset[str]
) -> tuple[list[str], dict[str, float]]:
    """The prompts that notice most, and how surely each probe is noticed."""
    serving = Serving(**context.params["serving"])
    spec = _spec(context.files["variant"], serving)
    rendered, vocab_tokens = asyncio.run(_render(spec, prompts))
    reference = _logprobs(replace(spec, model_path=context.files["reference"], kv_cache="f16"), rendered)
    good = _logprobs(spec, rendered)
    variant = {name: value for name, value in good.items() if value is not None}
    exact = {name: value for name, value in reference.items() if value is not None and name in variant}
    names = [prompt.id for prompt in prompts if prompt.id in exact]
    scratch = context.out.parent / f".{context.out.name}-faulty.gguf"
    pull: dict[str, dict[str, float]] = {}
    try:
        for number, fault in enumerate(PROBES):
            context.progress(number / len(PROBES), f"what notices: {fault.what}")
            try:
                faulty_copy(context.files["variant"], scratch, fault)
            except BuildError:
                continue  # not for this architecture or tokenizer
            found = _logprobs(fault.spec(replace(spec, model_path=scratch)), rendered)
            pull[fault.name] = pulls(
                exact, {name: variant[name] for name in exact}, found, base=BASE_TOLERANCE, slack=FLOOR_SLACK
            )
            scratch.unlink()
    finally:
        scratch.unlink(missing_ok=True)
    parts = {name: vocabulary_parts(rendered[name][0], vocab_tokens) for name in names}
    chosen = choose(names, pull, parts, count, wrong)
    return chosen, {name: round(max(row[i] for i in chosen), 6) for name, row in pull.items()}


async def _render(
    spec: EngineSpec, prompts: Sequence[GoldenPrompt]
) -> tuple[dict[str, tuple[list[int], int]], int]:
    """Token ids of each prompt with its answer, where the answer starts; and the vocabulary's size."""
    rendered = {}
    async with open_engine(spec) as engine:
        for prompt in prompts:
            rendered[prompt.id] = await tokens_of(engine, prompt)
        return rendered, (await engine.properties()).vocab_tokens


def _logprobs(spec: EngineSpec, rendered: Mapping[str, tuple[list[int], int]]) -> dict[str, float | None]:
    """Mean log-probability of each answer by the scorer that engines use; None where it cannot be scored."""
    scorer = Scorer(
        spec.model_path, context_tokens=spec.context_tokens, kv_cache=spec.kv_cache, threads=spec.threads
    )
    found: dict[str, float | None] = {}
    try:
        for name, (tokens, start) in rendered.items():
            try:
                found[name] = -scorer.score(tokens, start=start).mean_nll
            except (UsageError, DeviceError):
                found[name] = None
    finally:
        scorer.close()
    return found


def score(context: StepContext) -> dict[str, Any]:
    """Score a pack with a model as a device does. Files in: ``model``, ``pack``. Params: ``serving``, maybe ``trace``.

    Values in: maybe ``choice`` (how the variant is served).

    Value: per prompt id ``tokens_sha256`` and ``mean_logprob``, and with ``trace`` of the long text also ``logprobs``,
    ``kv_cache`` and ``moved`` (see :mod:`slmops.build.steps.golden_trace`); ``tokens``: what a device computes for the pack;
    and the model's digest.
    """
    pack = decode(context.files["pack"].read_bytes(), GoldenPack)
    serving = serving_of_step(context)
    path = context.files["model"]
    scores, rendered, said = asyncio.run(_score(path, pack, serving))
    if context.params.get("trace") and TEXT_ID in scores:
        context.progress(0.5, "how far the file is from itself with other arithmetic")
        scores[TEXT_ID] |= {
            "kv_cache": serving.kv_cache,
            "logprobs": said[TEXT_ID],
            "moved": moved(path, *rendered[TEXT_ID], said[TEXT_ID], serving),
        }
    return {
        "scores": scores,
        "tokens": sum(len(token_ids) for token_ids, _ in rendered.values()),
        "model_sha256": sha256_of_file(path),
    }


def expect(context: StepContext) -> dict[str, Any]:
    """Write a variant's expectations.

    Files in: ``pack``. Values in: ``chosen`` (of :func:`select`), ``reference``, ``own``, ``variant-...`` (all scores of the
    release). Out: ``golden-expectations.json``. Value: distances and floors; ``tokens``: what a device computes for the pack;
    ``moved``: what other arithmetic does to the long text.
    """
    pack_bytes = context.files["pack"].read_bytes()
    reference, own = context.values["reference"], context.values["own"]
    everyone = [
        reference,
        *(context.values[name] for name in sorted(context.values) if name.startswith("variant-")),
    ]
    expectations = expectations_of(
        reference["scores"],
        own["scores"],
        [scored["scores"] for scored in everyone],
        frozenset(context.values["chosen"]["unsure"]),
    )
    document = GoldenExpectations(
        SCHEMA, sha256_hex(pack_bytes), reference["model_sha256"], tuple(expectations)
    )
    (context.out / "golden-expectations.json").write_bytes(encode(document))
    distances = {e.id: abs(own["scores"][e.id]["mean_logprob"] - e.reference_logprob) for e in expectations}
    return {
        "mean_distance": sum(distances.values()) / len(distances),
        "max_distance": max(distances.values()),
        "tokens": own["tokens"],
        "moved": own["scores"].get(TEXT_ID, {}).get("moved"),
        "floors": {e.id: e.floor for e in expectations},
        "reference": {e.id: e.reference_logprob for e in expectations},
    }


def expectations_of(
    reference: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Mapping[str, Any]],
    everyone: Sequence[Mapping[str, Mapping[str, Any]]],
    unsure: frozenset[str] = frozenset(),
) -> list[GoldenExpectation]:
    """The rules of this module's docstring, as arithmetic.

    Args:
        reference: prompt id to ``tokens_sha256`` and ``mean_logprob`` under the unquantised model.
        own: the same under the variant.
        everyone: the same under the reference and every variant of the release.
        unsure: prompts whose answers a later release need not keep. (The long text is one of them, and its distance is no measure
            of what answers may lose.)

    Raises:
        BuildError: the variant tokenises a prompt unlike the reference.
    """
    distance = {i: abs(own[i]["mean_logprob"] - reference[i]["mean_logprob"]) for i in reference}
    answers = [value for name, value in distance.items() if name != TEXT_ID]
    mean = sum(answers) / max(len(answers), 1)
    result = []
    for name, scored in reference.items():
        if own[name]["tokens_sha256"] != scored["tokens_sha256"]:
            raise BuildError(
                f"golden prompt {name}: reference and variant tokenise it differently",
                hint="report it: both carry the same tokenizer",
            )
        worst = min(scores[name]["mean_logprob"] for scores in everyone)
        result.append(
            GoldenExpectation(
                id=name,
                tokens_sha256=scored["tokens_sha256"],
                reference_logprob=round(scored["mean_logprob"], 6),
                tolerance=round(BASE_TOLERANCE + 2 * max(distance[name], mean), 6),
                floor=NO_FLOOR if name in unsure else round(worst - FLOOR_SLACK, 6),
                trace=trace_of(own[name]),
            )
        )
    return result


async def _score(
    path: Path, pack: GoldenPack, serving: Serving
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[list[int], int]], dict[str, list[float]]]:
    """As ``agent/golden.py`` does it on a device: the same calls in the same order.

    Also each prompt's token ids with the answer's start, and the answer's log-probabilities.
    """
    scores: dict[str, dict[str, Any]] = {}
    rendered, said = {}, {}
    async with open_engine(_spec(path, serving)) as engine:
        for prompt in pack.prompts:
            tokens, start = rendered[prompt.id] = await tokens_of(engine, prompt)
            result = await engine.score(tokens, start=start)
            scores[prompt.id] = {
                "tokens_sha256": golden_tokens_digest(tokens),
                "mean_logprob": -result.mean_nll,
            }
            said[prompt.id] = list(result.logprobs)
    return scores, rendered, said


async def tokens_of(engine: Engine, prompt: GoldenPrompt) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and where the answer starts."""
    asked = await engine.apply_template([{"role": m.role, "content": m.content} for m in prompt.messages])
    answer = await engine.tokenize(prompt.answer, add_special=False, parse_special=False)
    return [*asked, *answer], len(asked)


def _spec(path: Path, serving: Serving) -> EngineSpec:
    return EngineSpec(
        runtime="llama.cpp",
        model_path=path,
        context_tokens=serving.context_tokens,
        slots=1,
        kv_cache=serving.kv_cache,
        batch_tokens=64,
        ubatch_tokens=64,
    )


def _prompt(item: Item, answer: str) -> GoldenPrompt:
    return GoldenPrompt(item.id, tuple(GoldenMessage(m["role"], m["content"]) for m in item.messages), answer)


def _usable(answer: str) -> bool:
    return len(answer.strip()) > 0 and len(answer) <= _LONGEST_ANSWER_CHARACTERS
