"""The task: what a model answers to held-out items through the shipped engine, free and held to the answer's schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import jsonschema

from slmops.artifact.digest import sha256_hex
from slmops.build.conversations import Item, canonical_answer, read_items, same_answer, shuffled
from slmops.build.files import sha256_of_file
from slmops.build.graph import StepContext
from slmops.core.errors import BuildError
from slmops.runtimes import EngineSpec, load, open_engine

USES = ("slmops.build.conversations",)
#: conversations at once: the engine decodes them in one batch
SLOTS = 8
PROMPT_TOKENS = 1024


def ask(context: StepContext) -> dict[str, Any]:
    """Ask every item, greedily.

    Files in: ``model``, ``eval``, maybe ``schema``; values in: ``text`` (for ``answer_tokens``); out: ``answers.jsonl``. Params:
    ``task_items`` (0: all), ``constrained_items``, ``seed``. Value: ``free`` and ``constrained``, each with ``items`` (ids),
    ``exact`` and ``valid`` (booleans in that order) and ``said`` (a short digest of each answer, to see which flipped); the texts
    of free answers stay in the file. ``model_sha256``: of the file that answered, hashed after it did.

    Raises:
        BuildError: the engine refused a request.
    """
    params = context.params
    items = shuffled(read_items(context.files["eval"]), params["seed"])
    items = items[: params["task_items"] or None]
    schema = (
        json.loads(context.files["schema"].read_text(encoding="utf-8")) if "schema" in context.files else None
    )
    constrained = items[: params["constrained_items"]] if schema is not None else []
    return asyncio.run(_ask_all(context, items, constrained, schema))


async def _ask_all(
    context: StepContext, items: Sequence[Item], constrained: Sequence[Item], schema: dict[str, Any] | None
) -> dict[str, Any]:
    tokens, params = int(context.values["text"]["answer_tokens"]), context.params
    runtime = params.get("runtime", "llama.cpp")
    capabilities = load(runtime).capabilities
    caches = capabilities.kv_cache_types
    most = params.get("context_tokens", PROMPT_TOKENS + tokens)  # of an export, whose context is fixed
    slots = min(SLOTS, capabilities.max_slots or SLOTS)
    if "response_format" not in capabilities.chat_fields:
        constrained = []
    spec = EngineSpec(
        runtime=runtime,
        model_path=context.files["model"],
        context_tokens=min(PROMPT_TOKENS + tokens, most),
        slots=slots,
        kv_cache="f16" if "f16" in caches else sorted(caches)[0],
        batch_tokens=512,
        ubatch_tokens=512,
    )
    done, total = 0, len(items) + len(constrained)

    def count(_: object) -> None:
        nonlocal done
        done += 1
        context.progress(done / total, f"{done} of {total} items")

    async with open_engine(spec) as engine:
        transport = httpx.AsyncHTTPTransport(uds=str(engine.socket_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
            turns = asyncio.Semaphore(slots)

            async def one(item: Item, held_to: dict[str, Any] | None) -> str:
                async with turns:
                    answer = await _request(client, item, tokens, held_to)
                count(answer)
                return answer

            free = await asyncio.gather(*(one(item, None) for item in items))
            held = await asyncio.gather(*(one(item, schema) for item in constrained))
    lines = [
        json.dumps({"id": item.id, "expected": item.answer, "got": got}, ensure_ascii=False)
        for item, got in zip(items, free, strict=True)
    ]
    (context.out / "answers.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {
        "free": judged(items, free, schema),
        "constrained": judged(constrained, held, schema),
        "model_sha256": sha256_of_file(context.files["model"]),
    }


async def _request(client: httpx.AsyncClient, item: Item, tokens: int, held_to: dict[str, Any] | None) -> str:
    body: dict[str, Any] = {"messages": list(item.messages), "temperature": 0, "max_tokens": tokens}
    if held_to is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": held_to},
        }
    response = await client.post("/v1/chat/completions", json=body)
    if response.is_error:
        raise BuildError(
            f"item {item.id}: the engine answered {response.status_code}: {response.text[:300]}",
            hint="shorten the item, or correct task.answer_schema",
        )
    return str(response.json()["choices"][0]["message"].get("content") or "")


def judged(items: Sequence[Item], answers: Sequence[str], schema: dict[str, Any] | None) -> dict[str, Any]:
    """Which answers are right, and which are valid by the schema (or just JSON, without one)."""
    validator = jsonschema.Draft202012Validator(schema) if schema is not None else None
    return {
        "items": [item.id for item in items],
        "exact": [same_answer(got, item.answer) for item, got in zip(items, answers, strict=True)],
        "valid": [_is_valid(got, validator) for got in answers],
        "said": [sha256_hex((canonical_answer(got) or got.strip()).encode())[:16] for got in answers],
    }


def _is_valid(answer: str, validator: jsonschema.Draft202012Validator | None) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return validator is None or bool(validator.is_valid(value))
