"""Reading the pieces of a SentencePiece ``tokenizer.model``: a protocol buffer, of which three fields are needed.

Source: sentencepiece ``src/sentencepiece_model.proto`` (ModelProto.pieces = 1; SentencePiece: piece 1, score 2, type 3;
TrainerSpec = 2, model_type 3) and the protocol buffers' encoding rules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from slmops.core.errors import BaseModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece; ``kind`` is one of this module's constants, which are also llama.cpp's token types."""

    text: str
    score: float
    kind: int


def read_pieces(content: bytes, what: str) -> list[Piece]:
    """All pieces of a model, in the order of their ids.

    Args:
        content: the file.
        what: its name, for messages.

    Raises:
        BaseModelError: damaged, or a model that llama.cpp's tokenizer cannot be (it does BPE and unigram alike by score;
            word and char models it does not do).
    """
    pieces = []
    model_type = _UNIGRAM
    try:
        for field, value in _fields(content):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif field == 2 and isinstance(value, bytes):
                model_type = next(
                    (int(v) for f, v in _fields(value) if f == 3 and isinstance(v, int)), _UNIGRAM
                )
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise BaseModelError(
            f"{what}: not a SentencePiece model: {error}", hint="the file is damaged: fetch it again"
        ) from error
    if not pieces:
        raise BaseModelError(f"{what}: has no pieces", hint="the file is damaged: fetch it again")
    if model_type != _BPE:
        raise BaseModelError(
            f"{what}: SentencePiece model type {_MODEL_TYPES.get(model_type, model_type)!r}, expected 'bpe'",
            hint="convert the model with llama.cpp's convert_hf_to_gguf.py and write base: {gguf: FILE}",
        )
    return pieces


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(content):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value: varints as integers, everything else as bytes."""
    at, end = 0, len(content)
    while at < end:
        tag, at = _varint(content, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield field, value
            continue
        if wire == _BYTES:
            length, at = _varint(content, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + length > end:
            raise IndexError(f"field {field} ends at byte {at + length} of {end}")
        yield field, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise IndexError(f"number too long at byte {at}")
