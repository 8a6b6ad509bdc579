"""The example's data: same bytes for a seed, gold labels that hassil itself confirms, an honest split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

hassil = pytest.importorskip("hassil")
intents_package = pytest.importorskip("home_assistant_intents")

EXAMPLE = Path(__file__).parents[2] / "examples" / "home-intents"
FILES = ("train.jsonl", "eval.jsonl", "calibration.txt", "answer.schema.json")
HERE = "the speaker's own area"


def make(out: Path, hash_seed: int, *options: str) -> dict[str, Any]:
    """Run the script as a user would and return the summary that it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "make_dataset.py"), "--out", str(out), *options],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of seed 7, with fewer training items than the real one."""
    out = tmp_path_factory.mktemp("home-intents")
    make(out, 1, "--train-items", "4000", "--eval-items", "300")
    return out


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(item: dict[str, Any]) -> str:
    """The words that the user said."""
    return str(item["messages"][-1]["content"])


def test_remaking_leaves_a_reader_the_file_that_it_opened(tmp_path: Path) -> None:
    """A demo may make the data while another one reads it: files are replaced whole, and nothing else is left."""
    sizes = ("--train-items", "300", "--eval-items", "60", "--calibration-items", "50")
    make(tmp_path, 1, *sizes)
    before = (tmp_path / "train.jsonl").read_bytes()
    with (tmp_path / "train.jsonl").open("rb") as opened:
        make(tmp_path, 1, "--seed", "8", *sizes)
        assert opened.read() == before
    assert (tmp_path / "train.jsonl").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_same_seed_same_bytes_other_seed_other_split(tmp_path: Path) -> None:
    """Neither Python's hash seed nor the run changes a byte; another seed holds out other templates."""
    sizes = ("--train-items", "500", "--eval-items", "60", "--calibration-items", "50")
    make(tmp_path / "a", 1, *sizes)
    make(tmp_path / "b", 2, *sizes)
    make(tmp_path / "c", 1, *sizes, "--seed", "8")
    digests = [
        {name: hashlib.sha256((tmp_path / run / name).read_bytes()).hexdigest() for name in FILES}
        for run in "ab"
    ]
    assert digests[0] == digests[1]
    first, other = ({item["template"] for item in read(tmp_path / run / "eval.jsonl")} for run in "ac")
    assert len(first - other) > len(first) / 2


def test_evaluation_is_held_out_by_template_and_sentence(folder: Path) -> None:
    """No template, no sentence and no calibration line is on both sides."""
    train, held_out = read(folder / "train.jsonl"), read(folder / "eval.jsonl")
    assert not {item["template"] for item in train} & {item["template"] for item in held_out}
    sentences = {command(item) for item in held_out}
    assert len(sentences) == len(held_out)
    assert not {command(item) for item in train} & sentences
    lines = (folder / "calibration.txt").read_text(encoding="utf-8").splitlines()
    assert not {re.sub(r" \{.*", "", line) for line in lines} & (
        sentences | {command(item) for item in train}
    )


def test_evaluation_names_are_unseen(folder: Path) -> None:
    """Of multi-word names that evaluation asks for, none was an answer in training: they must be copied."""

    def names(items: list[dict[str, Any]], slots: tuple[str, ...]) -> set[str]:
        found = (json.loads(item["answer"])["slots"].get(slot) for item in items for slot in slots)
        return {value for value in found if isinstance(value, str) and " " in value}

    slots = ("name", "area", "floor", "message", "search_query", "conversation_command")
    asked = names(read(folder / "eval.jsonl"), slots)
    plain_rooms = {"living room", "dining room", "laundry room", "guest room", "utility room"}
    plain_rooms |= {"family room", "game room", "powder room", "breakfast room"}
    assert len(asked) > 80
    assert not (asked & names(read(folder / "train.jsonl"), slots)) - plain_rooms


def test_answers_are_canonical_and_fit_the_schema(folder: Path) -> None:
    """Every answer is canonical JSON that the schema accepts; a foreign intent or slot is refused."""
    schema = json.loads((folder / "answer.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for item in (*read(folder / "train.jsonl"), *read(folder / "eval.jsonl")):
        answer = json.loads(item["answer"])
        assert item["answer"] == json.dumps(answer, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        validator.validate(answer)
    assert not validator.is_valid({"intent": "HassMakeTea", "slots": {}})
    assert not validator.is_valid({"intent": "HassTurnOn", "slots": {"colour": "red"}})
    slots = list(schema["properties"]["slots"]["properties"])
    assert slots == sorted(slots), "llama.cpp's grammar keeps this order; answers are sorted too"


def test_every_intent_is_taught(folder: Path) -> None:
    """All intents of the package are in training and in the schema; nearly all are asked for."""
    package = set(intents_package.get_intents("en")["intents"])
    taught = {json.loads(item["answer"])["intent"] for item in read(folder / "train.jsonl")}
    asked = {json.loads(item["answer"])["intent"] for item in read(folder / "eval.jsonl")}
    schema = json.loads((folder / "answer.schema.json").read_text(encoding="utf-8"))
    assert taught == package == set(schema["properties"]["intent"]["enum"])
    assert len(asked) >= 35


def test_no_sentence_has_two_answers(folder: Path) -> None:
    """The same words always mean the same, over training and evaluation."""
    answers: dict[str, str] = {}
    for item in (*read(folder / "train.jsonl"), *read(folder / "eval.jsonl")):
        assert answers.setdefault(command(item), item["answer"]) == item["answer"], command(item)


def test_hassil_recognises_the_gold_answer(folder: Path) -> None:
    """Home Assistant's own matcher, given the home's names, finds the gold answer for sampled sentences."""
    from hassil.intents import Intents, TextSlotList

    source = intents_package.get_intents("en")
    intents = Intents.from_dict(source)
    domains = {
        domain
        for body in source["intents"].values()
        for block in body["data"]
        for domain in block.get("requires_context", {}).get("domain", ())
    }
    for item in read(folder / "eval.jsonl")[::6]:
        gold = json.loads(item["answer"])
        slots = gold["slots"]
        name = slots.get("name", "no such device")
        lists = {
            "name": TextSlotList.from_tuples(
                [(name, name, {"domain": domain}) for domain in sorted(domains)]
            ),
            "area": TextSlotList.from_strings([slots.get("area", "no such area")]),
            "floor": TextSlotList.from_strings([slots.get("floor", "no such floor")]),
        }
        found = []
        for result in hassil.recognize_all(
            command(item), intents, slot_lists=lists, intent_context={"area": HERE}
        ):
            values = {entity.name: entity.value for entity in result.entities_list if entity.value != HERE}
            found.append((result.intent.name, values))
        assert (gold["intent"], slots) in found, command(item)


@pytest.mark.model
def test_adapter_answers_held_out_commands(folder: Path, small_model: Path) -> None:
    """On 40 held-out commands the committed adapter is exact on more than a third, the base on none."""
    pytest.importorskip("xllamacpp")
    adapter = EXAMPLE / "adapter" / "home-intents-r8.gguf"
    assert adapter.stat().st_size <= 6_000_000
    provenance = json.loads((EXAMPLE / "adapter" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["adapter"]["sha256"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert provenance["base"]["sha256"] == hashlib.sha256(small_model.read_bytes()).hexdigest()

    def exact_ratio(*options: str) -> float:
        files = ["--eval", str(folder / "eval.jsonl"), "--schema", str(folder / "answer.schema.json")]
        files += ["--limit", "40"]
        done = subprocess.run(
            [sys.executable, str(EXAMPLE / "measure.py"), "--model", str(small_model), *files, *options],
            check=True,
            capture_output=True,
            text=True,
        )
        return float(json.loads(done.stdout.splitlines()[-1])["free"]["exact_match"])

    assert exact_ratio("--adapter", str(adapter)) > 0.35
    assert exact_ratio() < 0.05
