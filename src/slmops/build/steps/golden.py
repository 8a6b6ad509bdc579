"""The golden pack: a few prompts with the answers that a good model finds likely, and what each variant says of them.

**Which prompts.** Held-out items that the unquantised model answers right, in the seeded order of the evaluation; when it
answers too few right, others are filled in. The answer in the pack is the unquantised model's own (for a right item that is
the right answer; where it says nothing, the gold answer): the pack states how this model behaves, right or wrong.

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
from collections.abc import Mapping, Sequence
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
from slmops.build.files import sha256_of_file
from slmops.build.graph import StepContext
from slmops.core.device.fit import Serving
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec, open_engine

USES = ("slmops.artifact.manifest", "slmops.build.conversations")
SCHEMA = 1
#: slack for other kernels and KV-cache types, nats a token
BASE_TOLERANCE = 0.05
#: a later release may find an answer's tokens this much less likely, nats a token
FLOOR_SLACK = 0.35
_LONGEST_ANSWER_CHARACTERS = 400


def select(context: StepContext) -> dict[str, Any]:
    """Choose the prompts. Files in: ``eval``, ``answers`` (of the reference); out: ``golden-pack.json``.

    Params: ``count``, ``max_drop_ratio``.
    """
    items = {item.id: item for item in read_items(context.files["eval"])}
    said = {
        a["id"]: str(a["got"])
        for a in map(json.loads, context.files["answers"].read_text(encoding="utf-8").splitlines())
    }
    asked = context.values["asked"]["free"]
    exact = dict(zip(asked["items"], asked["exact"], strict=True))
    answers = {name: got if _usable(got) else items[name].answer for name, got in said.items()}
    ranked = sorted(
        answers, key=lambda name: (not exact[name], not _usable(said[name]))
    )  # stable: the seeded order within
    chosen = ranked[: int(context.params["count"])]
    pack = GoldenPack(
        SCHEMA, tuple(_prompt(items[i], answers[i]) for i in chosen), float(context.params["max_drop_ratio"])
    )
    (context.out / "golden-pack.json").write_bytes(encode(pack))
    return {"prompts": len(chosen), "right": sum(exact[i] for i in chosen)}


def score(context: StepContext) -> dict[str, Any]:
    """Score a pack with a model as a device does. Files in: ``model``, ``pack``. Params: ``serving``.

    Value: per prompt id ``tokens_sha256`` and ``mean_logprob``; and the model's digest.
    """
    pack = decode(context.files["pack"].read_bytes(), GoldenPack)
    serving = Serving(**context.params["serving"])
    scores = asyncio.run(_score(context.files["model"], pack, serving))
    return {"scores": scores, "model_sha256": sha256_of_file(context.files["model"])}


def expect(context: StepContext) -> dict[str, Any]:
    """Write a variant's expectations.

    Files in: ``pack``. Values in: ``reference``, ``own``, ``variant-...`` (all scores of the release). Out:
    ``golden-expectations.json``. Value: distances and floors.
    """
    pack_bytes = context.files["pack"].read_bytes()
    reference, own = context.values["reference"], context.values["own"]
    everyone = [
        reference,
        *(context.values[name] for name in sorted(context.values) if name.startswith("variant-")),
    ]
    expectations = expectations_of(
        reference["scores"], own["scores"], [scored["scores"] for scored in everyone]
    )
    document = GoldenExpectations(
        SCHEMA, sha256_hex(pack_bytes), reference["model_sha256"], tuple(expectations)
    )
    (context.out / "golden-expectations.json").write_bytes(encode(document))
    distances = {e.id: abs(own["scores"][e.id]["mean_logprob"] - e.reference_logprob) for e in expectations}
    return {
        "mean_distance": sum(distances.values()) / len(distances),
        "max_distance": max(distances.values()),
        "floors": {e.id: e.floor for e in expectations},
        "reference": {e.id: e.reference_logprob for e in expectations},
    }


def expectations_of(
    reference: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Mapping[str, Any]],
    everyone: Sequence[Mapping[str, Mapping[str, Any]]],
) -> list[GoldenExpectation]:
    """The rules of this module's docstring, as arithmetic.

    Args:
        reference: prompt id to ``tokens_sha256`` and ``mean_logprob`` under the unquantised model.
        own: the same under the variant.
        everyone: the same under the reference and every variant of the release.

    Raises:
        BuildError: the variant tokenises a prompt unlike the reference.
    """
    distance = {i: abs(own[i]["mean_logprob"] - reference[i]["mean_logprob"]) for i in reference}
    mean = sum(distance.values()) / len(distance)
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
                floor=round(worst - FLOOR_SLACK, 6),
            )
        )
    return result


async def _score(path: Path, pack: GoldenPack, serving: Serving) -> dict[str, dict[str, Any]]:
    """As ``agent/golden.py`` does it on a device: the same calls in the same order."""
    spec = EngineSpec(
        runtime="llama.cpp",
        model_path=path,
        context_tokens=serving.context_tokens,
        slots=1,
        kv_cache=serving.kv_cache,
        batch_tokens=64,
        ubatch_tokens=64,
    )
    scores: dict[str, dict[str, Any]] = {}
    async with open_engine(spec) as engine:
        for prompt in pack.prompts:
            asked = await engine.apply_template(
                [{"role": m.role, "content": m.content} for m in prompt.messages]
            )
            answer = await engine.tokenize(prompt.answer, add_special=False, parse_special=False)
            tokens = [*asked, *answer]
            result = await engine.score(tokens, start=len(asked))
            scores[prompt.id] = {
                "tokens_sha256": golden_tokens_digest(tokens),
                "mean_logprob": -result.mean_nll,
            }
    return scores


def _prompt(item: Item, answer: str) -> GoldenPrompt:
    return GoldenPrompt(item.id, tuple(GoldenMessage(m["role"], m["content"]) for m in item.messages), answer)


def _usable(answer: str) -> bool:
    return len(answer.strip()) > 0 and len(answer) <= _LONGEST_ANSWER_CHARACTERS
