"""The inner port: what a runtime's binding must do, and the card beside the model file that says what the file holds.

Rules that the scheduler rests on:

- One thread makes all calls.
- Logits are float32, shape (vocab,), of the position after the last token; `append_all` gives one row a token.
- The same tokens, appended in the same pieces to a sequence of the same length, give the same bits, whatever
the sequence held before `rewind`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slmops.core.errors import RuntimeLoadError

CARD_NAME = "slmops-model.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_NAME = "tokenizer.json"

Logits = NDArray[np.float32]


class TokenSequence(Protocol):
    """One conversation's KV cache inside a model."""

    def append(self, token_ids: Sequence[int]) -> Logits:
        """Evaluate one or more tokens; logits after the last, shape (vocab,). The caller may change them."""
        ...

    def append_all(self, token_ids: Sequence[int]) -> Logits:
        """Evaluate tokens; logits after each, shape (len(token_ids), vocab)."""
        ...

    def rewind(self, length_tokens: int) -> None:
        """Forget everything after the first `length_tokens` tokens."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class TokenModel(Protocol):
    """A loaded model."""

    @property
    def vocab_tokens(self) -> int:
        """Width of its logits."""
        ...

    @property
    def max_sequences(self) -> int | None:
        """How many sequences it can hold at once; None for as many as memory holds."""
        ...

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens of one `append`: small where the binding keeps Python's lock, so that `/health` answers."""
        ...

    def open_sequence(self) -> TokenSequence:
        """An empty sequence with room for the spec's context."""
        ...


@dataclass(frozen=True)
class ModelCard:
    """What ``slmops-model.json`` says of the file beside it; written by every export.

    Attributes:
        context_tokens: longest sequence that the file was exported for.
        vocab_tokens: rows of the output layer.
        bos_token: id, None when there is none.
        eos_tokens: ids that end an answer.
        add_bos: whether a text begins with BOS.
        shape: n_layers, n_heads, n_kv_heads, n_embd, head_dim, train_context_tokens, parameters.
        precision: of the weights, such as "int4".
    """

    context_tokens: int
    vocab_tokens: int
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    add_bos: bool = False
    shape: Mapping[str, int] = field(default_factory=dict)
    precision: str = ""


def read_card(folder: Path) -> ModelCard:
    """The card in a model's folder.

    Raises:
        RuntimeLoadError: it is absent or says something else than a card does.
    """
    path = folder / CARD_NAME
    try:
        raw: dict[str, Any] = json.loads(path.read_bytes())
        if raw["schema"] != 1:
            raise RuntimeLoadError(
                f"{CARD_NAME}: expected schema 1, got {raw['schema']}",
                hint="update the agent, or export the model again",
            )
        bos = raw.get("bos_token")
        return ModelCard(
            context_tokens=int(raw["context_tokens"]),
            vocab_tokens=int(raw["vocab_tokens"]),
            bos_token=None if bos is None or int(bos) < 0 else int(bos),
            eos_tokens=tuple(int(token) for token in raw["eos_tokens"]),
            add_bos=bool(raw.get("add_bos", False)),
            shape={name: int(value) for name, value in raw["shape"].items()},
            precision=str(raw.get("precision", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeLoadError(
            f"{path.name} beside the model could not be read: {type(error).__name__}: {error}",
            hint="export the model with slmops build, which writes it",
            path=str(path),
        ) from error
