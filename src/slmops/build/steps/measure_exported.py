"""Measuring an exported variant: likelihoods, answers, golden scores and speed of the very files that ship.

Likelihoods and golden scores come from the variant's own binding in the toolchain that exported it. Answers and speed come by one
of two ways, chosen when the build is planned and recorded in its evidence. ``port``: the runtime's adapter and binding are
installed here, so they are what a device would serve. ``toolchain``: they are not, so they come from the toolchain, too: the same
arithmetic without slmops' serving around it. Then conversations are rendered and tokenised by the source's engine, which the
parity gate showed to give the same ids; answers cannot be held to a schema, and none are asked so.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slmops.artifact.manifest import GoldenPack, decode, golden_tokens_digest
from slmops.build.conversations import read_items, shuffled
from slmops.build.export.exported import Exported, exported, session
from slmops.build.export.formats import MODEL_FACTS
from slmops.build.graph import StepContext
from slmops.build.steps import answers as answers_module
from slmops.build.steps import golden as golden_module
from slmops.build.steps.divergence import SAMPLED, Tail, divergence, figures, log_softmax
from slmops.build.steps.speed import figures_of
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.runtimes import EngineSpec, load, open_engine
from slmops.runtimes.bench import bench_model

USES = (
    "slmops.build.conversations",
    "slmops.build.export.exported",
    "slmops.build.export.tool_process",
    "slmops.build.steps.answers",
    "slmops.build.steps.divergence",
    "slmops.build.steps.golden",
    "slmops.build.steps.speed",
    "slmops.core.device.fit",
    "slmops.runtimes.bench",
    "slmops.runtimes.registry",
)
PORT, TOOLCHAIN = "port", "toolchain"


def likelihood(context: StepContext) -> dict[str, Any]:
    """As :func:`slmops.build.steps.divergence.compare`. Files in, too: ``text``, ``ids``, ``logprobs``, ``mass``."""
    with exported(context) as variant:
        ids, logprobs = np.load(context.files["ids"]), np.load(context.files["logprobs"])
        mass = np.load(context.files["mass"])
        width = ids.shape[1] - (SAMPLED if mass.any() else 0)
        sequences = json.loads(context.files["text"].read_text(encoding="utf-8"))
        at, divergences, same, targets = 0, [], [], []
        units: list[str] = []
        with session(context, variant) as (tool, _):
            for number, sequence in enumerate(sequences):
                token_ids, start = sequence["token_ids"], sequence["start"]
                rows = log_softmax(tool.logits(token_ids, start - 1)[:-1])
                here = slice(at, at + len(rows))
                at += len(rows)
                tail = Tail(ids[here, width:], logprobs[here, width:], mass[here])
                divergences.append(divergence(ids[here, :width], logprobs[here, :width], rows, tail))
                same.append(rows.argmax(axis=1) == ids[here, 0])
                targets.append(rows[np.arange(len(rows)), np.array(token_ids[start:])])
                group = sequence.get("group")
                units += [f"item:{sequence['id']}" if group is None else f"group:{group}"] * len(rows)
                context.progress((number + 1) / len(sequences), "KL divergence of the exported files")
        found = figures(
            np.concatenate(divergences),
            np.concatenate(same),
            np.concatenate(targets).astype(np.float64),
            units,
        )
        return {**found, "model_sha256": variant.sha256}


def answers(context: StepContext) -> dict[str, Any]:
    """As :func:`slmops.build.steps.answers.ask`. Files in besides the variant: ``source``, ``eval``, maybe ``schema``."""
    with exported(context) as variant:
        if context.params["through"] == PORT:
            facts = json.loads((variant.folder / MODEL_FACTS).read_text(encoding="utf-8"))
            told = {**context.params, "context_tokens": facts["context_tokens"]}
            inner = replace(context, files={**context.files, "model": variant.model}, params=told)
            return {**answers_module.ask(inner), "model_sha256": variant.sha256}
        params = context.params
        items = shuffled(read_items(context.files["eval"]), params["seed"])
        items = items[: params["task_items"] or None]
        schema = (
            json.loads(context.files["schema"].read_text(encoding="utf-8"))
            if "schema" in context.files
            else None
        )
        most = int(context.values["text"]["answer_tokens"])
        prompts = asyncio.run(_prompts(context, [list(item.messages) for item in items]))
        made = []
        with session(context, variant) as (tool, _):
            for number, prompt in enumerate(prompts):
                made += tool.ask(op="generate", prompts=[prompt], max_tokens=most)
                context.progress((number + 1) / len(prompts), f"{number + 1} of {len(prompts)} items")
        texts = asyncio.run(_texts(context, made))
        lines = [
            json.dumps({"id": item.id, "expected": item.answer, "got": got}, ensure_ascii=False)
            for item, got in zip(items, texts, strict=True)
        ]
        (context.out / "answers.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return {
            "free": answers_module.judged(items, texts, schema),
            "constrained": answers_module.judged([], [], schema),
            "model_sha256": variant.sha256,
        }


def golden_scores(context: StepContext) -> dict[str, Any]:
    """As :func:`slmops.build.steps.golden.score`. Files in besides the variant: ``source``, ``pack``."""
    with exported(context) as variant:
        pack = decode(context.files["pack"].read_bytes(), GoldenPack)
        tokens = asyncio.run(_golden_tokens(context, pack))
        scores = {}
        with session(context, variant) as (tool, _):
            for name, (token_ids, start) in tokens.items():
                rows = log_softmax(tool.logits(token_ids, start - 1)[:-1])
                mean = float(rows[np.arange(len(rows)), np.array(token_ids[start:])].mean())
                scores[name] = {"tokens_sha256": golden_tokens_digest(token_ids), "mean_logprob": mean}
        total = sum(len(token_ids) for token_ids, _ in tokens.values())
        return {"scores": scores, "tokens": total, "model_sha256": variant.sha256}


def speed(context: StepContext) -> dict[str, Any]:
    """As :func:`slmops.build.steps.speed.measure`. Values in: ``export``."""
    with exported(context) as variant:
        params = context.params
        if params["through"] == PORT:
            return _speed_as_served(context, variant)
        context.progress(None, "measuring speed in the toolchain, alone on this machine")
        with session(context, variant) as (tool, loaded):
            measured = tool.ask(
                op="bench",
                prompt_tokens=params["prompt_tokens"],
                decode_tokens=params["decode_tokens"],
                repeats=params["repeats"],
            )
        repeats = measured["repeats"]
        shape = ModelShape(**context.values["export"]["shape"])
        return {
            "runtime": {"name": variant.form.runtime, "version": str(loaded.get("runtime_version", ""))},
            "load_s": loaded["load_s"],
            **{
                name: statistics.median(r[name] for r in repeats)
                for name in ("prefill_tps", "decode_tps", "ttft_s")
            },
            "rss_bytes": measured["rss_bytes"],
            "private_bytes": measured["private_bytes"],
            "busy_ratio": measured["busy_ratio"],
            "decode_tps_repeats": [round(repeat["decode_tps"], 2) for repeat in repeats],
            "threads": 1,
            "prompt_tokens": params["prompt_tokens"],
            "decode_tokens": params["decode_tokens"],
            "predicted_rss_bytes": memory_needed(
                shape, Serving(**params["serving"]), variant.form.runtime
            ).total_bytes,
            "model_sha256": variant.sha256,
            "through": TOOLCHAIN,
        }


def _speed_as_served(context: StepContext, variant: Exported) -> dict[str, Any]:
    """Through the runtime's adapter, with the settings that devices serve with, as far as the engine has them."""
    params, runtime = context.params, variant.form.runtime
    serving = Serving(**params["serving"])
    capabilities = load(runtime).capabilities
    caches = capabilities.kv_cache_types
    spec = EngineSpec(
        runtime=runtime,
        model_path=variant.model,
        context_tokens=min(serving.context_tokens, context.values["export"]["model"]["context_tokens"]),
        slots=min(serving.parallel, capabilities.max_slots or serving.parallel),
        kv_cache=serving.kv_cache if serving.kv_cache in caches else sorted(caches)[0],
        batch_tokens=max(serving.micro_batch_tokens, 64),
        ubatch_tokens=serving.micro_batch_tokens,
    )
    context.progress(None, "measuring speed as served, alone on this machine")
    result = asyncio.run(
        bench_model(
            spec,
            prompt_tokens=params["prompt_tokens"],
            decode_tokens=params["decode_tokens"],
            repeats=params["repeats"],
        )
    )
    shape = ModelShape(**context.values["export"]["shape"])
    return {
        "runtime": {"name": runtime, "version": load(runtime).version()},
        **figures_of(result),
        "predicted_rss_bytes": memory_needed(shape, serving, runtime).total_bytes,
        "model_sha256": variant.sha256,
        "through": PORT,
    }


async def _prompts(context: StepContext, conversations: Sequence[Any]) -> list[list[int]]:
    async with open_engine(_source_spec(context)) as engine:
        return [await engine.apply_template(messages) for messages in conversations]


async def _texts(context: StepContext, answers_: Sequence[Sequence[int]]) -> list[str]:
    async with open_engine(_source_spec(context)) as engine:
        return [await engine.detokenize(ids) if ids else "" for ids in answers_]


async def _golden_tokens(context: StepContext, pack: GoldenPack) -> dict[str, tuple[list[int], int]]:
    async with open_engine(_source_spec(context)) as engine:
        return {prompt.id: await golden_module.tokens_of(engine, prompt) for prompt in pack.prompts}


def _source_spec(context: StepContext) -> EngineSpec:
    return EngineSpec(
        runtime="llama.cpp", model_path=context.files["source"], context_tokens=2048, slots=1, repack=False
    )
