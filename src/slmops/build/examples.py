"""A handful of examples, as people have them, made into held-out and calibration items.

    {"prompt": "Turn on the lamp", "answer": {"intent": "on", "name": "lamp"}}
    {"messages": [{"role": "user", "content": "..."}], "answer": "...", "group": "template 7"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The split is by seed and whole groups, so that nothing that is measured on was calibrated on: what shares a ``group`` (or
``template``), and equal prompts, stay together.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.build.conversations import Item, Message, read_items
from slmops.build.files import write_whole
from slmops.core.errors import DocumentError

LEAST_EXAMPLES = 4
#: up to here one half is held out: fewer held-out items could judge nothing
SMALL_SET = 40
HELD_OUT_SHARE = 3
_GROUP_KEYS = ("group", "template")
_OWN = ("id", "prompt", "messages", "answer", *_GROUP_KEYS)
_FIX = (
    'one object a line: {"prompt": "what is asked", "answer": "what is right"}; '
    "the answer may be text or a JSON value"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One example: an item, and what it may not be separated from."""

    item: Item
    group: str


@dataclass(frozen=True, slots=True)
class Split:
    """Items by their use; no group is in both."""

    held_out: tuple[Item, ...]
    calibration: tuple[Item, ...]


def read_examples(path: Path, system_prompt: str = "") -> list[Example]:
    """Read and check examples.

    Args:
        path: JSON lines.
        system_prompt: put before those that have none; may be empty.

    Raises:
        DocumentError: names file, line, what was found and what to write; or too few lines.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{path}: cannot be read: {error}", hint=f"give UTF-8 text, {_FIX}") from error
    found = [
        _example(line, f"{path}:{number}", number, system_prompt)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(found) < LEAST_EXAMPLES:
        raise DocumentError(
            f"{path}: has {len(found)} examples, at least {LEAST_EXAMPLES} are needed: half of them are held out to measure on",
            hint=f"add some more (20 are good, 200 can prove something); {_FIX}",
        )
    groups = {example.group for example in found}
    if len(groups) < 2:
        raise DocumentError(
            f"{path}: all {len(found)} examples are of one group, {next(iter(groups))!r}: nothing could be held out",
            hint="give at least two groups or unlike prompts, or leave the group out",
        )
    return found


def split_examples(examples: Sequence[Example], seed: int) -> Split:
    """Hold out whole groups, in a seeded order, until there are enough: half of a small set, a third of a larger one.

    Args:
        examples: of at least two groups.
        seed: of the order.
    """
    groups: dict[str, list[Item]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example.item)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    wanted = (len(examples) + 1) // 2 if len(examples) < SMALL_SET else len(examples) // HELD_OUT_SHARE
    held_out: list[Item] = []
    taken: set[str] = set()
    for name in order[:-1]:  # one group at least is left to calibrate on
        if len(held_out) >= wanted:
            break
        held_out += groups[name]
        taken.add(name)
    rest = [item for name in order if name not in taken for item in groups[name]]
    return Split(tuple(held_out), tuple(rest))


def write_split(
    examples: Path, general: Path, folder: Path, *, seed: int, system_prompt: str = ""
) -> dict[str, Any]:
    """Write ``eval.jsonl``, ``calibration.jsonl`` and ``general.jsonl``; the same input gives the same bytes.

    ``calibration.jsonl`` has the examples that are not held out and every second general item, mixed, so that any beginning
    of it has both; ``general.jsonl`` has the other general items, held out.

    Args:
        examples: the user's file.
        general: packaged text, as items.
        folder: existing.
        seed: of the split.
        system_prompt: see :func:`read_examples`.

    Returns: counts and the ``kind`` of the task.
    """
    found = read_examples(examples, system_prompt)
    parts = split_examples(found, seed)
    texts = read_items(general)
    for name, items in (
        ("eval.jsonl", parts.held_out),
        ("calibration.jsonl", mixed(parts.calibration, texts[0::2])),
        ("general.jsonl", texts[1::2]),
    ):
        write_whole(folder / name, encode_items(items).encode())
    return {
        "examples": len(found),
        "groups": len({example.group for example in found}),
        "held_out": len(parts.held_out),
        "calibration": len(parts.calibration),
        "general_calibration": len(texts[0::2]),
        "general_held_out": len(texts[1::2]),
        "kind": kind_of([example.item for example in found]),
    }


def mixed(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Alternating as long as both last."""
    shorter = min(len(first), len(second))
    pairs = [item for pair in zip(first, second, strict=False) for item in pair]
    return [*pairs, *first[shorter:], *second[shorter:]]


def kind_of(items: Sequence[Item]) -> str:
    """``extraction`` when every answer is a JSON object, else ``text``."""
    return "extraction" if all(is_object(item.answer) for item in items) else "text"


def encode_items(items: Sequence[Item]) -> str:
    """JSON lines, as :func:`slmops.build.conversations.read_items` reads them."""
    return "".join(
        json.dumps(
            {"id": i.id, "messages": list(i.messages), "answer": i.answer}
            | ({} if i.group is None else {"group": i.group})
            | dict(i.fields),
            ensure_ascii=False,
        )
        + "\n"
        for i in items
    )


def _example(line: str, where: str, number: int, system_prompt: str) -> Example:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{where}:{error.colno}: not valid JSON: {error.msg}, found {line[:60]!r}", hint=_FIX
        ) from error
    if not isinstance(value, dict):
        raise DocumentError(f"{where}: expected a JSON object, found {line[:60]!r}", hint=_FIX)
    messages = _messages(value, where)
    answer = value.get("answer")
    if answer is None and messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if answer is None or answer == "" or not messages:
        missing = "answer" if messages else "prompt"
        raise DocumentError(
            f"{where}: has no {missing} (its keys: {', '.join(map(str, value)) or 'none'})", hint=_FIX
        )
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    asked = " ".join(m["content"] for m in messages if m["role"] == "user")
    group = next(
        (str(value[key]) for key in _GROUP_KEYS if value.get(key) is not None), asked.strip().lower()
    )
    return Example(Item(str(value.get("id", f"line-{number}")), tuple(messages), text), group)


def _messages(value: dict[str, Any], where: str) -> list[Message]:
    if "prompt" in value and "messages" in value:
        raise DocumentError(f"{where}: has prompt and messages, expected one of them", hint=_FIX)
    if isinstance(value.get("prompt"), str) and value["prompt"].strip():
        return [{"role": "user", "content": value["prompt"]}]
    given = value.get("messages", [])
    try:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in given]
    except (TypeError, KeyError) as error:
        raise DocumentError(
            f'{where}: messages must be a list of {{"role": ..., "content": ...}}, found {str(given)[:60]!r}',
            hint=_FIX,
        ) from error


def is_object(answer: str) -> bool:
    """Whether an answer is a JSON object."""
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False
