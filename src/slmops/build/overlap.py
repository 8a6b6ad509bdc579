"""Evaluation sets: frozen by digest, and never trained on.

What a model has seen says nothing about what it can do. Before any work a build compares the evaluation set with the training and
calibration lines that the recipe names: word for word, with case, punctuation and width of characters levelled, and by group or
template, because a sentence made from a template that training saw is no new sentence. It refuses with the lines; a recipe may
allow the overlap with a reason, which the evidence then shows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifact.digest import digest_of, sha256_hex
from slmops.build.conversations import Item, read_calibration, read_items
from slmops.build.graph import SourceFile
from slmops.core.errors import LeakageError

_NAMED = 5
_LEAST_WORDS = 4


@dataclass(frozen=True, slots=True)
class Overlap:
    """One evaluation item that the model may have seen.

    Attributes:
        item: its id; ``number``: which item of the evaluation set, from 1.
        role: ``train``, ``calibration`` or ``general-...``; ``seen``: id of the item there, or the text's name.
        how: ``exact``, ``prompt`` (the same but for case, punctuation, width) or ``group``.
    """

    item: str
    number: int
    role: str
    seen: str
    how: str


def normalised(text: str) -> str:
    """A text without case, punctuation, width variants and runs of blanks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", " ", plain).split())


def overlaps(evaluation: Sequence[Item], seen: Sequence[Item], role: str) -> list[Overlap]:
    """Evaluation items that occur in ``seen``, each with the strongest way in which it does."""
    exact = {_said(item): item.id for item in seen}
    prompts = {normalised(_asked(item)): item.id for item in seen}
    groups = {item.group: item.id for item in seen if item.group is not None}
    found = []
    for number, item in enumerate(evaluation, start=1):
        prompt = normalised(_asked(item))
        for how, where in (
            ("exact", exact.get(_said(item))),
            ("prompt", prompts.get(prompt) if prompt else None),
            ("group", groups.get(item.group) if item.group is not None else None),
        ):
            if where is not None:
                found.append(Overlap(item.id, number, role, where, how))
                break
    return found


def check_never_seen(sources: Mapping[str, SourceFile], allowed: str | None) -> list[Overlap]:
    """Refuse an evaluation set that training or calibration has seen.

    Args:
        sources: the recipe's files by role: ``eval``, and ``train`` and ``calibration`` where it has them.
        allowed: the recipe's reason to evaluate all the same; None: refuse.

    Returns: what overlaps, when it is allowed.

    Raises:
        LeakageError: names the lines.
    """
    evaluation = sources["eval"].path
    items = read_items(evaluation)
    found = [
        overlap
        for role in ("train", "calibration")
        if role in sources
        for overlap in overlaps(items, read_calibration(sources[role].path, ""), role)
    ]
    for role in sorted(role for role in sources if role.startswith("general-")):
        found += quoted(items, sources[role].path, role)
    if found and allowed is None:
        counts = {
            how: sum(1 for overlap in found if overlap.how == how) for how in ("exact", "prompt", "group")
        }
        lines = "; ".join(f"{o.item} is {o.seen} of {o.role} ({o.how})" for o in found[:_NAMED])
        raise LeakageError(
            f"{evaluation}: {len({o.item for o in found})} of {len(items)} evaluation items were seen before "
            f"({', '.join(f'{count} {how}' for how, count in counts.items() if count)}): {lines}"
            + ("; ..." if len(found) > _NAMED else ""),
            hint="take them out of one side (split by template, not by sentence), or say in the recipe why the figures still "
            "mean something: task.allow_overlap: {reason: ...}",
            overlaps=len(found),
        )
    return found


def quoted(evaluation: Sequence[Item], text: Path, role: str) -> list[Overlap]:
    """Evaluation items whose prompt stands, word for word, in a general text that a model learns from.

    Prompts of fewer than four words are passed over: they stand anywhere.
    """
    whole = f" {normalised(text.read_text(encoding='utf-8', errors='replace'))} "
    found = []
    for number, item in enumerate(evaluation, start=1):
        prompt = normalised(_asked(item))
        if len(prompt.split()) >= _LEAST_WORDS and f" {prompt} " in whole:
            found.append(Overlap(item.id, number, role, text.name, "prompt"))
    return found


def frozen_set(evaluation: Path, seed: int, asked: Sequence[str]) -> dict[str, Any]:
    """What identifies the items that were asked, for evidence: figures of two builds compare only where it is equal.

    Args:
        evaluation: the file.
        seed: of the order.
        asked: ids of the items, in order.
    """
    content = evaluation.read_bytes()
    return {
        "sha256": sha256_hex(content),
        "seed": seed,
        "items": list(asked),
        "items_sha256": digest_of(list(asked)),
    }


def _asked(item: Item) -> str:
    """What the user says, all turns."""
    return "\n".join(message["content"] for message in item.messages if message["role"] == "user")


def _said(item: Item) -> tuple[str, str]:
    return _asked(item).strip(), item.answer.strip()
