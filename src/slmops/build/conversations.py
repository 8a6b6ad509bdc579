"""The task's items and calibration lines, read from files, and rendered to token ids by the engine's own chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.core.errors import DocumentError

Message = dict[str, str]
_OWN_FIELDS = ("id", "messages", "answer")


@dataclass(frozen=True, slots=True)
class Item:
    """One conversation with its expected answer; ``answer`` is empty when there is none.

    Attributes:
        group: what it was made from together with others (a template); None: it stands alone.
        fields: the line's further plain values, as text, by name.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    group: str | None = None
    fields: tuple[tuple[str, str], ...] = ()

    def field(self, name: str) -> str | None:
        """A field of the line, or of its JSON answer (``answer.intent``); None where there is none."""
        if not name.startswith("answer."):
            return dict(self.fields).get(name)
        try:
            value = json.loads(self.answer)
            for part in name.split(".")[1:]:
                value = value[part]
        except (ValueError, KeyError, TypeError):
            return None
        return str(value) if isinstance(value, (str, int, float, bool)) else None


def read_items(path: Path) -> list[Item]:
    """Read JSON lines with ``messages`` and ``answer`` (and maybe ``id``, ``group`` or ``template``, and further fields).

    Raises:
        DocumentError: a line is malformed; names file and line. Or the file is empty.
    """
    items = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
            messages = tuple(
                {"role": str(m["role"]), "content": str(m["content"])} for m in value["messages"]
            )
            answer = str(value["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(
                f"{path}:{number}: expected a JSON object with messages and answer: {error}",
                hint='one object a line: {"messages": [{"role": "user", "content": "..."}], "answer": "..."}',
            ) from error
        group = value.get("group", value.get("template"))
        plain = {k: v for k, v in value.items() if k not in _OWN_FIELDS and isinstance(v, (str, int, float))}
        items.append(
            Item(
                str(value.get("id", f"line-{number}")),
                messages,
                answer,
                None if group is None else str(group),
                tuple(sorted((k, str(v)) for k, v in plain.items())),
            )
        )
    if not items:
        raise DocumentError(
            f"{path}: has no items", hint="give at least some 20 items; 100 make gates worth something"
        )
    return items


def read_calibration(path: Path, system_prompt: str) -> list[Item]:
    """Read calibration text: JSON lines as :func:`read_items`, or plain sentences.

    A plain line is what a user says, optionally followed by a space and the answer as a JSON object.

    Args:
        path: ``.jsonl``, or text.
        system_prompt: put before every plain line; may be empty.
    """
    if path.suffix == ".jsonl" or _begins_with_items(path):  # a step's file has its digest for a name
        return read_items(path)
    items = []
    for number, line in enumerate(_lines(path), start=1):
        text, answer = _split_answer(line.strip())
        if text:
            system = ({"role": "system", "content": system_prompt},) if system_prompt else ()
            items.append(Item(f"line-{number}", (*system, {"role": "user", "content": text}), answer))
    if not items:
        raise DocumentError(
            f"{path}: has no text", hint="give some 100 sentences like those that the model will meet"
        )
    return items


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in a seeded order, so that the first n are a fair sample."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def canonical_answer(text: str) -> str | None:
    """The canonical form of a JSON text (sorted keys, no spaces); None when it is not JSON."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except ValueError:
        return None


def same_answer(got: str, expected: str) -> bool:
    """Whether an answer is right: equal as JSON, or for a gold answer that is no JSON, equal as stripped text."""
    gold = canonical_answer(expected)
    return got.strip() == expected.strip() if gold is None else canonical_answer(got) == gold


def _lines(path: Path) -> list[str]:
    try:
        # not splitlines, which also splits at U+2028 and its like, that texts may hold
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DocumentError(
            f"{path}: does not exist",
            hint="check the path in the recipe; it is relative to the recipe's folder",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{path}: cannot be read: {error}", hint="give UTF-8 text") from error


def _begins_with_items(path: Path) -> bool:
    first = next((line for line in _lines(path) if line.strip()), "")
    try:
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, dict) and "messages" in value


def _split_answer(line: str) -> tuple[str, str]:
    at = line.find(" {")
    while at >= 0:
        try:
            json.loads(line[at + 1 :])
        except ValueError:
            at = line.find(" {", at + 1)
        else:
            return line[:at], line[at + 1 :]
    return line, ""
