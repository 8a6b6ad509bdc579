"""A handful of examples: every bad line is named with its place and a fix, and nothing is on both sides of the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.build.conversations import Item, read_items
from slmops.build.examples import Example, encode_items, kind_of, mixed, read_examples, split_examples
from slmops.build.first_steps import GENERAL_TEXT, with_defaults
from slmops.core.errors import DocumentError
from slmops.protocol.documents.recipe import Recipe


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


GOOD = [{"prompt": f"question {i}", "answer": {"n": i}} for i in range(4)]


def test_three_ways_to_write_an_example(tmp_path: Path) -> None:
    """Prompt and answer, messages and answer, or a whole conversation; the system prompt is put where there is none."""
    path = lines(
        tmp_path / "e.jsonl",
        {"prompt": "a", "answer": "x"},
        {
            "messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}],
            "answer": {"k": 1},
        },
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "z"}], "id": "mine"},
        {"prompt": "d", "answer": 7, "group": "g"},
    )
    found = read_examples(path, "be brief")
    assert [e.item.answer for e in found] == ["x", '{"k": 1}', "z", "7"]
    assert [e.item.messages[0]["content"] for e in found] == ["be brief", "own", "be brief", "be brief"]
    assert [e.item.id for e in found] == ["line-1", "line-2", "mine", "line-4"]
    assert found[3].group == "g"
    (tmp_path / "items.jsonl").write_text(encode_items([e.item for e in found]))
    assert read_items(tmp_path / "items.jsonl") == [e.item for e in found]


def test_what_editors_and_people_put_into_text(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, and the line separators that Unicode knows and JSON allows in a text."""
    odd = "one\u2028two\x85three"
    text = "".join(
        json.dumps({"prompt": f"{i} {odd}", "answer": odd}, ensure_ascii=False) + "\r\n" for i in range(4)
    )
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_examples(path)
    assert [e.item.answer for e in found] == [odd] * 4
    (tmp_path / "items.jsonl").write_text(encode_items([e.item for e in found]))
    assert read_items(tmp_path / "items.jsonl") == [e.item for e in found]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "x", ', r"e\.jsonl:5:\d+: not valid JSON"),
        ('["a"]', r"e\.jsonl:5: expected a JSON object, found '\[\"a\"\]'"),
        ({"question": "x", "answer": "y"}, r"e\.jsonl:5: has no prompt \(its keys: question, answer\)"),
        ({"prompt": "x", "output": "y"}, r"e\.jsonl:5: has no answer \(its keys: prompt, output\)"),
        ({"prompt": " ", "answer": "y"}, r"e\.jsonl:5: has no prompt"),
        ({"prompt": "x", "messages": [], "answer": "y"}, r"e\.jsonl:5: has prompt and messages"),
        ({"messages": [{"role": "user"}], "answer": "y"}, r"e\.jsonl:5: messages must be a list"),
        ({"messages": "hello", "answer": "y"}, r"e\.jsonl:5: messages must be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        read_examples(lines(tmp_path / "e.jsonl", *GOOD, bad))
    assert '{"prompt": "what is asked", "answer": "what is right"}' in caught.value.hint


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="has 3 examples, at least 4 are needed"):
        read_examples(lines(tmp_path / "e.jsonl", *GOOD[:3]))
    same = [value | {"group": "one"} for value in GOOD]
    with pytest.raises(DocumentError, match="all 4 examples are of one group, 'one'"):
        read_examples(lines(tmp_path / "e.jsonl", *same))
    with pytest.raises(DocumentError, match="cannot be read"):
        read_examples(tmp_path / "missing.jsonl")


@given(
    st.lists(st.integers(0, 12), min_size=4, max_size=80).filter(lambda g: len(set(g)) > 1), st.integers(0, 9)
)
def test_no_group_is_on_both_sides(groups: list[int], seed: int) -> None:
    """Every item is used once, both sides have some, the same seed splits alike."""
    examples = [
        Example(Item(str(i), ({"role": "user", "content": str(i)},), "a"), str(group))
        for i, group in enumerate(groups)
    ]
    split = split_examples(examples, seed)
    group_of = {example.item.id: example.group for example in examples}
    assert sorted(i.id for i in (*split.held_out, *split.calibration)) == sorted(group_of)
    assert split.held_out
    assert split.calibration
    assert not {group_of[i.id] for i in split.held_out} & {group_of[i.id] for i in split.calibration}
    assert split == split_examples(examples, seed)


def test_equal_prompts_stay_together(tmp_path: Path) -> None:
    """A repeated question is one group, however it is answered or written."""
    path = lines(
        tmp_path / "e.jsonl",
        *GOOD,
        {"prompt": "Question 0 ", "answer": "b"},
        {"prompt": "question 0", "answer": "c"},
    )
    assert [e.group for e in read_examples(path)].count("question 0") == 3


def test_what_kind_of_task_it_is() -> None:
    def item(answer: str) -> Item:
        return Item("x", (), answer)

    assert kind_of([item('{"a": 1}'), item("{}")]) == "extraction"
    assert kind_of([item('{"a": 1}'), item("yes")]) == "text"
    assert kind_of([item("7")]) == "text"


def test_the_packaged_general_text() -> None:
    """Readable, unlike each other, and mixed into any beginning of the calibration text."""
    items = read_items(GENERAL_TEXT)
    assert len(items) >= 50
    assert len({i.messages[0]["content"] for i in items}) == len({i.id for i in items}) == len(items)
    own = tuple(Item(str(i), (), "a") for i in range(3))
    both = mixed(own, items[:5])
    assert [i.id for i in both[:4]] == ["0", items[0].id, "1", items[1].id]
    assert len(both) == 8


# ---- what a kind decides: the gates of a recipe that names none


def recipe_of(**task: object) -> Recipe:
    return Recipe.model_validate(
        {
            "apiVersion": "slmops/v1",
            "kind": "Recipe",
            "metadata": {"name": "m"},
            "base": {"gguf": "m.gguf"},
            "task": {"eval": "e.jsonl", "calibration": "c.txt", **task},
            "targets": [{"profile": "pi5-8gb"}],
        }
    )


def items_of(answer: str, count: int = 60) -> list[Item]:
    return [Item(str(i), ({"role": "user", "content": str(i)},), answer) for i in range(count)]


LIKELIHOODS = ["kld.mean", "same_top.ratio"]


@pytest.mark.parametrize(
    ("task", "items", "kind", "asked"),
    [
        ({}, items_of('{"a": 1}'), "extraction", [*LIKELIHOODS, "task.exact_match"]),
        (
            {"answer_schema": "s.json"},
            items_of('{"a": 1}'),
            "extraction",
            [*LIKELIHOODS, "task.exact_match", "task.schema_valid"],
        ),
        ({}, items_of('{"a": 1}', 59), "extraction", LIKELIHOODS),
        ({}, items_of("a poem"), "text", LIKELIHOODS),
        ({"kind": "text"}, items_of('{"a": 1}'), "text", LIKELIHOODS),
    ],
)
def test_a_kind_decides_what_is_gated(
    task: dict[str, object], items: list[Item], kind: str, asked: list[str]
) -> None:
    """An extraction has one right answer and a valid form; of text many are right."""
    found = with_defaults(recipe_of(**task), items)
    assert (found.task.kind, [gate.metric for gate in found.gates]) == (kind, asked)


def test_gates_that_were_written_stay() -> None:
    recipe = recipe_of().model_copy(update={"gates": ()})
    recipe.model_fields_set.add("gates")
    assert with_defaults(recipe, items_of('{"a": 1}')).gates == ()


def test_an_extraction_whose_answers_are_none_is_refused() -> None:
    with pytest.raises(DocumentError, match="item '0' is no JSON object: 'a poem'"):
        with_defaults(recipe_of(kind="extraction"), items_of("a poem"))
