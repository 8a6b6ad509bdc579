"""Rendering: which text is measured on, and its token ids by the engine's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from slmops.build.conversations import Item, read_calibration, read_items, shuffled
from slmops.build.graph import StepContext
from slmops.core.errors import BuildError
from slmops.runtimes import Engine, EngineSpec, open_engine

USES = ("slmops.build.conversations",)
CONTEXT_TOKENS = 2048
#: room for an answer beyond the longest gold answer, tokens
SPARE_ANSWER_TOKENS = 8


def render(context: StepContext) -> dict[str, Any]:
    """Render calibration text and held-out conversations.

    Files in: ``model``, ``eval``, ``calibration``, maybe ``system_prompt``, maybe ``general`` (held-out items beside the
    task's: half of ``text_tokens`` is theirs, and what the task's own cannot fill); out: ``calibration.json`` (lists of
    token ids) and ``held-out.json`` (``id``, ``group``, ``token_ids``, ``start``: the first position that is scored; what
    all conversations begin with is not scored again and again): two files, so that more evaluation does not mean another
    search. Params: ``calibration_tokens``, ``text_tokens``, ``task_items``, ``seed``. Value: counts, and
    ``answer_tokens``: what an answer
    may need.
    """
    return asyncio.run(_render(context))


async def _render(context: StepContext) -> dict[str, Any]:
    params, files = context.params, context.files
    prompt = files["system_prompt"].read_text(encoding="utf-8").strip() if "system_prompt" in files else ""
    items = shuffled(read_items(files["eval"]), params["seed"])
    calibration = read_calibration(files["calibration"], prompt)
    spec = EngineSpec(
        runtime="llama.cpp", model_path=files["model"], context_tokens=CONTEXT_TOKENS, slots=1, repack=False
    )
    async with open_engine(spec) as engine:
        end = (await engine.properties()).eos_token
        context.progress(0.2, "rendering calibration text")
        known = await _until(engine, calibration, params["calibration_tokens"], end, 0)
        context.progress(0.5, "rendering held-out conversations")
        tail = [end] if end >= 0 else []
        probes = [await _conversation(engine, item, tail) for item in items[:8]]
        start = _common_prefix(probes)
        general = shuffled(read_items(files["general"]), params["seed"]) if "general" in files else []
        own_tokens = params["text_tokens"] // (2 if general else 1)
        task = await _until(engine, items, own_tokens, end, start)
        held_out = [(name, token_ids, start) for name, token_ids in task]
        if general:
            begin = _common_prefix([await _conversation(engine, item, tail) for item in general[:8]])
            room = params["text_tokens"] - sum(len(token_ids) - start for _, token_ids in task)
            held_out += [
                (name, token_ids, begin)
                for name, token_ids in await _until(engine, general, room, end, begin)
            ]
        chosen = items[: params["task_items"] or None]
        answers = [len(await engine.tokenize(item.answer, parse_special=False)) for item in chosen]
    if not held_out or not known:
        raise BuildError(
            "the chat template renders nothing",
            hint="the base needs a chat template (tokenizer.chat_template)",
        )
    groups = {item.id: item.group for item in [*general, *items]}
    held = [
        {"id": name, "group": groups[name], "token_ids": token_ids, "start": max(start, 1)}
        for name, token_ids, start in held_out
    ]
    for name, document in (
        ("calibration.json", [token_ids for _, token_ids in known]),
        ("held-out.json", held),
    ):
        (context.out / name).write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return {
        "calibration_tokens": sum(len(token_ids) for _, token_ids in known),
        "calibration_items": len(known),
        "scored_tokens": sum(len(token_ids) - max(start, 1) for _, token_ids, start in held_out),
        "held_out_items": len(held_out),
        "held_out_task_items": len(task),
        "answer_tokens": max(answers) + SPARE_ANSWER_TOKENS,
        "task_items": len(chosen),
    }


async def _until(
    engine: Engine, items: Sequence[Item], tokens: int, end: int, skipped: int
) -> list[tuple[str, list[int]]]:
    """Conversations, in order, until there are enough tokens beyond each one's skipped beginning."""
    rendered: list[tuple[str, list[int]]] = []
    count = 0
    tail = [end] if end >= 0 else []
    for item in items:
        if count >= tokens:
            break
        token_ids = await _conversation(engine, item, tail)
        if skipped < len(token_ids) <= CONTEXT_TOKENS:
            rendered.append((item.id, token_ids))
            count += len(token_ids) - skipped
    return rendered


async def _conversation(engine: Engine, item: Item, tail: list[int]) -> list[int]:
    asked = await engine.apply_template(item.messages)
    return [*asked, *(await engine.tokenize(item.answer, add_special=False, parse_special=False)), *tail]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    if len(sequences) < 2:
        return 0
    first = sequences[0]
    length = min(len(sequence) for sequence in sequences)
    return next(
        (i for i in range(length) if any(sequence[i] != first[i] for sequence in sequences)), length - 1
    )
