"""The child of the runtimes `litert` and `litert-lm`: `python -m slmops.runtimes.litert.engine`.

A program has a signature ``decode`` (one token in, its logits out) and some ``prefill_N`` (N tokens in, no logits).
Keys and values are arguments; LiteRT runs with the same buffers as inputs and outputs, so that they are never copied.
The binding keeps Python's lock while it runs (measured with 2.3.0), so prompts go in the smallest pieces there are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops.core.errors import RuntimeLoadError
from slmops.runtimes.token_loop.model import Logits, ModelCard
from slmops.runtimes.token_loop.server import serve

_DECODE, _PREFILL = "decode", "prefill_"
_CACHE = "kv_cache_"
_ARGUMENTS = ("tokens", "input_pos", "mask")
_MASKED = -1e9
#: a padded piece costs as much as a full one: below this share of it, single tokens are cheaper
_WORTH_RATIO = 0.125


class LitertModel:
    """A loaded program; see `TokenModel`."""

    max_sequences: int | None = None

    def __init__(self, spec: dict[str, Any], card: ModelCard) -> None:
        from ai_edge_litert.compiled_model import CompiledModel  # noqa: PLC0415 - after the limits are in force
        from ai_edge_litert.cpu_options import CpuOptions  # noqa: PLC0415
        from ai_edge_litert.options import Options  # noqa: PLC0415

        options = Options(cpu_options=CpuOptions(num_threads=spec["threads"]))
        path = Path(spec["model_path"])
        if path.suffix == ".litertlm":
            from slmops.runtimes.litert.container import read_program  # noqa: PLC0415 - needs flatbuffers

            self._program = CompiledModel.from_buffer(read_program(path), options=options)
        else:
            self._program = CompiledModel.from_file(str(path), options=options)
        signatures = self._program.get_signature_list()
        sizes = sorted(
            int(name.removeprefix(_PREFILL))
            for name in signatures
            if name.startswith(_PREFILL) and name.removeprefix(_PREFILL).isdecimal()
        )
        if _DECODE not in signatures or not {*_ARGUMENTS} <= {*signatures[_DECODE]["inputs"]}:
            raise RuntimeLoadError(
                f"failed to load model: {path.name} has no signature decode with {', '.join(_ARGUMENTS)}: "
                f"it has {', '.join(sorted(signatures)) or 'none'}",
                hint="export it with litert-torch export_hf, as slmops build does",
            )
        self._details = self._program.get_input_tensor_details(_DECODE)
        self.cache_names = [name for name in signatures[_DECODE]["inputs"] if name.startswith(_CACHE)]
        self.cache_tokens = int(self._details["mask"]["shape"][-1])
        if spec["context_tokens"] > self.cache_tokens:
            raise RuntimeLoadError(
                f"context_tokens: {spec['context_tokens']} asked, the program's cache holds {self.cache_tokens}",
                hint="ask for less, or export it with a longer cache",
            )
        self.vocab_tokens = int(self._program.get_output_tensor_details(_DECODE)["logits"]["shape"][-1])
        if self.vocab_tokens != card.vocab_tokens:
            raise RuntimeLoadError(
                f"expected {card.vocab_tokens} logits, the program gives {self.vocab_tokens}",
                hint="export it again",
            )
        self.prefill_tokens = sizes[0] if sizes else 0
        self.max_chunk_tokens: int = self.prefill_tokens + 1
        self._logits = self._program.create_output_buffer_by_name(_DECODE, "logits")
        self._buffers = {_DECODE: self._argument_buffers(_DECODE)}
        if sizes:
            self._buffers[self._prefill] = self._argument_buffers(self._prefill)
        self.open_sequence().append([0])  # a program that loads and cannot run is refused here

    @property
    def _prefill(self) -> str:
        return f"{_PREFILL}{self.prefill_tokens}"

    def _argument_buffers(self, signature: str) -> dict[str, Any]:
        return {name: self._program.create_input_buffer_by_name(signature, name) for name in _ARGUMENTS}

    def open_sequence(self) -> LitertSequence:
        """Its own keys and values, zeroed: what is masked must still be a number."""
        cache = {}
        for name in self.cache_names:
            cache[name] = self._program.create_input_buffer_by_name(_DECODE, name)
            details = self._details[name]
            cache[name].write(np.zeros(details["shape"], details["dtype"]))
        return LitertSequence(self, cache)

    def fill(self, cache: dict[str, Any], token_ids: Sequence[int], position: int) -> None:
        """Evaluate up to `prefill_tokens` tokens, padded: what the padding writes lies behind and is written over."""
        size = self.prefill_tokens
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(token_ids)] = token_ids
        self._run(self._prefill, cache, tokens, position, cache)

    def decode(self, cache: dict[str, Any], token: int, position: int) -> Logits:
        """Evaluate one token; its logits."""
        outputs = {"logits": self._logits, **cache}
        self._run(_DECODE, cache, np.array([[token]], np.int32), position, outputs)
        logits: Logits = self._logits.read(self.vocab_tokens, np.float32)
        return logits

    def _run(
        self, signature: str, cache: dict[str, Any], tokens: Any, position: int, outputs: dict[str, Any]
    ) -> None:
        count = tokens.shape[1]
        positions = np.arange(position, position + count, dtype=np.int32)
        columns = np.arange(self.cache_tokens, dtype=np.int32)
        mask = np.where(columns[None, :] <= positions[:, None], np.float32(0), np.float32(_MASKED))
        buffers = self._buffers[signature]
        buffers["tokens"].write(tokens)
        buffers["input_pos"].write(positions)
        buffers["mask"].write(mask.reshape(1, 1, count, self.cache_tokens))
        self._program.run_by_name(signature, {**buffers, **cache}, outputs)


class LitertSequence:
    """One conversation's keys and values; see `TokenSequence`."""

    def __init__(self, model: LitertModel, cache: dict[str, Any]) -> None:
        self._model = model
        self._cache = cache
        self._length = 0

    def append(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`: all but the last without logits, in pieces."""
        model = self._model
        rest = list(token_ids[:-1])
        while rest:
            piece = rest[: model.prefill_tokens]
            fits = self._length + model.prefill_tokens <= model.cache_tokens
            if not fits or len(piece) <= model.prefill_tokens * _WORTH_RATIO:
                break
            model.fill(self._cache, piece, self._length)
            self._length += len(piece)
            del rest[: len(piece)]
        for token in rest:
            self._step(token)
        return self._step(token_ids[-1])

    def append_all(self, token_ids: Sequence[int]) -> Logits:
        """See `TokenSequence`."""
        return np.stack([self._step(token) for token in token_ids])

    def _step(self, token: int) -> Logits:
        logits = self._model.decode(self._cache, token, self._length)
        self._length += 1
        return logits

    def rewind(self, length_tokens: int) -> None:
        """See `TokenSequence`: what lies behind is masked, and overwritten before it is read."""
        self._length = length_tokens

    def close(self) -> None:
        """See `TokenSequence`."""
        for buffer in self._cache.values():
            buffer.destroy()
        self._cache = {}


if __name__ == "__main__":
    sys.exit(serve(LitertModel))
