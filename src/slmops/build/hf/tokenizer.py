"""A Hugging Face tokenizer as the vocabulary of a GGUF file.

Two kinds are carried over, and nothing else: byte-level BPE (``tokenizer.json``) with a pre-tokenizer that llama.cpp has
under a name, and SentencePiece BPE (``tokenizer.model``). llama.cpp knows pre-tokenizers by name only; upstream's converter
finds the name by hashing the ids of a test sentence, which breaks when a fine-tune adds a token. Here the name follows from
what ``tokenizer.json`` says of its splitting, and a splitting that is not on the list is refused.

Source: llama.cpp ``conversion/base.py`` (``get_vocab_base``, ``_create_vocab_sentencepiece``), ``src/llama-vocab.cpp``
(regular expressions of each name), ``gguf.SpecialVocab``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.build.hf.directory import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_MODEL, HfModel
from slmops.build.hf.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_pieces,
)
from slmops.core.errors import BaseModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES_REGEX, _BYTES_ONLY = ("ByteLevel", True), ("ByteLevel", False)
#: splitting as :func:`_splitting` names it -> llama.cpp's name
PRE_TOKENIZERS: dict[tuple[tuple[str, object], ...], str] = {
    (("Digits", True), _BYTES_REGEX): "smollm",
    (_BYTES_REGEX,): "gpt-2",
    (("Split", _GPT2), _BYTES_ONLY): "gpt-2",
    (("Split", _LLAMA3), _BYTES_ONLY): "llama-bpe",
    (("Split", _QWEN2), _BYTES_ONLY): "qwen2",
}
#: llama.cpp takes a whole word that is a token before it looks at merges, for these names only
IGNORES_MERGES = ("llama-bpe",)
_SPECIAL = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
}
_PADDING_SCORE, _ADDED_SCORE = -10000.0, -1000.0
#: added tokens that are control tokens although their files do not say so
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(frozen=True)
class Vocabulary:
    """Everything under ``tokenizer.ggml`` in a GGUF file.

    Attributes:
        model: ``gpt2`` or ``llama``; ``pre``: name of the pre-tokenizer.
        tokens: by id; ``kinds``: llama.cpp's token types; ``scores``: empty for ``gpt2``; ``merges``: empty for ``llama``.
        special_ids: by GGUF's name: ``bos``, ``eos``, ``unknown``, ``padding``.
        flags: such as ``add_bos_token``.
        chat_template: Jinja; empty when there is none.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str = ""


def read_vocabulary(model: HfModel, rows: int) -> Vocabulary:
    """The tokenizer of a directory.

    Args:
        model: the directory.
        rows: of the embedding; a tokenizer may have fewer tokens, never more.

    Raises:
        BaseModelError: a kind of tokenizer that is not supported; says which, and what is.
    """
    found = _sentencepiece(model, rows) if TOKENIZER_MODEL in model.files else _byte_level(model, rows)
    used = sum(kind != UNUSED for kind in found.kinds)
    if used > rows:
        raise BaseModelError(
            f"the tokenizer has {used} tokens, the embedding {rows} rows",
            hint="save the tokenizer that belongs to these weights, or resize the embedding",
        )
    return found


def _byte_level(model: HfModel, rows: int) -> Vocabulary:
    document = model.document(TOKENIZER_JSON)
    inner = document.get("model") or {}
    where = str(model.files[TOKENIZER_JSON])
    if inner.get("type") != "BPE" or inner.get("byte_fallback"):
        kind = "BPE with byte fallback" if inner.get("byte_fallback") else repr(inner.get("type"))
        raise BaseModelError(
            f"{where}: tokenizer of type {kind} is not supported, supported are byte-level BPE and SentencePiece BPE",
            hint="keep tokenizer.model (SentencePiece) beside tokenizer.json if the model has one, or convert to GGUF with "
            "llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    if document.get("normalizer") and document["normalizer"].get("type") not in ("NFC",):
        raise BaseModelError(
            f"{where}: normalizer {document['normalizer'].get('type')!r} is not supported (the engine applies none)",
            hint="convert to GGUF with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    splitting = _splitting(document.get("pre_tokenizer") or {})
    pre = PRE_TOKENIZERS.get(splitting)
    if pre is None:
        raise BaseModelError(
            f"{where}: pre-tokenizer {splitting} is none of {', '.join(sorted(set(PRE_TOKENIZERS.values())))}",
            hint="convert to GGUF with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    if bool(inner.get("ignore_merges")) != (pre in IGNORES_MERGES):
        raise BaseModelError(
            f"{where}: ignore_merges is {inner.get('ignore_merges')!r}, the engine's {pre} has {pre in IGNORES_MERGES}",
            hint="convert to GGUF with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for text, at in inner["vocab"].items():
        _require_row(at, rows, text)
        tokens[at], kinds[at] = text, NORMAL
    for added in document.get("added_tokens") or ():
        at, text = int(added["id"]), str(added["content"])
        _require_row(at, rows, text)
        special = bool(added.get("special")) or _looks_special(text)
        tokens[at], kinds[at] = text, CONTROL if special else USER_DEFINED
    ids = {text: at for at, text in enumerate(tokens)}
    merges = [
        merge
        if isinstance(merge, str)
        else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge)
        for merge in inner.get("merges") or ()
    ]
    special_ids = _special_ids(model, ids)
    return Vocabulary(
        "gpt2",
        pre,
        tokens,
        kinds,
        merges=merges,
        special_ids=special_ids,
        flags=_flags(model, document, special_ids, tokens, begins=False),
        chat_template=chat_template_of(model),
    )


def _sentencepiece(model: HfModel, rows: int) -> Vocabulary:
    path = model.files[TOKENIZER_MODEL]
    pieces = read_pieces(path.read_bytes(), str(path))
    tokens = [f"[PAD{i}]" for i in range(rows)]
    scores, kinds = [_PADDING_SCORE] * rows, [UNUSED] * rows
    for at, piece in enumerate(pieces[:rows]):
        tokens[at], scores[at] = piece.text, piece.score
        # upstream's converter, and so every file in the wild, has pieces of kind "user defined" as normal ones here
        kinds[at] = piece.kind if piece.kind in (UNKNOWN, CONTROL, UNUSED, BYTE) else NORMAL
    settings = model.document(TOKENIZER_CONFIG)
    for key, added in (settings.get("added_tokens_decoder") or {}).items():
        at, text = int(key), str(added["content"])
        _require_row(at, rows, text)
        if added.get("special") or _looks_special(text):
            kinds[at] = CONTROL
        else:
            text, kinds[at] = text.replace("▁", " "), USER_DEFINED
        tokens[at], scores[at] = text, _ADDED_SCORE
    ids = {text: at for at, text in enumerate(tokens)}
    special_ids = _special_ids(model, ids)
    flags = _flags(model, model.document(TOKENIZER_JSON), special_ids, tokens, begins=True)
    prefix = settings.get("add_prefix_space")
    if model.config.get("model_type", "").startswith("gemma"):
        prefix = False
    if prefix is not None:
        flags["add_space_prefix"] = bool(prefix)
    return Vocabulary(
        "llama",
        "default",
        tokens,
        kinds,
        scores=scores,
        special_ids=special_ids,
        flags=flags,
        chat_template=chat_template_of(model),
    )


def chat_template_of(model: HfModel) -> str:
    """The chat template, from ``chat_template.jinja`` or ``tokenizer_config.json``; of several, the one named default."""
    if "chat_template.jinja" in model.files:
        return model.files["chat_template.jinja"].read_text(encoding="utf-8")
    value = model.document(TOKENIZER_CONFIG).get("chat_template")
    if isinstance(value, list):
        value = next((item.get("template") for item in value if item.get("name") == "default"), "")
    return str(value or "")


def _splitting(pre_tokenizer: Mapping[str, Any]) -> tuple[tuple[str, object], ...]:
    """What a pre-tokenizer does, in a form that can be compared."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return tuple(part for one in pre_tokenizer.get("pretokenizers") or () for part in _splitting(one))
    if kind == "ByteLevel":
        prefix = (("PrefixSpace", True),) if pre_tokenizer.get("add_prefix_space") else ()
        return (*prefix, ("ByteLevel", bool(pre_tokenizer.get("use_regex", True))))
    if kind == "Digits":
        return (("Digits", bool(pre_tokenizer.get("individual_digits"))),)
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert"):
        pattern = pre_tokenizer.get("pattern") or {}
        return (("Split", pattern.get("Regex", pattern.get("String"))),)
    return ((str(kind), "unknown"),)


def _special_ids(model: HfModel, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokens that have a part: by name in the tokenizer's settings, else by id in the model's."""
    settings = model.document(TOKENIZER_CONFIG)
    found = {}
    for name, key in _SPECIAL.items():
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        number = model.config.get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
        elif isinstance(number, int) and 0 <= number < len(ids):
            found[name] = number
    return found


def _flags(
    model: HfModel,
    document: Mapping[str, Any],
    special_ids: Mapping[str, int],
    tokens: Sequence[str],
    *,
    begins: bool,
) -> dict[str, bool]:
    """Whether a text is begun and ended with special tokens; ``begins``: what the tokenizer's class does unasked."""
    settings = model.document(TOKENIZER_CONFIG)
    flags = {
        f"add_{name}_token": bool(settings[f"add_{name}_token"])
        for name in ("bos", "eos")
        if isinstance(settings.get(f"add_{name}_token"), bool)
    }
    bos = tokens[special_ids["bos"]] if "bos" in special_ids else None
    processor = document.get("post_processor") or {}
    for one in processor.get("processors") or [processor]:
        if one.get("type") == "TemplateProcessing" and one.get("single"):
            first = (one["single"][0].get("SpecialToken") or {}).get("id")
            flags["add_bos_token"] = first is not None and first == bos
    flags.setdefault("add_bos_token", begins)
    return flags


def _looks_special(text: str) -> bool:
    return (
        text in _LOOK_SPECIAL
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _require_row(at: int, rows: int, text: str) -> None:
    if not 0 <= at < rows:
        raise BaseModelError(
            f"token {text!r} has id {at}, the embedding has {rows} rows",
            hint="save the tokenizer that belongs to these weights, or resize the embedding",
        )
