"""Text to token ids exactly as the engine makes them, from the GGUF's vocabulary, merges and chat template.

Owns: the byte-level BPE tokenizer of SmolLM-type GGUF files and the rendering of chat messages.
Does not own: decoding for users (the engine does that).

Rules it keeps: nothing but the file decides (no tokenizer.json, no hub); equality with the engine is proven
by ``tests/unit/train/test_tokenizer.py`` on many strings. The chat template is the file's Jinja text, run in
a sandbox.
Source: llama.cpp ``src/llama-vocab.cpp``, pre-tokenizer ``smollm``: digits one by one, then GPT-2's pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFReader
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from slmops.core.errors import BaseModelError

CONTROL = 3  # llama.cpp LLAMA_TOKEN_TYPE_CONTROL
USER_DEFINED = 4


class ChatTokenizer:
    """Tokenizer and chat template of one GGUF file.

    Args:
        path: the GGUF file.

    Raises:
        BaseModelError: the file has no GPT-2-type vocabulary with the ``smollm`` pre-tokenizer, or no chat
        template.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; the weights are not touched."""
        reader = GGUFReader(path)
        kind, pre = _value(reader, path, "tokenizer.ggml.model"), _value(reader, path, "tokenizer.ggml.pre")
        if (kind, pre) != ("gpt2", "smollm"):
            raise BaseModelError(
                f"{path}: expected tokenizer gpt2/smollm, got {kind}/{pre}",
                hint="add the pre-tokenizer to slmops.train.tokenizer and to its test against the engine",
            )
        tokens = _texts(reader, path, "tokenizer.ggml.tokens")
        merges = [_pair(merge) for merge in _texts(reader, path, "tokenizer.ggml.merges")]
        self._tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        kinds = _value(reader, path, "tokenizer.ggml.token_type")
        if not isinstance(kinds, list):
            raise BaseModelError(
                f"{path}: tokenizer.ggml.token_type is not a list", hint="fetch the base again"
            )
        self._tokenizer.add_special_tokens(
            [
                AddedToken(text, special=True, normalized=False)
                for text, token_kind in zip(tokens, kinds, strict=True)
                if token_kind in (CONTROL, USER_DEFINED)
            ]
        )
        self.vocabulary_tokens = len(tokens)
        self.end_text = tokens[int(str(_value(reader, path, "tokenizer.ggml.eos_token_id")))]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(str(_value(reader, path, "tokenizer.chat_template")))

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens in the text become themselves, nothing is added around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt text that the engine's chat endpoint feeds to the model for these messages."""
        return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _value(reader: GGUFReader, path: Path, key: str) -> object:
    field = reader.get_field(key)
    if field is None:
        raise BaseModelError(
            f"{path}: header key {key} is missing", hint="give an instruction-tuned GGUF with a chat template"
        )
    value: object = field.contents()
    return value


def _texts(reader: GGUFReader, path: Path, key: str) -> list[str]:
    value = _value(reader, path, key)
    if not isinstance(value, list):
        raise BaseModelError(f"{path}: {key} is not a list", hint="fetch the base again")
    return [str(text) for text in value]
