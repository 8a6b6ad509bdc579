"""Token ids and rendered prompts are the engine's, to the id and the byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from slmops.train.tokenizer import ChatTokenizer

TEXTS = [
    "",
    " ",
    "turn on the kitchen lights",
    'Answer: {"intent":"HassTurnOn","slots":{"area":"kitchen","domain":"light"}}',
    "set it to 21.5° or 100 %, 1000k",
    "1234567890 ½ ² ٣",
    "it's   we'll  I'm\tthey've\n\n  don't ",
    "naïve café — “quotes” … ñandú ÅÄÖ",
    "日本語のテキスト 한국어 русский עברית",
    "🙂 👩‍👩‍👧 \u200b zero width",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <file_sep> <repo_name>x",
    "<|im_start|",
    "CamelCaseAndsnake_case->x=y;//z",
    "tab\tseparated\r\nlines\r",
]
ALPHABET = "abcdefghij XYZ'0123456789.,:;{}[]\"\\/<|>_-+*\n\t éßñøж中\u00a0🙂"


@pytest.mark.model
def test_ids_and_prompts_equal_the_engine_s(small_model: Path, start_engine) -> None:  # type: ignore[no-untyped-def]
    """Hand-picked and 300 random texts give the engine's ids and decode back; prompts are its bytes."""
    tokenizer = ChatTokenizer(small_model)
    engine = start_engine(small_model)
    chance = random.Random(20)
    texts = [*TEXTS, *("".join(chance.choices(ALPHABET, k=chance.randint(1, 60))) for _ in range(300))]
    for text in texts:
        body = {"content": text, "add_special": False, "parse_special": True}
        expected = engine.post("/tokenize", body)["tokens"]
        assert tokenizer.encode(text) == expected, repr(text)
        assert tokenizer.decode(expected) == text

    for messages in (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "dim  the lights "}],
        [{"role": "user", "content": "hello\nthere"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
    ):
        expected_text = engine.post("/apply-template", {"messages": messages})["prompt"]
        assert tokenizer.render(messages) == expected_text
