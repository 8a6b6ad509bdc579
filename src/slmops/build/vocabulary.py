"""Trimming a byte-level BPE vocabulary: which tokens stay, and the header that then says so.

**What stays whatever it costs**: the 256 byte stand-ins (so that every string can be written), control, user-defined, byte and
unknown tokens, and every token that the header names (end of text, padding, fill-in-the-middle...).

**What else stays** is chosen by use: how often the task's own text needs the token, its own occurrences and those of the tokens
that are merged from it; then by rank. The rank of a merge is the order in which the tokenizer's training found it, so low ranks
are what general text uses most: a vocabulary carries its own sample of general text. A token stays only if both parts that it
is merged from stay (the vocabulary is *closed*), because the tokenizer reaches a token through its parts alone.

A kept token keeps its meaning, its row of the embedding and its place in the order; the kept merges keep their order. So on the
same token ids a trimmed model computes what the whole model computes, and its next-token distribution is the whole model's
restricted to the kept tokens and renormalised, exactly.

Source: llama.cpp ``src/llama-vocab.cpp`` (``llm_tokenizer_bpe``); GPT-2's byte stand-ins, ``bytes_to_unicode``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slmops.build.gguf_file import (
    GgufFile,
    array_elements,
    metadata_ranges,
    metadata_value,
    pick_elements,
)
from slmops.core.errors import BaseModelError, UsageError

#: rows of these belong to tokens; nothing else of a supported model has one entry a token
TOKEN_TENSORS = ("token_embd.weight", "output.weight", "output.bias")
_PREFIX = "tokenizer.ggml."
_BY_TOKEN = ("tokens", "token_type", "scores")
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_ALWAYS_KEPT = frozenset({_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE})
_ARRAY, _U32, _I32 = 9, 4, 5
_NAMED_ID = re.compile(r"^tokenizer\.ggml\.[a-z_]+_token_id$")
#: another form of the same vocabulary, which would no longer be true
_COPIES = ("tokenizer.huggingface.json",)


@dataclass(frozen=True)
class Vocabulary:
    """A gpt2-type vocabulary.

    Attributes:
        tokens: texts by id, in byte stand-ins; ``types``: llama.cpp's token types by id.
        merges: pairs of texts, most frequent first.
        named: metadata keys that hold a token id, with the id.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    named: Mapping[str, int]

    def always_kept(self) -> set[int]:
        """Ids of byte stand-ins, special tokens, and tokens that the header names."""
        stand_ins = byte_stand_ins()
        inside = {token_id for token_id in self.named.values() if 0 <= token_id < len(self.tokens)}
        return inside | {
            token_id
            for token_id, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in _ALWAYS_KEPT or text in stand_ins
        }


def byte_stand_ins() -> frozenset[str]:
    """GPT-2's printable characters for the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = len(set(range(256)) - printable)
    return frozenset(chr(code) for code in (*printable, *range(256, 256 + others)))


def read_vocabulary(model: GgufFile) -> Vocabulary:
    """Read it, and refuse what could not be trimmed correctly.

    Raises:
        BaseModelError: no gpt2-type vocabulary, an incomplete one, or one that header or tensors use in a way that is
            not known: names it.
    """
    kind = model.layout.metadata.get(_PREFIX + "model")
    what = model.path.name
    if kind != "gpt2":
        name = {"llama": "SentencePiece", "t5": "Unigram", "bert": "WordPiece"}.get(str(kind), "unknown")
        raise BaseModelError(
            f"{what}: the vocabulary is of type {kind!r} ({name}), only byte-level BPE ('gpt2') can be trimmed",
            hint="leave keep_vocabulary_tokens out of the recipe; keep_ffn_width and drop_layers do not need it",
        )
    parts = {}
    for name in ("tokens", "token_type", "merges"):
        value = metadata_value(model.content, _PREFIX + name)
        if value is None:
            raise BaseModelError(
                f"{what}: {_PREFIX}{name} is missing", hint="convert the model again with a current llama.cpp"
            )
        parts[name] = array_elements(value)
    tokens = tuple(text.decode("utf-8", "surrogateescape") for text in parts["tokens"])
    merges = []
    for line in parts["merges"]:
        left, _, right = line.decode("utf-8", "surrogateescape").partition(" ")
        merges.append((left, right))
    named = {
        key: int(value)
        for key, value in model.layout.metadata.items()
        if _NAMED_ID.match(key) and isinstance(value, int)
    }
    _check_use(model, len(tokens))
    types = tuple(struct.unpack("<i", element)[0] for element in parts["token_type"])
    if len(types) != len(tokens):
        raise BaseModelError(
            f"{what}: {len(tokens)} tokens, but {len(types)} token types", hint="the file is damaged"
        )
    return Vocabulary(tokens, types, tuple(merges), named)


def _check_use(model: GgufFile, count: int) -> None:
    """Refuse header arrays and tensors that go by token and that we would not rewrite."""
    known = {_PREFIX + name for name in (*_BY_TOKEN, "merges")}
    for key in model.layout.array_lengths:
        if key.startswith("tokenizer.") and key not in known and key != "tokenizer.chat_templates":
            raise BaseModelError(
                f"{model.path.name}: the header's {key} may hold token ids, and is not known",
                hint="leave keep_vocabulary_tokens out of the recipe, or report the model",
            )
    for tensor in model.layout.tensors:
        is_token = tensor.name in TOKEN_TENSORS
        if is_token and tensor.shape[-1] != count:
            raise BaseModelError(
                f"{model.path.name}: {tensor.name} has {tensor.shape[-1]} rows for {count} tokens",
                hint="a padded embedding cannot be trimmed: convert the model again without padding",
            )
        if not is_token and not tensor.name.startswith("blk.") and tensor.shape[-1] == count:
            raise BaseModelError(
                f"{model.path.name}: {tensor.name} goes by token, and is not known",
                hint="leave keep_vocabulary_tokens out of the recipe, or report the model",
            )


def kept_tokens(vocabulary: Vocabulary, uses: Mapping[int, int], count: int) -> list[int]:
    """Choose the tokens that stay.

    Args:
        vocabulary: whole.
        uses: token id to occurrences in the task's text, as the whole vocabulary writes it.
        count: tokens to keep.

    Returns: ids, ascending.

    Raises:
        UsageError: ``count`` is more than there are, or fewer than must stay.
    """
    kept = vocabulary.always_kept()
    total = len(vocabulary.tokens)
    if not len(kept) <= count < total:
        raise UsageError(
            f"keep_vocabulary_tokens {count}: the base has {total} tokens, "
            f"of which {len(kept)} bytes and special tokens must stay",
            hint=f"give a number from {len(kept)} to {total - 1}",
        )
    parents, ranks = _parents(vocabulary)
    needed = [uses.get(token_id, 0) for token_id in range(total)]
    for token_id in sorted(parents, key=lambda i: -ranks[i]):  # children first
        for parent in parents[token_id]:
            needed[parent] += needed[token_id]
    order = sorted((i for i in range(total) if i not in kept), key=lambda i: (-needed[i], ranks[i], i))
    while len(kept) < count:
        before = len(kept)
        for token_id in order:
            if len(kept) == count:
                break
            if token_id not in kept and all(parent in kept for parent in parents.get(token_id, ())):
                kept.add(token_id)
        if len(kept) == before:
            break  # what is left cannot be reached by merges that are complete
    return sorted(kept)


def _parents(vocabulary: Vocabulary) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """For each merged token its two parts, and for every token the rank of its merge (past all ranks where it has none)."""
    ids = {text: token_id for token_id, text in enumerate(vocabulary.tokens)}
    parents: dict[int, tuple[int, int]] = {}
    ranks = [len(vocabulary.merges)] * len(vocabulary.tokens)
    for rank, (left, right) in enumerate(vocabulary.merges):
        token_id = ids.get(left + right)
        if token_id is not None and token_id not in parents and left in ids and right in ids:
            parents[token_id] = (ids[left], ids[right])
            ranks[token_id] = rank
    return parents, ranks


def kept_merges(vocabulary: Vocabulary, kept: Sequence[int]) -> list[int]:
    """Indices of the merges whose two parts and whose result stay."""
    texts = {vocabulary.tokens[token_id] for token_id in kept}
    return [
        index
        for index, (left, right) in enumerate(vocabulary.merges)
        if left in texts and right in texts and left + right in texts
    ]


def trimmed_header(
    model: GgufFile, vocabulary: Vocabulary, kept: Sequence[int]
) -> dict[str, int | bytes | None]:
    """Metadata to replace: tokens, types, scores, merges, special ids, ``vocab_size``. The chat template is not touched.

    Args:
        model: whole.
        vocabulary: whole.
        kept: ids, ascending.
    """
    place = {token_id: index for index, token_id in enumerate(kept)}
    replace: dict[str, int | bytes | None] = {}
    for name in _BY_TOKEN:
        value = metadata_value(model.content, _PREFIX + name)
        if value is not None:
            replace[_PREFIX + name] = pick_elements(value, kept)
    merges = metadata_value(model.content, _PREFIX + "merges")
    assert merges is not None  # read_vocabulary checked it
    replace[_PREFIX + "merges"] = pick_elements(merges, kept_merges(vocabulary, kept))
    for key, token_id in vocabulary.named.items():
        if token_id in place:
            replace[key] = struct.pack("<II", _U32, place[token_id])
    replace |= dict.fromkeys(_COPIES)
    present = {key for key, _, _ in metadata_ranges(model.content)}
    size = f"{model.layout.architecture}.vocab_size"
    if size in present:
        replace[size] = len(kept)
    return {key: value for key, value in replace.items() if key in present}
