"""Score a model on the example's held-out commands with the real engine.

Greedy decoding through llama.cpp (``xllamacpp``), on a Unix socket that nobody else uses. Two ways of asking:
free, and with the answer's JSON Schema as a grammar. An answer counts as exact when its canonical JSON equals
the gold answer's.

Usage: python measure.py --model base.gguf --eval eval.jsonl --schema answer.schema.json [--adapter a.gguf]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xllamacpp

CONTEXT_TOKENS = 512
ANSWER_TOKENS = 128

Json = dict[str, Any]


@contextmanager
def engine(model: Path, adapter: Path | None) -> Iterator[Any]:
    """Yield an in-process server with one thread; with ``adapter`` applied at scale 1."""
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.hostnames = [f"{folder}/engine.sock"]
        params.endpoint_slots = False
        params.n_ctx = CONTEXT_TOKENS
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.verbosity = -1
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        server = xllamacpp.Server(params)
        yield server
        del server


def ask(server: Any, messages: Sequence[Json], schema: Json | None) -> str:
    """Return the greedy answer to a conversation; with a schema, held to it by a grammar."""
    request: Json = {
        "messages": list(messages),
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "cache_prompt": False,
    }
    if schema:
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    reply = server.handle_chat_completions(request)
    return str(reply["choices"][0]["message"]["content"])


def canonical(text: str) -> str | None:
    """Return the canonical form of a JSON text, or None when it is not JSON."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except ValueError:
        return None


def score(items: Sequence[Json], answers: Sequence[str]) -> Json:
    """Return ratios over items: valid JSON, right intent, right slots, exact; exact averaged over intents."""
    counts = dict.fromkeys(("valid_json", "intent", "slots", "exact_match"), 0)
    by_intent: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        gold = json.loads(item["answer"])
        text = canonical(answer)
        got = json.loads(text) if text else None
        got = got if isinstance(got, dict) else {}
        exact = text == canonical(item["answer"])
        counts["valid_json"] += text is not None
        counts["intent"] += got.get("intent") == gold["intent"]
        counts["slots"] += got.get("slots") == gold["slots"]
        counts["exact_match"] += exact
        by_intent[gold["intent"]].append(exact)
    total = len(items)
    ratios: Json = {name: round(count / total, 4) for name, count in counts.items()}
    ratios["exact_match_by_intent"] = round(
        sum(sum(hits) / len(hits) for hits in by_intent.values()) / len(by_intent), 4
    )
    return {"items": total, **ratios}


def measure(
    model: Path, adapter: Path | None, items: Sequence[Json], schema: Json, misses: Path | None = None
) -> Json:
    """Return the score with and without the schema; write wrong answers to ``misses`` when given."""
    result: Json = {}
    with engine(model, adapter) as server:
        for name, held_to in (("free", None), ("schema", schema)):
            started = time.monotonic()
            answers = [ask(server, item["messages"], held_to) for item in items]
            result[name] = score(items, answers) | {"wall_s": round(time.monotonic() - started, 1)}
            if misses and name == "free":
                wrong = [
                    f"{item['template']}\n  {item['messages'][-1]['content']}\n"
                    f"  gold {item['answer']}\n  got  {answer}\n"
                    for item, answer in zip(items, answers, strict=True)
                    if canonical(answer) != canonical(item["answer"])
                ]
                misses.write_text("".join(wrong), encoding="utf-8")
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Score a model on held-out home commands.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--schema", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="only the first N items")
    parser.add_argument("--misses", type=Path, help="write wrong answers here")
    options = parser.parse_args()
    items = [json.loads(line) for line in options.eval.read_text(encoding="utf-8").splitlines()]
    items = items[: options.limit or None]
    schema = json.loads(options.schema.read_text(encoding="utf-8"))
    print(json.dumps(measure(options.model, options.adapter, items, schema, options.misses)))


if __name__ == "__main__":
    main()
