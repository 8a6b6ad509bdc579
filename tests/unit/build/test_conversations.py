"""Items and calibration lines: every malformed line is named; answers compare as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.build.conversations import read_calibration, read_items, same_answer, shuffled
from slmops.core.errors import DocumentError


def test_items_with_and_without_ids(tmp_path: Path) -> None:
    """A missing id is the line's number; blank lines are skipped."""
    path = tmp_path / "eval.jsonl"
    path.write_text(
        '{"id":"x","messages":[{"role":"user","content":"hi"}],"answer":"a"}\n\n{"messages":[],"answer":"b"}\n'
    )
    assert [(item.id, item.answer) for item in read_items(path)] == [("x", "a"), ("line-3", "b")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"messages": []}',
        '{"messages": [{"role": "user"}], "answer": "x"}',
        '{"messages": 3, "answer": "x"}',
    ],
)
def test_a_malformed_item_is_named_by_line(tmp_path: Path, line: str) -> None:
    """File, line, and what is expected."""
    path = tmp_path / "eval.jsonl"
    path.write_text('{"messages":[],"answer":"b"}\n' + line + "\n")
    with pytest.raises(DocumentError, match=r"eval\.jsonl:2: expected a JSON object"):
        read_items(path)


def test_no_items_no_file_no_text(tmp_path: Path) -> None:
    """Each has its own message."""
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(DocumentError, match="has no items"):
        read_items(tmp_path / "empty.jsonl")
    with pytest.raises(DocumentError, match="does not exist"):
        read_items(tmp_path / "missing.jsonl")
    with pytest.raises(DocumentError, match="cannot be read"):
        read_items(tmp_path / "latin.jsonl")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DocumentError, match="has no text"):
        read_calibration(tmp_path / "empty.txt", "")


def test_calibration_lines_may_end_in_their_answer(tmp_path: Path) -> None:
    """The answer is the JSON at the end; braces elsewhere belong to the sentence."""
    path = tmp_path / "calibration.txt"
    path.write_text('turn {it} on {"on":{"a":1}}\nwhat is {this\n')
    first, second = read_calibration(path, "Answer in JSON.")
    assert [message["content"] for message in first.messages] == ["Answer in JSON.", "turn {it} on"]
    assert first.answer == '{"on":{"a":1}}'
    assert ([m["role"] for m in second.messages], second.messages[-1]["content"], second.answer) == (
        ["system", "user"],
        "what is {this",
        "",
    )
    (bare, _) = read_calibration(path, "")
    assert [message["role"] for message in bare.messages] == ["user"]


def test_the_order_is_seeded(tmp_path: Path) -> None:
    """The same seed gives the same order, another seed another one, and nothing is lost."""
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(f'{{"id":"{i}","messages":[],"answer":"b"}}\n' for i in range(20)))
    items = read_items(path)
    assert shuffled(items, 1) == shuffled(items, 1) != shuffled(items, 2)
    assert {item.id for item in shuffled(items, 1)} == {str(i) for i in range(20)}


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ('{"b": 1, "a": "é"}', '{"a":"é","b":1}', True),
        ('{"a":1}', '{"a":2}', False),
        ('{"a":1} and more', '{"a":1}', False),
        ("", '{"a":1}', False),
        (" yes\n", "yes", True),
        ("yes", "no", False),
        ("1", "1.0", False),
    ],
)
def test_answers_compare_as_json(got: str, expected: str, same: bool) -> None:
    """Order and spaces do not matter, values and types do; plain text compares stripped."""
    assert same_answer(got, expected) is same
