"""The child of the onnxruntime-genai runtime: `python -m slmops.runtimes.onnxruntime_genai.engine`.

The binding's own sampling and tokenizer are not used: only its forward pass and KV cache. It keeps Python's
lock during a forward pass (measured with 0.18.0), so prompts go in small pieces.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes.token_loop.model import CARD_NAME, Logits, ModelCard, read_card
from slmops.runtimes.token_loop.server import serve

_CONFIG_NAME = "genai_config.json"
_MAX_CHUNK_TOKENS = 128


class GenaiModel:
    """A loaded model; see `TokenModel`."""

    max_sequences: int | None = None
    max_chunk_tokens: int = _MAX_CHUNK_TOKENS

    def __init__(self, spec: dict[str, Any], card: ModelCard) -> None:
        import onnxruntime_genai as og  # noqa: PLC0415 - after the limits are in force

        self._og = og
        self._context_tokens = spec["context_tokens"]
        config = og.Config(str(Path(spec["model_path"]).parent))
        options = {
            "intra_op_num_threads": spec["threads"],
            "inter_op_num_threads": 1,
            "session.intra_op.allow_spinning": "0",  # spinning collapses speed on shared cores
            "session.inter_op.allow_spinning": "0",
        }
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self.vocab_tokens = card.vocab_tokens
        probe = self.open_sequence().append([0])  # a file that loads and cannot run is refused here
        if probe.shape != (self.vocab_tokens,):
            raise RuntimeLoadError(
                f"expected {self.vocab_tokens} logits, the model gives {probe.shape[0]}",
                hint="export it again",
            )

    def open_sequence(self) -> GenaiSequence:
        """A generator with its own KV cache, as long as the context."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._context_tokens, do_sample=False, batch_size=1, num_beams=1)
        return GenaiSequence(self._og.Generator(self._model, params))


class GenaiSequence:
    """One generator; see `TokenSequence`."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def append(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`."""
        self._generator.append_tokens(np.asarray(token_ids, dtype=np.int32))
        return np.array(self._generator.get_logits(), dtype=np.float32).reshape(-1)

    def append_all(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`."""
        self._generator.append_tokens(np.asarray(token_ids, dtype=np.int32))
        rows = np.array(self._generator.get_output("logits"), dtype=np.float32)
        return rows.reshape(-1, rows.shape[-1])

    def rewind(self, length_tokens: int) -> None:
        """See `TokenSequence`."""
        self._generator.rewind_to(length_tokens)

    def close(self) -> None:
        """See `TokenSequence`."""
        self._generator = None


def read_genai_card(folder: Path) -> ModelCard:
    """Our card, or what the builder's own configuration says when the folder came straight from it.

    Raises:
        RuntimeLoadError: neither can be read.
    """
    if (folder / CARD_NAME).exists():
        return read_card(folder)
    try:
        raw = json.loads((folder / _CONFIG_NAME).read_bytes())["model"]
        decoder = raw["decoder"]
        eos = raw["eos_token_id"]
        return ModelCard(
            context_tokens=int(raw["context_length"]),
            vocab_tokens=int(raw["vocab_size"]),
            bos_token=raw.get("bos_token_id"),
            eos_tokens=tuple(eos) if isinstance(eos, list) else (int(eos),),
            shape={
                "n_layers": decoder["num_hidden_layers"],
                "n_heads": decoder["num_attention_heads"],
                "n_kv_heads": decoder["num_key_value_heads"],
                "n_embd": decoder["hidden_size"],
                "head_dim": decoder["head_size"],
                "train_context_tokens": int(raw["context_length"]),
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeLoadError(
            f"failed to load model: {_CONFIG_NAME} cannot be read: {type(error).__name__}",
            hint="export the model again",
        ) from error


if __name__ == "__main__":
    sys.exit(serve(GenaiModel, read_genai_card))
