"""Text to token ids and back, by ``tokenizer.json``: byte-exact per token, so that a stream can be cut anywhere.

Source of the byte-level alphabet: GPT-2's ``bytes_to_unicode``; of byte fallback and ``▁``: SentencePiece.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class Text:
    """One model's tokenizer. Safe to call from several threads.

    Args:
        path: ``tokenizer.json``.
        bos_token: id, or None.
        add_bos: `tokenize(add_special=True)` puts BOS in front, once.
    """

    def __init__(self, path: Path, *, bos_token: int | None, add_bos: bool) -> None:
        self.path = path
        self.bos_token = bos_token
        self.add_bos = add_bos
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lock = threading.Lock()
        self._added = {
            token: (one.content.encode(), bool(one.special))
            for token, one in self._tokenizer.get_added_tokens_decoder().items()
        }
        state = self._tokenizer.decoder.__getstate__() if self._tokenizer.decoder is not None else b""
        self._byte_level = b'"ByteLevel"' in (state if isinstance(state, bytes) else str(state).encode())
        self._alphabet = {ord(letter): byte for byte, letter in _byte_alphabet().items()}

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids; with `parse_special` the names of control tokens in the text become those tokens."""
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if add_special and self.add_bos and self.bos_token is not None and ids[:1] != [self.bos_token]:
            ids.insert(0, self.bos_token)  # a chat template may have written it already
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, control tokens shown; broken UTF-8 becomes replacement characters."""
        if not self._byte_level:
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
        return b"".join(self.bytes_of(token) for token in token_ids).decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        """Whether the token is no text of an answer."""
        return self._added.get(token, (b"", False))[1]

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for an id that the tokenizer does not have."""
        if token in self._added:
            return bytes(self._added[token][0])
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            values = [self._alphabet.get(ord(letter)) for letter in piece]
            return (
                bytes(value for value in values if value is not None)
                if None not in values
                else piece.encode()
            )
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """A token for a human, in ``logprobs``."""
        return self.bytes_of(token).decode("utf-8", "replace")


class Utf8Stream:
    """Bytes in, whole characters out: a character that is split between tokens comes with its last byte."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, raw: bytes) -> str:
        """Characters that are complete now."""
        return self._decoder.decode(raw)

    def end(self) -> str:
        """What is left: a replacement character for an unfinished one."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
