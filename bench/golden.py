"""Promise: a golden pack notices 90 % of plausible faults, more than its short answers alone do, without a false alarm.

A variant of the example is built, then faulty in every way of ``slmops.build.fault_catalogue``. Each faulty model is loaded
and scored by the code that devices run (an engine process, ``agent.golden.score_prompts``), and judged as devices judge: by its
own pack (tokens and tolerances), and by the committed release's floors, which a bad release cannot write itself. The same scores
judge packs without the long text, packs of the same size drawn at random from the same candidates, and the first candidates in
order. Benign variation (threads, KV cache, context, weights repacked or not, batch sizes) must raise no alarm.

    python bench/golden.py [--keep FOLDER] [--random N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from device_world import print_results, result

from slmops.agent.golden import expectation_of, score_prompts
from slmops.artifact.manifest import (
    GoldenExpectations,
    GoldenPack,
    decode,
    golden_tokens_digest,
)
from slmops.build import run_build
from slmops.build.cache import Cache
from slmops.build.fault_catalogue import FAULTS
from slmops.build.faults import Fault, faulty_copy
from slmops.build.graph import StepContext
from slmops.build.steps import golden
from slmops.build.steps.divergence import log_softmax
from slmops.build.steps.golden_trace import TEXT_ID
from slmops.core.errors import BuildError, SlmopsError
from slmops.core.evidence.golden import (
    PromptExpectation,
    PromptScore,
    Trace,
    judge_own,
    judge_paired,
    keeps_answers,
)
from slmops.runtimes import EngineSpec, open_engine
from slmops.runtimes.llama_cpp.logits import LogitModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "home-intents"
#: scored are the build's candidates, and as many first right answers as a pack without choice would have
PACK_PROMPTS, CANDIDATES = 8, 12
SERVING = {"context_tokens": 1024, "kv_cache": "q8_0", "parallel": 1, "micro_batch_tokens": 64}
Scores = Mapping[str, PromptScore]
#: the pack as a build makes it, beside which the others are judged
WHOLE, ANSWERS = "with the text", "chosen"


@dataclass(frozen=True)
class Condition:
    """What one engine said, and the KV-cache type that it served with."""

    scores: Scores
    kv_cache: str


@dataclass(frozen=True)
class World:
    """What was built."""

    reference: Path
    base: Path
    variant: Path
    candidates: GoldenPack
    chosen: tuple[str, ...]
    first: tuple[str, ...]
    wrong: frozenset[str]
    trace: Trace
    seconds_to_choose: float


def build_world(folder: Path) -> World:
    """Build one variant of the example with a cheap search: what is measured here is the pack."""
    if not (EXAMPLE / "data" / "eval.jsonl").is_file():
        subprocess.run(
            [sys.executable, str(EXAMPLE / "make_dataset.py"), "--out", str(EXAMPLE / "data")], check=True
        )
    document = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text(encoding="utf-8"))
    for role in ("train", "eval", "calibration", "answer_schema", "system_prompt"):
        document["task"][role] = str(EXAMPLE / document["task"][role])
    for step in document["steps"]:
        step["merge"]["adapter"] = str(EXAMPLE / step["merge"]["adapter"])
    document |= {
        "targets": [{"profile": "pi5-8gb", "budget": {"artifact_bytes": "90MB"}}],
        "gates": [],
        "serving": SERVING,
        "search": {
            "types": ["IQ4_NL", "Q5_0", "Q8_0"],
            "probe_tokens": 0,
            "calibration_tokens": 512,
            "sample_rows": 8,
            "sensitivity": "measured",
            "verify_tokens": 0,
            "feedback": False,
        },
        "evaluation": {
            "text_tokens": 128,
            "task_items": 32,
            "constrained_items": 0,
            "base_items": 0,
            "bench_repeats": 1,
            "golden_prompts": PACK_PROMPTS,
            "golden_candidates": CANDIDATES,
        },
    }  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
    cache = Cache(folder / "cache")
    built = run_build(
        recipe,
        folder / "build",
        cache_dir=cache.folder,
        workers=1,
        progress=lambda e: print(f"{e.step}: {e.seconds:.0f} s", flush=True) if e.state == "done" else None,
    ).build
    steps = {step.name: step for step in built.steps}
    records = {name: cache.find(step.key) for name, step in steps.items()}
    asked = records["answers: unquantised"]
    pack = decode((folder / "build" / built.golden_pack.path).read_bytes(), GoldenPack)
    context = StepContext(
        {"eval": EXAMPLE / "data" / "eval.jsonl", "answers": cache.path(asked.files["answers.jsonl"].sha256)},
        {"asked": asked.value},
        {"count": len(asked.value["free"]["items"]), "max_drop_ratio": 0.0},
        folder,
        lambda ratio, note: None,
    )
    golden.select(context)  # without a variant: all of them, in their order
    everything = decode((folder / "golden-pack.json").read_bytes(), GoldenPack)
    exact = dict(zip(asked.value["free"]["items"], asked.value["free"]["exact"], strict=True))
    ranked = [prompt.id for prompt in everything.prompts]
    said = {prompt.id: prompt.answer for prompt in everything.prompts}
    first = tuple(ranked[:PACK_PROMPTS])
    pool = {*golden.candidates_of(ranked, exact, said, CANDIDATES), *first}
    texts = [prompt for prompt in pack.prompts if prompt.id == TEXT_ID]
    candidates = GoldenPack(1, (*(prompt for prompt in everything.prompts if prompt.id in pool), *texts))
    expected = decode(
        (folder / "build" / built.variants[0].golden_expectations.path).read_bytes(), GoldenExpectations
    )
    (trace,) = (found.trace for found in map(expectation_of, expected.expectations) if found.trace)
    print(
        f"the text may be {trace.tolerance:.3f} nats off, {trace.tolerance_other_kv:.3f} with a coarser KV cache"
    )
    return World(
        cache.path(built.reference_sha256),
        cache.path(built.base.sha256),
        folder / "build" / built.variants[0].model.path,
        candidates,
        tuple(prompt.id for prompt in pack.prompts if prompt.id != TEXT_ID),
        first,
        frozenset(name for name in ranked if not exact[name]),
        trace,
        steps["golden pack"].seconds,
    )


def spec_of(model: Path, **settings: Any) -> EngineSpec:
    good = EngineSpec(
        runtime="llama.cpp",
        model_path=model,
        context_tokens=SERVING["context_tokens"],
        slots=1,
        kv_cache="q8_0",
        batch_tokens=64,
        ubatch_tokens=64,
        repack=False,
    )
    return replace(good, **settings)


def device_scores(spec: EngineSpec, pack: GoldenPack) -> Condition:
    """As a device does it; an engine that does not come up scores nothing."""

    async def run() -> Scores:
        async with open_engine(spec) as engine:
            return await score_prompts(engine, pack)

    try:
        return Condition(asyncio.run(run()), spec.kv_cache)
    except SlmopsError as error:
        print(f"  the engine refuses it: {type(error).__name__}", flush=True)
        return Condition({}, spec.kv_cache)


def other_builds(world: World) -> Iterator[tuple[str, Condition]]:
    """Other kernels over the same file: repacked weights and other batches take other paths through the arithmetic."""

    async def tokens() -> dict[str, tuple[list[int], int]]:
        async with open_engine(spec_of(world.variant)) as engine:
            return {p.id: await golden.tokens_of(engine, p) for p in world.candidates.prompts}

    rendered = asyncio.run(tokens())
    for repack, batch, kv_cache in (
        *((repack, batch, "q8_0") for repack in (False, True) for batch in (16, 64, 512)),
        (True, 512, "f16"),
        (True, 512, "q5_1"),
    ):
        scores = {}
        with LogitModel(
            world.variant, context_tokens=512, kv_cache=kv_cache, repack=repack, batch_tokens=batch
        ) as model:
            for name, (ids, start) in rendered.items():
                rows = log_softmax(model.logits(ids)[start - 1 : -1])
                said = [float(value) for value in rows[np.arange(len(rows)), ids[start:]]]
                scores[name] = PromptScore(golden_tokens_digest(ids), sum(said) / len(said), tuple(said))
        label = f"{'repacked' if repack else 'plain'} weights, batches of {batch}, KV cache {kv_cache}"
        yield label, Condition(scores, kv_cache)


def expectations(
    chosen: Sequence[str], reference: Scores, variant: Scores, world: World
) -> list[PromptExpectation]:
    """What a release with this pack would expect, by the build's own rules."""
    unsure = world.wrong.intersection(chosen)
    if 2 * len(unsure) > len(chosen):
        unsure = frozenset()
    unsure |= {TEXT_ID}
    facts = [
        {i: {"tokens_sha256": s[i].tokens_sha256, "mean_logprob": s[i].mean_logprob} for i in chosen}
        for s in (reference, variant)
    ]
    return [
        replace(expectation_of(e), trace=world.trace if e.id == TEXT_ID else None)
        for e in golden.expectations_of(facts[0], facts[1], facts, unsure)
    ]


def verdict(
    pack: Sequence[PromptExpectation], before: Mapping[str, bool], seen: Condition
) -> tuple[bool, bool]:
    """Whether the own pack and the committed pack refuse a candidate with these scores."""
    return (
        not judge_own(pack, seen.scores, seen.kv_cache).ok,
        not judge_paired(before, keeps_answers(pack, seen.scores), 0.0).ok,
    )


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--keep",
        type=Path,
        help="work there and keep it: a second run builds nothing; scores.json holds all scores",
    )
    parser.add_argument("--random", type=int, default=200, help="random packs to compare with")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slmops-bench-") as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        world = build_world(folder)
        print(
            f"built in {time.monotonic() - began:.0f} s; choosing took {world.seconds_to_choose:.0f} s",
            flush=True,
        )
        reference = device_scores(spec_of(world.reference, kv_cache="f16"), world.candidates).scores
        variant = device_scores(spec_of(world.variant), world.candidates).scores
        ids = [prompt.id for prompt in world.candidates.prompts if prompt.id != TEXT_ID]
        chance = random.Random(7)
        packs = {
            WHOLE: [*world.first, TEXT_ID],
            ANSWERS: list(world.chosen),
            "first": list(world.first),
        } | {f"random {n}": chance.sample(ids, PACK_PROMPTS) for n in range(options.random)}
        judged = {name: expectations(chosen, reference, variant, world) for name, chosen in packs.items()}
        before = {name: keeps_answers(pack, variant) for name, pack in judged.items()}
        faulty = dict(faulty_scores(world, folder))
        benign = {
            label: device_scores(spec_of(world.variant, **settings), world.candidates)
            for label, settings in {
                "KV cache f16": {"kv_cache": "f16"},
                "KV cache bf16": {"kv_cache": "bf16"},
                "KV cache q5_1": {"kv_cache": "q5_1"},
                "two threads": {"threads": 2},
                "four threads": {"threads": 4},
                "repacked engine": {"repack": True},
                "large batches": {"batch_tokens": 512, "ubatch_tokens": 512},
                "two slots": {"slots": 2},
                "context 512": {"context_tokens": 512},
            }.items()
        } | dict(other_builds(world))
        if options.keep:
            scores = {
                k: {i: (s.tokens_sha256, s.mean_logprob) for i, s in v.scores.items()}
                for k, v in (faulty | benign).items()
            }
            (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    report(judged, before, faulty, benign, time.monotonic() - began, world.seconds_to_choose)


def faulty_scores(world: World, folder: Path) -> Iterator[tuple[str, Condition]]:
    """Scores of every faulty model."""
    path = folder / "faulty.gguf"
    for fault in FAULTS:
        try:
            model = faulty_model(world, fault, path)
        except BuildError as error:
            print(f"{fault.name}: not for this model: {error.message}", flush=True)
            continue
        began = time.monotonic()
        yield fault.name, device_scores(fault.spec(spec_of(model)), world.candidates)
        print(f"{fault.name}: scored in {time.monotonic() - began:.0f} s", flush=True)
        path.unlink(missing_ok=True)


def faulty_model(world: World, fault: Fault, path: Path) -> Path:
    if fault.lost_adapter:
        return world.base
    faulty_copy(world.variant, path, fault)
    return path


def report(
    judged: Mapping[str, Sequence[PromptExpectation]],
    before: Mapping[str, Mapping[str, bool]],
    faulty: Mapping[str, Condition],
    benign: Mapping[str, Condition],
    seconds: float,
    choosing_s: float,
) -> None:
    def caught(name: str, conditions: Mapping[str, Condition]) -> dict[str, tuple[bool, bool]]:
        return {label: verdict(judged[name], before[name], seen) for label, seen in conditions.items()}

    (text,) = (e.trace for e in judged[WHOLE] if e.trace is not None)

    def distance(seen: Condition) -> str:
        score = seen.scores.get(TEXT_ID)
        return "not scored" if score is None else f"{text.distance(score.logprobs):.3f} nats"

    probes = {fault.name for fault in FAULTS if fault.probe}
    found = {name: caught(name, faulty) for name in judged}
    alarms = {name: caught(name, benign) for name in judged}
    words = {(True, True): "both packs", (True, False): "own pack", (False, True): "committed pack"}
    for label, flags in found[WHOLE].items():
        alone = words.get(found["first"][label], "NOT NOTICED")
        print(
            f"{label:<24} {words.get(flags, 'NOT NOTICED'):<15} text {distance(faulty[label]):<12}"
            f" answers alone: {alone}{' (probe)' if label in probes else ''}"
        )
    for label, flags in alarms[WHOLE].items():
        print(f"{label:<56} {'FALSE ALARM' if any(flags) else 'no alarm'}, text {distance(benign[label])}")
    print(
        f"{len(faulty)} faults, {len(benign)} benign variations, {seconds:.0f} s in all, choosing {choosing_s:.0f} s"
    )

    def rate(name: str, which: int | None, without: Collection[str] = ()) -> float:
        flags = [f for label, f in found[name].items() if label not in without]
        return share([any(f) if which is None else f[which] for f in flags])

    def at_random(which: int | None, without: Collection[str] = ()) -> float:
        rates = [rate(name, which, without) for name in judged if name.startswith("random")]
        return sum(rates) / len(rates)

    whole, first = rate(WHOLE, None), rate("first", None)
    names = [name for name in judged if name.startswith("random")]
    false_alarms = {name: share([any(f) for f in alarms[name].values()]) for name in judged}
    random_alarms = sum(false_alarms[name] for name in names) / len(names)
    rows = [
        result(
            "noticed by the pack as it is made: answers and text",
            whole,
            first,
            "its short answers alone",
            "share",
            whole / max(first, 1e-9),
            ">= 0.90",
            whole >= 0.9,
        ),
        result(
            "false alarms of the pack as it is made",
            false_alarms[WHOLE],
            false_alarms["first"],
            "its short answers alone",
            "share",
            1.0,
            "none",
            false_alarms[WHOLE] == 0,
        ),
    ]
    for case, which, without, promise in (
        ("answers chosen: noticed by either pack", None, set(), "reported"),
        (
            "answers chosen: noticed by either pack, without the probes that chose them",
            None,
            probes,
            "reported",
        ),
        ("answers chosen: noticed by its own pack", 0, set(), "reported"),
        ("answers chosen: noticed by the committed release's pack", 1, set(), "reported"),
    ):
        ours, peer = rate(ANSWERS, which, without), at_random(which, without)
        rows.append(
            result(
                case,
                ours,
                peer,
                f"{len(names)} random packs, mean",
                "share",
                ours / max(peer, 1e-9),
                promise,
                True,
            )
        )
    rows.append(
        result(
            "answers chosen: false alarms",
            false_alarms[ANSWERS],
            random_alarms,
            f"{len(names)} random packs, mean",
            "share",
            1.0,
            "none",
            false_alarms[ANSWERS] == 0,
        )
    )
    print_results("golden", rows)


if __name__ == "__main__":
    main()
