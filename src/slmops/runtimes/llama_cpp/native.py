"""A model and a context of llama.cpp, in this process, without numpy.

Owns handles and their lifetime. Not thread-safe: one caller at a time. The binding releases the GIL in every
call.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from slmops.core.errors import NoMemoryError, RuntimeLoadError, UsageError
from slmops.runtimes.llama_cpp import capi
from slmops.runtimes.ports import AdapterSpec

GGUF_MAGIC = b"GGUF"

#: Tokens of one decode when sequences are scored. Below 64 llama.cpp's CPU attention takes the same path as
#: for a single token, so that a score does not depend on where a sequence was cut (bit for bit), and is what
#: decoding gives. From 64 on it takes another path, which moved single log-probabilities of SmolLM2-135M by
#: up to 0.3 nats (0.04 on average, 0.01 in the mean). No slower: 32 tokens fill the matrix kernels.
SCORE_BATCH_TOKENS = 32
_LOG_ERROR = 4
_LOG_CONTINUED = 5

EvalCallback = Callable[[capi.Tensor, bool], bool]


class _Log:
    """The library's error lines; one for the process, because llama.cpp has one log callback."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._last_was_error = False
        self._callback = capi.LOG_CALLBACK(self._receive)
        self._installed = False
        self._lock = threading.Lock()

    def install(self) -> None:
        """Take the log over once; before that llama.cpp would write to stderr."""
        with self._lock:
            if not self._installed:
                capi.library().llama_log_set(self._callback, None)
                self._installed = True

    def _receive(self, level: int, text: bytes, _context: object) -> None:
        is_error = level == _LOG_ERROR or (level == _LOG_CONTINUED and self._last_was_error)
        self._last_was_error = is_error
        if is_error:
            self.lines.append(text.decode("utf-8", "replace").rstrip("\n"))
            del self.lines[:-20]

    def take(self) -> str:
        """Error lines since the last call."""
        text, self.lines = "\n".join(self.lines), []
        return text


_log = _Log()


def check_gguf(path: Path) -> None:
    """Refuse early what is plainly not a GGUF file.

    Raises:
        RuntimeLoadError: missing, empty or with another magic.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise RuntimeLoadError(
            f"model file {path.name!r} cannot be read: {error.strerror}",
            hint="check the path",
            path=str(path),
        ) from error
    if magic != GGUF_MAGIC:
        raise RuntimeLoadError(
            f"model file {path.name!r} is not a GGUF: expected magic {GGUF_MAGIC!r}, got {magic!r}",
            hint="convert the model to GGUF, or fetch the file again",
            path=str(path),
        )


class NativeModel:
    """Weights and vocabulary of one GGUF file, memory-mapped.

    Args:
        path: the file; it must not change while the model lives.
        repack: rearrange weights for this CPU into private memory: faster, and the bytes are no longer
            shared.
        own_log: collect the library's errors here. False in a process whose log belongs to somebody else.

    Raises:
        RuntimeLoadError: llama.cpp refused the file.
    """

    def __init__(self, path: Path, *, repack: bool = False, own_log: bool = True) -> None:
        check_gguf(path)
        self.path = path
        self.lib = capi.library()
        if own_log:
            _log.install()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = capi.LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        self.handle: int | None = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeLoadError(
                f"llama.cpp refused {path.name!r}: {_log.take() or 'no reason given'}",
                hint="check the file's digest and architecture",
                path=str(path),
            )
        self.vocab: int = self.lib.llama_model_get_vocab(self.handle)
        self.vocab_tokens: int = self.lib.llama_vocab_n_tokens(self.vocab)
        self.n_layers: int = self.lib.llama_model_n_layer(self.handle)
        self.n_heads: int = self.lib.llama_model_n_head(self.handle)
        self.n_kv_heads: int = self.lib.llama_model_n_head_kv(self.handle)
        self.n_embd: int = self.lib.llama_model_n_embd(self.handle)
        self.train_context_tokens: int = self.lib.llama_model_n_ctx_train(self.handle)
        self.parameters: int = self.lib.llama_model_n_params(self.handle)
        self.model_bytes: int = self.lib.llama_model_size(self.handle)
        self.bos_token: int = self.lib.llama_vocab_bos(self.vocab)
        self.eos_token: int = self.lib.llama_vocab_eos(self.vocab)

    @property
    def head_dim(self) -> int:
        """Width of one key head, in elements."""
        stated = self.meta(f"{self.meta('general.architecture')}.attention.key_length")
        return int(stated) if stated else self.n_embd // max(self.n_heads, 1)

    @property
    def description(self) -> str:
        """The library's own words, such as "llama ?B Q4_1"."""
        buffer = ct.create_string_buffer(128)
        self.lib.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def chat_template(self) -> str | None:
        """The template inside the file."""
        raw: bytes | None = self.lib.llama_model_chat_template(self.handle, None)
        return raw.decode("utf-8", "replace") if raw else None

    def meta(self, key: str) -> str:
        """Scalar metadata value as text, "" when absent."""
        buffer = ct.create_string_buffer(512)
        if self.lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer)) < 0:
            return ""
        return buffer.value.decode("utf-8", "replace")

    def is_end(self, token_id: int) -> bool:
        """Tell whether a token ends a generation."""
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token_id))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            buffer = (ct.c_int32 * room)()
            count = self.lib.llama_tokenize(
                self.vocab, raw, len(raw), buffer, room, add_special, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown."""
        ids = (ct.c_int32 * len(token_ids))(*token_ids)
        room = 16 * len(token_ids) + 64
        while True:
            buffer = ct.create_string_buffer(room)
            count = self.lib.llama_detokenize(self.vocab, ids, len(token_ids), buffer, room, False, True)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def close(self) -> None:
        """Free the model; contexts of it must be closed before."""
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


class NativeContext:
    """KV cache and buffers for one sequence of one model.

    Args:
        model: stays open for longer than the context.
        context_tokens: KV cache size.
        batch_tokens: tokens in one `decode` at most.
        output_tokens: positions in one `decode` whose logits can be had; each costs `4 * vocab_tokens` bytes.
        threads: compute threads.
        kv_cache: element type, a key of `capi.KV_CACHE_TYPES`.
        adapters: LoRA files to apply.
        on_node: called with (tensor, ask) for each graph node: True to an ask makes the node be shown when
            computed.

    Raises:
        NoMemoryError: the context could not be made.
        RuntimeLoadError: an adapter does not fit the model.
    """

    def __init__(  # noqa: PLR0913 - settings of one context, by keyword
        self,
        model: NativeModel,
        *,
        context_tokens: int,
        batch_tokens: int = 512,
        output_tokens: int = 1,
        threads: int = 1,
        kv_cache: str = "f16",
        adapters: Sequence[AdapterSpec] = (),
        on_node: EvalCallback | None = None,
    ) -> None:
        self.model = model
        self.lib = model.lib
        self.batch_tokens = batch_tokens
        self.output_tokens = output_tokens
        params = self.lib.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_outputs_max = params.n_outputs_max_per_seq = output_tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = kv_cache_type(kv_cache)
        params.offload_kqv = params.op_offload = False
        self._callback = capi.EVAL_CALLBACK(_node_callback(on_node)) if on_node else None
        if self._callback:
            params.cb_eval = ct.cast(self._callback, ct.c_void_p)
        self.handle: int | None = self.lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise NoMemoryError(
                f"llama.cpp could not make a context of {context_tokens} tokens: {_log.take()}",
                hint="use fewer context tokens or a smaller kv_cache type",
                context_tokens=context_tokens,
            )
        self.context_tokens: int = self.lib.llama_n_ctx_seq(self.handle)
        self._memory = self.lib.llama_get_memory(self.handle)
        self._tokens = (ct.c_int32 * batch_tokens)()
        self._positions = (ct.c_int32 * batch_tokens)()
        self._n_seq_id = (ct.c_int32 * batch_tokens)(*([1] * batch_tokens))
        self._sequence = (ct.c_int32 * 1)(0)
        pointer = ct.POINTER(ct.c_int32)
        self._seq_id = (pointer * batch_tokens)(*([ct.cast(self._sequence, pointer)] * batch_tokens))
        self._outputs = (ct.c_int8 * batch_tokens)()
        if adapters:
            self._apply(adapters)

    def _apply(self, adapters: Sequence[AdapterSpec]) -> None:
        handles = (ct.c_void_p * len(adapters))()
        for index, adapter in enumerate(adapters):
            check_gguf(adapter.path)
            handles[index] = self.lib.llama_adapter_lora_init(self.model.handle, str(adapter.path).encode())
            if not handles[index]:
                raise RuntimeLoadError(
                    f"adapter {adapter.path.name!r} does not fit {self.model.path.name!r}: {_log.take()}",
                    hint="use the adapter's own base model",
                    path=str(adapter.path),
                )
        scales = (ct.c_float * len(adapters))(*(adapter.scale for adapter in adapters))
        self.lib.llama_set_adapters_lora(self.handle, handles, len(adapters), scales)

    def clear(self) -> None:
        """Forget every token."""
        self.lib.llama_memory_clear(self._memory, False)

    def decode(self, token_ids: Sequence[int], position: int, outputs: int) -> ct._Pointer[ct.c_float]:
        """Run tokens through the model.

        Args:
            token_ids: at most `batch_tokens`; ids must be inside the vocabulary.
            position: position of the first one; earlier ones have been decoded.
            outputs: how many of the last tokens give logits, 0..`output_tokens`.

        Returns: pointer to (outputs, vocab_tokens) float32, valid until the next call.

        Raises:
            NoMemoryError: the KV cache is full, or the computation failed.
        """
        count = len(token_ids)
        self._tokens[:count] = list(token_ids)
        self._positions[:count] = list(range(position, position + count))
        for index in range(count):
            self._outputs[index] = index >= count - outputs
        pointer = ct.POINTER(ct.c_int32)
        batch = capi.Batch(
            n_tokens=count,
            token=ct.cast(self._tokens, pointer),
            embd=None,
            pos=ct.cast(self._positions, pointer),
            n_seq_id=ct.cast(self._n_seq_id, pointer),
            seq_id=ct.cast(self._seq_id, ct.POINTER(pointer)),
            logits=ct.cast(self._outputs, ct.POINTER(ct.c_int8)),
        )
        status = self.lib.llama_decode(self.handle, batch)
        if status != 0:
            raise NoMemoryError(
                f"llama_decode gave {status} at position {position} with {count} tokens: {_log.take()}",
                hint="use a larger context, or close other models",
                status=status,
            )
        result: ct._Pointer[ct.c_float] = self.lib.llama_get_logits(self.handle)
        return result

    def chunks(
        self, token_ids: Sequence[int], start: int, stop: int
    ) -> Iterator[tuple[int, int, ct._Pointer[ct.c_float]]]:
        """Decode `token_ids[:stop]` from nothing and yield the logits of positions `start..stop-1` in parts.

        Yields: (first position, rows, pointer to (rows, vocab_tokens) float32 valid until the next part).
        """
        self.clear()
        position = 0
        while position < start:
            part = token_ids[position : min(start, position + self.batch_tokens)]
            self.decode(part, position, 0)
            position += len(part)
        size = min(self.output_tokens, self.batch_tokens)
        while position < stop:
            part = token_ids[position : min(stop, position + size)]
            yield position, len(part), self.decode(part, position, len(part))
            position += len(part)

    def close(self) -> None:
        """Free KV cache and buffers."""
        if self.handle:
            self.lib.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> NativeContext:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def kv_cache_type(name: str) -> int:
    """Value of `enum ggml_type` for a KV cache type's name.

    Raises:
        UsageError: unknown name.
    """
    try:
        return capi.KV_CACHE_TYPES[name]
    except KeyError:
        raise UsageError(
            f"unknown kv_cache type {name!r}: expected one of {', '.join(sorted(capi.KV_CACHE_TYPES))}",
            hint="set serving.kv_cache to one of them",
        ) from None


def check_token_ids(token_ids: Sequence[int], *, vocab_tokens: int, context_tokens: int, start: int) -> None:
    """Refuse sequences that a context cannot score; llama.cpp itself would abort the process on some.

    Raises:
        UsageError: too long or short, an id outside the vocabulary, or `start` out of range.
    """
    count = len(token_ids)
    if not 2 <= count <= context_tokens:
        raise UsageError(
            f"score: expected 2..{context_tokens} tokens, got {count}",
            hint="shorten the text or raise context_tokens",
            context_tokens=context_tokens,
            tokens=count,
        )
    if not 1 <= start < count:
        raise UsageError(
            f"score: expected start in 1..{count - 1}, got {start}", hint="the first token has no past"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_tokens:
        raise UsageError(
            f"score: expected token ids in 0..{vocab_tokens - 1}, got {low if low < 0 else high}",
            hint="tokenise with this model",
        )


def _node_callback(on_node: EvalCallback) -> Callable[[int, bool, int | None], bool]:
    tensor = ct.POINTER(capi.Tensor)

    def receive(pointer: int, ask: bool, _context: int | None) -> bool:
        with contextlib.suppress(Exception):  # an exception cannot cross C; the collector keeps its own error
            return bool(on_node(ct.cast(pointer, tensor).contents, ask))
        return False

    return receive
