"""Evaluation items that training or calibration has seen are refused by name, unless a recipe says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.build.conversations import Item, read_items
from slmops.build.graph import SourceFile
from slmops.build.overlap import check_never_seen, frozen_set, normalised, overlaps
from slmops.core.errors import LeakageError


def item(name: str, said: str, answer: str = "a", group: str | None = None) -> Item:
    return Item(
        name, ({"role": "system", "content": "Be brief."}, {"role": "user", "content": said}), answer, group
    )


def sources(folder: Path, **lines: list[dict[str, Any]]) -> dict[str, SourceFile]:
    found = {}
    for role, entries in lines.items():
        path = folder / f"{role}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        found[role] = SourceFile(path, "0" * 64)
    return found


def line(name: str, said: str, **more: str) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": said}], "answer": "{}"} | more


@pytest.mark.parametrize(
    ("said", "answer", "group", "how"),
    [
        ("Turn on the light", "a", None, "exact"),
        ("Turn on the light", "b", None, "prompt"),
        ("turn ON, the  light!", "a", None, "prompt"),
        ("Ｔurn on the light", "a", None, "prompt"),
        ("Something else", "a", "t1", "group"),
        ("Something else", "a", "t2", None),
        ("Something else", "a", None, None),
    ],
)
def test_ways_to_have_been_seen(said: str, answer: str, group: str | None, how: str | None) -> None:
    """Word for word, with case, punctuation, blanks and width levelled, or made from the same template."""
    seen = [item("t-1", "Turn on the light", "a", "t1")]
    found = overlaps([item("e-1", said, answer, group)], seen, "train")
    assert [(overlap.how, overlap.seen, overlap.number) for overlap in found] == (
        [(how, "t-1", 1)] if how else []
    )


def test_a_system_prompt_in_common_is_no_overlap() -> None:
    assert overlaps([item("e", "one")], [item("t", "two")], "train") == []


def test_punctuation_alone_is_no_prompt() -> None:
    """Two prompts without a letter are not the same question."""
    assert normalised("?!") == ""
    assert overlaps([item("e", "?!", "x")], [item("t", "...", "y")], "train") == []


def test_the_lines_are_named(tmp_path: Path) -> None:
    """Which items, where they were seen, how, and how many in all; from both files."""
    files = sources(
        tmp_path,
        eval=[line("e-1", "one"), line("e-2", "two", template="T"), line("e-3", "three")],
        train=[line("t-1", "One."), line("t-2", "other", template="T")],
        calibration=[line("c-1", "three")],
    )
    with pytest.raises(LeakageError) as caught:
        check_never_seen(files, None)
    message = caught.value.message
    assert "3 of 3 evaluation items" in message
    for part in (
        "e-1 is t-1 of train (prompt)",
        "e-2 is t-2 of train (group)",
        "e-3 is c-1 of calibration (exact)",
    ):
        assert part in message
    assert caught.value.exit_code == 2
    assert "allow_overlap" in caught.value.hint


def test_an_allowed_overlap_is_given_back_for_the_record(tmp_path: Path) -> None:
    files = sources(tmp_path, eval=[line("e", "one")], train=[line("t", "one")])
    (overlap,) = check_never_seen(files, "the twenty lines are all there is")
    assert (overlap.item, overlap.role, overlap.how) == ("e", "train", "exact")
    assert check_never_seen(sources(tmp_path, eval=[line("e", "one")]), None) == []


def test_plain_calibration_lines_count(tmp_path: Path) -> None:
    """A text file of sentences is read as calibration reads it: the answer behind the sentence taken off."""
    files = sources(tmp_path, eval=[line("e", "switch off lamp 3")])
    text = tmp_path / "calibration.txt"
    text.write_text('switch off lamp 3 {"off":3}\n')
    with pytest.raises(LeakageError, match="line-1 of calibration"):
        check_never_seen(files | {"calibration": SourceFile(text, "0" * 64)}, None)


def test_a_set_is_frozen_by_its_bytes_its_order_and_its_items(tmp_path: Path) -> None:
    path = sources(tmp_path, eval=[line("e", "one")])["eval"].path
    first = frozen_set(path, 7, ["e", "f"])
    assert first == frozen_set(path, 7, ["e", "f"])
    assert first["items_sha256"] != frozen_set(path, 7, ["f", "e"])["items_sha256"]
    path.write_bytes(path.read_bytes() + b"\n")
    assert first["sha256"] != frozen_set(path, 7, ["e", "f"])["sha256"]


def test_items_carry_groups_and_fields(tmp_path: Path) -> None:
    """``group``, else ``template``; further plain fields by name, and parts of a JSON answer."""
    entry = line("e", "one", template="T", intent="Light") | {
        "answer": '{"intent":"On","slots":{"n":2}}',
        "tags": ["x"],
    }
    (found,) = read_items(sources(tmp_path, eval=[entry])["eval"].path)
    assert found.group == "T"
    assert (found.field("intent"), found.field("template"), found.field("tags")) == ("Light", "T", None)
    assert (found.field("answer.intent"), found.field("answer.slots.n")) == ("On", "2")
    assert (found.field("answer.nothing"), found.field("answer.slots")) == (None, None)
    (grouped,) = read_items(sources(tmp_path, eval=[entry | {"group": 5}])["eval"].path)
    assert grouped.group == "5"
