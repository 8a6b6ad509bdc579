"""Make the example's data: spoken home commands with their gold JSON.

The English intent templates of ``home-assistant-intents`` (Apache-2.0) are walked at random, noting for each
sentence which words fill which slot. Output, the same bytes for the same seed and package versions:

    train.jsonl          a line each: id, template, messages (system, user), answer (canonical JSON text)
    eval.jsonl           the same, held out
    calibration.txt      other sentences with their answers, plain text, one a line
    answer.schema.json   JSON Schema of the answers, in the form that llama.cpp turns into a grammar

What keeps the score honest:

- The split is by template: no evaluation sentence comes from a template that training saw, and no training
  sentence has the same shape (the sentence with its values taken out) as an evaluation sentence. Every
  combination of intent and slots keeps a template in training: what is tested is another phrasing, not a
  command that nobody explained.
- Every list of open values (rooms, names, messages) is divided: evaluation draws from words that training
  does not have in that list. Common to both are only words that tell the kind (*sconce* in "amber sconce",
  the room behind an unseen word).
- A pattern that stands for two different answers is dropped everywhere. Answers hold only what the text says:
  an area that Home Assistant would take from the speaker's room is not asked for.

Usage: python make_dataset.py --out DIR [--seed 7] [--eval-items N] [--train-items N] [--calibration-items N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    TextChunk,
)
from hassil.intents import Intents, RangeSlotList, SlotList, TextSlotList, WildcardSlotList
from hassil.parse_expression import parse_sentence
from home_assistant_intents import get_intents
from home_values import HomeValues

SYSTEM_PROMPT = "Turn the home command into JSON."
EVAL_RATIO = 0.2  # of an intent's templates
PATTERN_SAMPLES = 120  # per template, to find patterns with several answers
SAME_TEXT_LIMIT = 8  # some intents have only a few sentences; training may repeat them this often
ALIASES = {"input_button": "button"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """One sentence template with what its block says about it."""

    id: str
    intent: str
    combination: str
    expression: Expression
    fixed_slots: Json
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Sentence:
    """A sentence, its answer, and both with the open values taken out.

    ``pattern`` keeps the words of closed lists (colours, states) and decides what is ambiguous; ``shape``
    takes these out too and decides what evaluation and training may share: nothing.
    """

    template: str
    text: str
    intent: str
    slots: Json
    pattern: str
    pattern_answer: str
    shape: str

    @property
    def answer(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return canonical({"intent": self.intent, "slots": self.slots})


@dataclass
class _Walk:
    """What one walk has gathered about the slots."""

    slots: Json = field(default_factory=dict)
    marks: Json = field(default_factory=dict)


class Walker:
    """Random sentences from templates.

    Args:
        intents: the package's parsed English intents.
        values: the lists that the package leaves open.
    """

    def __init__(self, intents: Intents, values: HomeValues) -> None:
        """Keep both."""
        self._intents = intents
        self._values = values

    def sentence(self, template: Template, rng: random.Random) -> Sentence:
        """Return one random sentence of a template."""
        walk = _Walk(dict(template.fixed_slots), dict(template.fixed_slots))
        domain = rng.choice(template.domains) if template.domains else ""
        texts = self._walk(template.expression, domain, walk, rng)
        text, pattern, shape = (re.sub(r"\s+", " ", part).strip() for part in texts)
        marks = canonical({"intent": template.intent, "slots": walk.marks})
        return Sentence(template.id, text, template.intent, walk.slots, pattern, marks, shape)

    def _walk(self, node: Expression, domain: str, walk: _Walk, rng: random.Random) -> tuple[str, str, str]:
        if isinstance(node, TextChunk):
            return node.original_text, node.original_text, node.original_text
        if isinstance(node, RuleReference):
            return self._walk(self._intents.expansion_rules[node.rule_name].expression, domain, walk, rng)
        if isinstance(node, ListReference):
            return self._fill(node, domain, walk, rng)
        if isinstance(node, Alternative):
            return self._walk(rng.choice(node.items), domain, walk, rng)
        if isinstance(node, Group):
            items: Sequence[Expression] = node.items
            if isinstance(node, Permutation):
                items = rng.sample(items, len(items))
            parts = [self._walk(item, domain, walk, rng) for item in items]
            return tuple("".join(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]
        raise TypeError(f"unknown template node {node!r}")

    def _fill(
        self, node: ListReference, domain: str, walk: _Walk, rng: random.Random
    ) -> tuple[str, str, str]:
        name, slot = node.list_name, node.slot_name
        mark = {"name": f"{{name {domain}}}", "area": "{area}", "floor": "{floor}"}.get(name)
        if mark:
            chooser = {"area": self._values.area, "floor": self._values.floor}.get(name)
            text = chooser(rng) if chooser else self._values.name(ALIASES.get(domain, domain), rng)
            walk.slots[slot], walk.marks[slot] = text, mark
            return text, mark, mark
        slot_list: SlotList = self._intents.slot_lists[name]
        if isinstance(slot_list, WildcardSlotList):
            text, mark = self._values.wildcard(name)(rng), "{words}"
            walk.slots[slot], walk.marks[slot] = text, mark
            return text, mark, mark
        if isinstance(slot_list, RangeSlotList):
            number = rng.choice(list(slot_list.get_numbers()))
            value = number * slot_list.multiplier if slot_list.multiplier else number
            sign = "-" if value < 0 or (slot_list.multiplier or 1) < 0 else ""
            walk.slots[slot] = int(value) if float(value).is_integer() else value
            walk.marks[slot] = sign + "{number}"
            return f"{number:g}", "{number}", "{number}"
        if isinstance(slot_list, TextSlotList):
            choice = rng.choice(slot_list.values)
            text = self._walk(choice.text_in, domain, walk, rng)[0]
            walk.slots[slot] = walk.marks[slot] = choice.value_out
            return text, text, f"{{{name}}}"
        raise TypeError(f"unknown list type {slot_list!r}")


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, unescaped letters."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def load_templates(source: Json) -> list[Template]:
    """Return every English template in the package's order; its id depends on its own content only."""
    templates: dict[str, Template] = {}
    for intent, body in source["intents"].items():
        for block in body["data"]:
            domains = tuple(block.get("requires_context", {}).get("domain", ()))
            for text in block["sentences"]:
                fixed = block.get("slots", {})
                content = canonical([text, domains, fixed])
                name = block["metadata"]["slot_combination"]
                key = f"{intent}/{name}/{hashlib.sha256(content.encode()).hexdigest()[:8]}"
                combination = canonical([intent, name, domains, fixed])
                expression = parse_sentence(text).expression
                templates[key] = Template(key, intent, combination, expression, fixed, domains)
    return list(templates.values())


def split_templates(templates: Sequence[Template], seed: int) -> tuple[list[Template], list[Template]]:
    """Return (training, evaluation): a fifth of each intent's templates, never the last of a combination."""
    by_intent: dict[str, list[Template]] = defaultdict(list)
    left = Counter(template.combination for template in templates)
    for template in templates:
        by_intent[template.intent].append(template)
    held_out: set[str] = set()
    for intent, group in by_intent.items():
        wanted = max(1, round(len(group) * EVAL_RATIO))
        for template in random.Random(f"{seed}/split/{intent}").sample(group, len(group)):
            if wanted and left[template.combination] > 1:
                held_out.add(template.id)
                left[template.combination] -= 1
                wanted -= 1
    return [t for t in templates if t.id not in held_out], [t for t in templates if t.id in held_out]


def ambiguous_patterns(walker: Walker, templates: Sequence[Template], seed: int) -> set[str]:
    """Return the patterns that were seen to stand for more than one answer."""
    answers: dict[str, set[str]] = defaultdict(set)
    for template in templates:
        rng = random.Random(f"{seed}/patterns/{template.id}")
        for _ in range(PATTERN_SAMPLES):
            sentence = walker.sentence(template, rng)
            answers[sentence.pattern].add(sentence.pattern_answer)
    return {pattern for pattern, seen in answers.items() if len(seen) > 1}


def draw(
    walker: Walker, templates: Sequence[Template], count: int, refused: Refusal, rng: random.Random
) -> Iterator[Sentence]:
    """Yield ``count`` sentences: intents by the root of their templates, an intent's templates in turn."""
    by_intent: dict[str, list[Template]] = defaultdict(list)
    for template in templates:
        by_intent[template.intent].append(template)
    for group in by_intent.values():
        rng.shuffle(group)
    weights = {intent: len(group) ** 0.5 for intent, group in by_intent.items()}
    turns = dict.fromkeys(by_intent, 0)
    dry: dict[str, int] = dict.fromkeys(by_intent, 0)
    made = 0
    while made < count:
        live = [intent for intent in by_intent if dry[intent] < 40]
        if not live:
            raise SystemExit(f"only {made} of {count} different sentences exist: ask for fewer")
        intent = rng.choices(live, [weights[i] for i in live])[0]
        group = by_intent[intent]
        sentence = walker.sentence(group[turns[intent] % len(group)], rng)
        turns[intent] += 1
        if refused.refuses(sentence):
            dry[intent] += 1
            continue
        dry[intent] = 0
        made += 1
        yield sentence


class Refusal:
    """Which sentences may not be used (again).

    Args:
        ambiguous: patterns with several answers.
        shapes: shapes that belong to evaluation.
        texts: sentences used elsewhere.
        same_text_limit: how often one sentence may come.
    """

    def __init__(self, ambiguous: set[str], shapes: set[str], texts: set[str], same_text_limit: int) -> None:
        """Start with nothing used."""
        self._ambiguous = ambiguous
        self._shapes = shapes
        self._texts = texts
        self._limit = same_text_limit
        self._used: dict[str, int] = defaultdict(int)

    def refuses(self, sentence: Sentence) -> bool:
        """Return whether the sentence may not be used; one that may is counted."""
        if (
            sentence.pattern in self._ambiguous
            or sentence.shape in self._shapes
            or sentence.text in self._texts
        ):
            return True
        self._used[sentence.text] += 1
        return self._used[sentence.text] > self._limit


def answer_schema(templates: Sequence[Template], sentences: Sequence[Sentence]) -> Json:
    """Return the JSON Schema of answers: every intent; every slot with the type and closed values seen."""
    seen: dict[str, set[Any]] = defaultdict(set)
    open_slots: set[str] = set()
    for sentence in sentences:
        marks = json.loads(sentence.pattern_answer)["slots"]
        for slot, value in sentence.slots.items():
            if isinstance(value, str) and str(marks[slot]).startswith("{"):
                open_slots.add(slot)
            seen[slot].add(value)
    slots: Json = {}
    for slot in sorted(seen):
        texts = sorted(value for value in seen[slot] if isinstance(value, str))
        numbers = [value for value in seen[slot] if not isinstance(value, str)]
        kinds: list[Json] = []
        if texts:
            kinds.append({"type": "string"} if slot in open_slots else {"type": "string", "enum": texts})
        if numbers:
            kinds.append({"type": "integer" if all(isinstance(n, int) for n in numbers) else "number"})
        slots[slot] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Home command",
        "type": "object",
        "properties": {
            "intent": {"type": "string", "enum": sorted({template.intent for template in templates})},
            "slots": {"type": "object", "properties": slots, "additionalProperties": False},
        },
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }


def replace(path: Path, lines: Iterable[str]) -> None:
    """Put a whole new file in the place of ``path``: who reads it meanwhile sees the old one or the new one, no half."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as out:
            out.writelines(lines)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def as_lines(prefix: str, sentences: Sequence[Sentence]) -> Iterator[str]:
    """One JSON object a line."""
    for number, sentence in enumerate(sentences):
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": sentence.text},
        ]
        line = {"id": f"{prefix}-{number:05d}", "template": sentence.template, "messages": messages}
        line["answer"] = sentence.answer
        yield json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


def make(out: Path, seed: int, eval_items: int, train_items: int, calibration_items: int) -> Json:
    """Write the four files into ``out`` and return their counts."""
    source: Json = get_intents("en") or {}
    intents = Intents.from_dict(source)
    templates = load_templates(source)
    training, evaluation = split_templates(templates, seed)
    train_walker, eval_walker = (Walker(intents, HomeValues(half, seed)) for half in (0, 1))
    ambiguous = ambiguous_patterns(train_walker, templates, seed)

    fresh = Refusal(ambiguous, set(), set(), 1)
    eval_set = list(draw(eval_walker, evaluation, eval_items, fresh, random.Random(f"{seed}/eval")))
    shapes = {sentence.shape for sentence in eval_set}
    train_refusal = Refusal(ambiguous, shapes, {s.text for s in eval_set}, SAME_TEXT_LIMIT)
    train_set = list(draw(train_walker, training, train_items, train_refusal, random.Random(f"{seed}/train")))
    used = {sentence.text for sentence in (*eval_set, *train_set)}
    calibration_refusal = Refusal(ambiguous, shapes, used, 1)
    calibration_rng = random.Random(f"{seed}/calibration")
    calibration = list(draw(train_walker, training, calibration_items, calibration_refusal, calibration_rng))

    out.mkdir(parents=True, exist_ok=True)
    replace(out / "train.jsonl", as_lines("train", train_set))
    replace(out / "eval.jsonl", as_lines("eval", eval_set))
    replace(out / "calibration.txt", (f"{sentence.text} {sentence.answer}\n" for sentence in calibration))
    schema = answer_schema(templates, [*train_set, *eval_set, *calibration])
    replace(out / "answer.schema.json", [json.dumps(schema, indent=1) + "\n"])
    return {
        "seed": seed,
        "templates": {"train": len(training), "eval": len(evaluation)},
        "items": {"train": len(train_set), "eval": len(eval_set), "calibration": len(calibration)},
        "intents": {
            "train": len({s.intent for s in train_set}),
            "eval": len({s.intent for s in eval_set}),
        },
        "ambiguous_patterns": len(ambiguous),
        "packages": {name: version(name) for name in ("home-assistant-intents", "hassil")},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the home-intents data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--eval-items", type=int, default=400)
    parser.add_argument("--train-items", type=int, default=16000)
    parser.add_argument("--calibration-items", type=int, default=400)
    options = parser.parse_args()
    summary = make(
        options.out, options.seed, options.eval_items, options.train_items, options.calibration_items
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
