"""The real small model with a third of its vocabulary: 10,000 strings of many scripts survive, and predictions do."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from slmops.build.graph import StepContext
from slmops.build.steps.prune_vocabulary import vocabulary
from slmops.build.structure import Structure
from slmops.runtimes.llama_cpp.logits import LogitModel

pytestmark = [pytest.mark.model, pytest.mark.slow]

STRINGS = 10_000
KEEP_TOKENS = 16_384
#: first and last code point of scripts and sorts of characters
SCRIPTS = {
    "latin": (0x41, 0x7A), "latin with marks": (0xC0, 0x24F), "greek": (0x391, 0x3C9), "cyrillic": (0x410, 0x44F),
    "hebrew": (0x5D0, 0x5EA), "arabic": (0x620, 0x64A), "devanagari": (0x905, 0x939), "bengali": (0x995, 0x9B9),
    "tamil": (0xB95, 0xBB9), "thai": (0xE01, 0xE2E), "georgian": (0x10D0, 0x10F0), "hangul": (0xAC00, 0xD7A3),
    "hiragana": (0x3041, 0x3096), "katakana": (0x30A1, 0x30FA), "han": (0x4E00, 0x9FFF), "rare han": (0x20000, 0x2A6DF),
    "emoji": (0x1F300, 0x1F64F), "mathematics": (0x2200, 0x22FF), "combining marks": (0x300, 0x36F),
    "digits and signs": (0x20, 0x40), "control": (0x01, 0x1F), "private use": (0xE000, 0xE0FF),
}  # fmt: skip
WORDS = [
    "the",
    "light",
    "in",
    "kitchen",
    "turn",
    "on",
    "please",
    "what",
    "is",
    "weather",
    "def",
    "return",
    "class",
    "import",
    "{'intent':",
    "0}",
    "Straße",
    "naïve",
]


def strings() -> list[str]:
    """Words, single scripts, and mixtures with spaces and line ends in between."""
    chance = random.Random(20261124)
    scripts = list(SCRIPTS.values())
    made: dict[str, None] = {}
    while len(made) < STRINGS:
        low, high = scripts[len(made) % len(scripts)]
        parts = []
        for _ in range(chance.randrange(1, 6)):
            if chance.random() < 0.25:
                low, high = chance.choice(scripts)
            parts.append(
                chance.choice(WORDS)
                if chance.random() < 0.3
                else "".join(chr(chance.randrange(low, high + 1)) for _ in range(chance.randrange(1, 9)))
            )
        made[chance.choice(["", " ", "  ", "\n", "\t", "-"]).join(parts)] = None
    return list(made)


def test_ten_thousand_strings_come_back(small_model: Path, tmp_path: Path) -> None:
    """Through the engine's tokenizer: the same text as the whole vocabulary gives, and never an unknown token."""
    (tmp_path / "calibration.txt").write_text("turn on the light in the kitchen\nwhat is the weather like?\n")
    out = tmp_path / "out"
    out.mkdir()
    files = {"model": small_model, "calibration": tmp_path / "calibration.txt"}
    step = StepContext(files, {}, {"keep_vocabulary_tokens": KEEP_TOKENS}, out, lambda ratio, note: None)
    value = vocabulary(step)
    assert (value["tokens_before"], value["tokens"]) == (49_152, KEEP_TOKENS)
    assert value["used_kept_tokens"] == value["used_tokens"]
    kept = Structure.decode((out / "structure.json").read_bytes()).tokens
    assert kept is not None
    texts = strings()
    assert len(texts) == STRINGS
    longer = 0
    with LogitModel(small_model) as whole, LogitModel(out / "model.gguf") as trimmed:
        unknown = trimmed.tokenize("<|endoftext|>", parse_special=True)  # what this vocabulary calls unknown
        assert len(unknown) == 1
        for text in texts:
            before, after = whole.tokenize(text), trimmed.tokenize(text)
            expected = whole.detokenize(before)
            assert trimmed.detokenize(after) == expected, repr(text)
            assert unknown[0] not in after
            # the same bytes by whole-vocabulary tokens: a kept token means what it meant
            assert whole.detokenize([kept[token] for token in after]) == expected, repr(text)
            longer += len(after) - len(before)
        assert longer >= 0
        asked = "<|im_start|>user\nturn on the light<|im_end|>\n<|im_start|>assistant\n"
        token_ids = trimmed.tokenize(asked, parse_special=True)
        assert token_ids == [kept.index(token) for token in whole.tokenize(asked, parse_special=True)]
        rows, all_rows = trimmed.logits(token_ids), whole.logits([kept[token] for token in token_ids])
    # the trimmed file holds F16 of the same Q4_1 and Q8_0 weights
    difference = rows - all_rows[:, list(kept)]
    assert float(np.abs(difference - difference.mean(axis=1, keepdims=True)).mean()) < 0.2
