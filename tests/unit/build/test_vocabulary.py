"""Trimming a vocabulary: closed merges, bytes and special tokens kept, the header true, the same predictions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tests.support.tiny_model import ENDOFTEXT, IM_END, IM_START, make_tiny_gguf

from slmops.build.gguf_file import open_gguf
from slmops.build.graph import StepContext
from slmops.build.steps.prune_vocabulary import vocabulary
from slmops.build.structure import Structure, cut
from slmops.build.vocabulary import Vocabulary, kept_merges, kept_tokens, read_vocabulary
from slmops.core.errors import BaseModelError, UsageError
from slmops.runtimes.llama_cpp.logits import LogitModel

BYTES = 256
SPECIAL = 3


def context(out: Path, files: dict[str, Path], **params: Any) -> StepContext:
    out.mkdir(parents=True)
    return StepContext(files, {}, params, out, lambda ratio, note: None)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Merges: th, the, in, er, on, an, li, re."""
    return make_tiny_gguf(tmp_path / "whole.gguf", seed=3)


def read(path: Path) -> Vocabulary:
    with open_gguf(path) as model:
        return read_vocabulary(model)


def texts(words: Vocabulary, kept: list[int]) -> set[str]:
    return {words.tokens[i] for i in kept if i >= BYTES + SPECIAL}


def test_use_decides_and_then_rank(whole: Path) -> None:
    """What the text needs comes first, then what merges first."""
    words = read(whole)
    ids = {text: i for i, text in enumerate(words.tokens)}
    assert texts(words, kept_tokens(words, {}, BYTES + SPECIAL + 2)) == {"th", "the"}
    assert texts(words, kept_tokens(words, {ids["re"]: 5, ids["li"]: 1}, BYTES + SPECIAL + 2)) == {"re", "li"}


def test_a_token_brings_its_parts(whole: Path) -> None:
    """``the`` is used, ``th`` never alone: with room for one, the part stays and the whole goes; with two, both stay."""
    words = read(whole)
    the = words.tokens.index("the")
    assert texts(words, kept_tokens(words, {the: 9}, BYTES + SPECIAL + 1)) == {"th"}
    assert texts(words, kept_tokens(words, {the: 9}, BYTES + SPECIAL + 2)) == {"th", "the"}


def random_vocabulary(chance: random.Random) -> Vocabulary:
    letters = [chr(code) for code in range(ord("a"), ord("a") + 26)]
    tokens, merges = list(letters), []
    while len(tokens) < 300:
        left, right = chance.choice(tokens), chance.choice(tokens)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    return Vocabulary(tuple(tokens), (1,) * len(tokens), tuple(merges), {"tokenizer.ggml.eos_token_id": 299})


@pytest.mark.parametrize("seed", range(20))
def test_every_choice_is_closed(seed: int) -> None:
    """For random vocabularies, uses and sizes: as many as asked for, and both parts of every kept token are kept."""
    chance = random.Random(seed)
    words = random_vocabulary(chance)
    uses = {chance.randrange(300): chance.randrange(1, 50) for _ in range(60)}
    count = chance.randrange(40, 299)
    kept = kept_tokens(words, uses, count)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    inside = {words.tokens[i] for i in kept}
    made = {left + right: (left, right) for left, right in words.merges}
    open_tokens = {t for t in inside if t in made and not set(made[t]) <= inside}
    assert open_tokens <= {words.tokens[299]}  # the one that the header names stays in any case
    assert all(set(words.merges[i]) | {"".join(words.merges[i])} <= inside for i in kept_merges(words, kept))


def test_sizes_that_cannot_be(whole: Path) -> None:
    """All tokens, or fewer than bytes and special tokens: both say what there is."""
    words = read(whole)
    for count in (len(words.tokens), BYTES + SPECIAL - 1):
        with pytest.raises(UsageError, match=f"has {len(words.tokens)} tokens, of which {BYTES + SPECIAL}"):
            kept_tokens(words, {}, count)


def test_the_trimmed_file(whole: Path, tmp_path: Path) -> None:
    """Rows, tokens, types, merges, special ids and size agree; the chat template is the same; gguf's reader agrees."""
    (tmp_path / "calibration.txt").write_text("there are three in line\nturn on the lights\n")
    made = context(
        tmp_path / "out",
        {"model": whole, "calibration": tmp_path / "calibration.txt"},
        keep_vocabulary_tokens=264,
    )
    value = vocabulary(made)
    assert (value["tokens_before"], value["tokens"], value["unreachable"]) == (267, 264, 0)
    assert value["used_tokens"] - 3 <= value["used_kept_tokens"] < value["used_tokens"]
    assert 1.0 < value["longer_ratio"] < 1.5
    assert 0 < value["lost_mass"] < 0.1
    kept = Structure.decode((tmp_path / "out" / "structure.json").read_bytes()).tokens
    assert kept is not None
    before, after = GGUFReader(whole), GGUFReader(tmp_path / "out" / "model.gguf")

    def value_of(reader: GGUFReader, key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None
        return field.contents()

    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        old = value_of(before, key)
        assert value_of(after, key) == [old[i] for i in kept]
    assert value_of(after, "llama.vocab_size") == 264
    assert value_of(after, "tokenizer.chat_template") == value_of(before, "tokenizer.chat_template")
    tokens = value_of(after, "tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        old = value_of(before, "tokenizer.ggml.tokens")[value_of(before, key)]
        assert tokens[value_of(after, key)] == old
    assert tokens.count("<|endoftext|>") == 1
    for merge in value_of(after, "tokenizer.ggml.merges"):
        assert {*merge.split(" "), merge.replace(" ", "")} <= set(tokens)
    rows = {t.name: np.array(t.data) for t in before.tensors}["token_embd.weight"]
    assert np.array_equal(
        {t.name: np.array(t.data) for t in after.tensors}["token_embd.weight"], rows[list(kept)]
    )


def test_predictions_are_the_whole_models_over_what_is_kept(whole: Path, tmp_path: Path) -> None:
    """On the same tokens, in their new numbers, every kept logit is the same to the bit."""
    kept = (*range(BYTES + SPECIAL), 259, 262, 264)
    with open_gguf(whole) as model:
        cut(tmp_path / "t.gguf", model, Structure(tokens=kept))
    sequence = [IM_START, *b"hello", 262, 264, IM_END]
    place = {old: new for new, old in enumerate(kept)}
    with LogitModel(whole) as one, LogitModel(tmp_path / "t.gguf") as other:
        expected = one.logits(sequence)[:, list(kept)]
        assert np.array_equal(other.logits([place[token] for token in sequence]), expected)
        assert other.eos_token == place[one.eos_token]
        assert other.vocab_tokens == len(kept)


def test_every_string_comes_back(whole: Path, tmp_path: Path) -> None:
    """Random bytes of many scripts, without any merge left: the same text as through the whole vocabulary."""
    with open_gguf(whole) as model:
        cut(tmp_path / "t.gguf", model, Structure(tokens=tuple(range(BYTES + SPECIAL))))
    chance = random.Random(5)
    with LogitModel(whole) as one, LogitModel(tmp_path / "t.gguf") as other:
        assert len(other.tokenize("the then")) == len("the then")
        for _ in range(200):
            text = "".join(
                chr(chance.choice([chance.randrange(32, 127), chance.randrange(0xA1, 0x2FFF), 0x1F600]))
                for _ in range(20)
            )
            assert other.detokenize(other.tokenize(text)) == one.detokenize(one.tokenize(text)) == text


def odd_model(path: Path, **changes: Any) -> Path:
    """A header with one thing that cannot be trimmed."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(changes.get("kind", "gpt2"))
    writer.add_token_list(["a", "b", "ab"])
    if changes.get("types", True):
        writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    for key, ids in changes.get("arrays", {}).items():
        writer.add_array(key, ids)
    for name, rows in {"token_embd.weight": 3, **changes.get("tensors", {})}.items():
        writer.add_tensor(name, np.zeros((rows, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("'llama' \\(SentencePiece\\), only byte-level BPE", {"kind": "llama"}),
        ("'t5' \\(Unigram\\)", {"kind": "t5"}),
        ("token_type is missing", {"types": False}),
        (
            "tokenizer.ggml.suppress_tokens may hold token ids",
            {"arrays": {"tokenizer.ggml.suppress_tokens": [1, 2]}},
        ),
        ("has 5 rows for 3 tokens", {"tensors": {"token_embd.weight": 5}}),
        ("token_types.weight goes by token", {"tensors": {"token_types.weight": 3}}),
    ],
)
def test_what_cannot_be_trimmed_is_refused_by_name(
    tmp_path: Path, message: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(BaseModelError, match=message):
        read(odd_model(tmp_path / "odd.gguf", **changes))


def test_special_tokens_stay_though_nobody_uses_them(whole: Path) -> None:
    words = read(whole)
    assert {ENDOFTEXT, IM_START, IM_END} <= words.always_kept()
    assert len(words.always_kept()) == BYTES + SPECIAL
