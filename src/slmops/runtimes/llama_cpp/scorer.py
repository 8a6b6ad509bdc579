"""Teacher-forced log-probabilities without numpy, fast enough for a vocabulary of 49,152.

A log-softmax over the vocabulary in pure Python costs about 5 ms a position. Here ggml itself does it: the
logits stay in llama.cpp's buffer, one small ggml graph takes the argmax of each row and its softmax in place.
With p the softmax of the best token, log-sum-exp = best logit - log(p): p is at least 1/vocabulary, so
nothing underflows, however unlikely the scored token is.
"""

from __future__ import annotations

import ctypes as ct
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from slmops.runtimes.llama_cpp import capi
from slmops.runtimes.llama_cpp.native import SCORE_BATCH_TOKENS, NativeContext, NativeModel, check_token_ids
from slmops.runtimes.ports import AdapterSpec, Score

_STEP_TOKENS = 512
_GRAPH_BYTES = 1 << 20
_F32 = 0


class Scorer:
    """A second, lazy instance of an engine's model, for scoring only.

    The model's pages are shared with every other mapping of the file (no repacking), so an instance costs its
    KV cache and buffers. It is freed by `release_if_idle`. Safe to call from several threads: one score at a
    time.

    Args:
        path: GGUF file.
        context_tokens: longest sequence.
        kv_cache: the engine's type, so that what is scored is what is served.
        threads: compute threads.
        adapters: the engine's adapters.
        own_log: see `NativeModel`.
    """

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int,
        kv_cache: str = "f16",
        threads: int = 1,
        adapters: Sequence[AdapterSpec] = (),
        own_log: bool = True,
    ) -> None:
        self.path = path
        self.context_tokens = context_tokens
        self.kv_cache = kv_cache
        self.threads = threads
        self.adapters = tuple(adapters)
        self.own_log = own_log
        self._lock = threading.Lock()
        self._loaded: tuple[NativeModel, NativeContext] | None = None
        self._used_at_s = 0.0

    def _open(self, tokens: int) -> tuple[NativeModel, NativeContext]:
        """The instance, with room for `tokens`: grown in steps of 512, not the whole context at once."""
        if self._loaded and self._loaded[1].context_tokens < min(tokens, self.context_tokens):
            self._close()
        if self._loaded is None:
            model = NativeModel(self.path, repack=False, own_log=self.own_log)
            try:
                context = NativeContext(
                    model,
                    context_tokens=min(self.context_tokens, -(-tokens // _STEP_TOKENS) * _STEP_TOKENS),
                    batch_tokens=SCORE_BATCH_TOKENS,
                    output_tokens=SCORE_BATCH_TOKENS,
                    threads=self.threads,
                    kv_cache=self.kv_cache,
                    adapters=self.adapters,
                )
            except BaseException:
                model.close()
                raise
            self._loaded = (model, context)
        self._used_at_s = time.monotonic()
        return self._loaded

    def model_facts(self) -> dict[str, int | str | None]:
        """Shape of the model and its chat template, for `EngineProperties`."""
        with self._lock:
            model = self._loaded[0] if self._loaded else NativeModel(self.path, own_log=self.own_log)
            try:
                return {
                    "train_context_tokens": model.train_context_tokens,
                    "n_layers": model.n_layers,
                    "n_heads": model.n_heads,
                    "n_kv_heads": model.n_kv_heads,
                    "n_embd": model.n_embd,
                    "head_dim": model.head_dim,
                    "vocab_tokens": model.vocab_tokens,
                    "parameters": model.parameters,
                    "model_bytes": model.model_bytes,
                    "description": model.description,
                    "bos_token": model.bos_token,
                    "eos_token": model.eos_token,
                    "chat_template": model.chat_template,
                }
            finally:
                if self._loaded is None:
                    model.close()
                    _give_back_memory()

    def score(self, token_ids: Sequence[int], *, start: int = 1, top_k: int = 0) -> Score:
        """Score `token_ids[start:]`; see `Engine.score`."""
        with self._lock:
            model, context = self._open(len(token_ids))
            check_token_ids(
                token_ids, vocab_tokens=model.vocab_tokens, context_tokens=self.context_tokens, start=start
            )
            logprobs: list[float] = []
            greedy: list[int] = []
            greedy_logprobs: list[float] = []
            top: list[tuple[tuple[int, float], ...]] = []
            last = len(token_ids) - 1
            for position, rows, logits in context.chunks(token_ids, start - 1, last):
                targets = token_ids[position + 1 : position + 1 + rows]
                part = _read_rows(model, logits, rows, targets, top_k, self.threads)
                logprobs += part[0]
                greedy += part[1]
                greedy_logprobs += part[2]
                top += part[3]
            self._used_at_s = time.monotonic()
            return Score(start, tuple(logprobs), tuple(greedy), tuple(greedy_logprobs), tuple(top))

    def release_if_idle(self, idle_s: float) -> bool:
        """Free the instance when it was not used for `idle_s`; tell whether it did."""
        with self._lock:
            if self._loaded is None or time.monotonic() - self._used_at_s < idle_s:
                return False
            self._close()
            return True

    def close(self) -> None:
        """Free the instance."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._loaded:
            model, context = self._loaded
            self._loaded = None
            context.close()
            model.close()
            _give_back_memory()


def _give_back_memory() -> None:
    """Return freed heap to the kernel: glibc keeps it otherwise, 20 MB of vocabulary at a time."""
    trim = getattr(ct.CDLL(None), "malloc_trim", None)  # glibc only
    if trim:
        trim(0)


def _read_rows(
    model: NativeModel,
    logits: ct._Pointer[ct.c_float],
    rows: int,
    targets: Sequence[int],
    top_k: int,
    threads: int,
) -> tuple[list[float], list[int], list[float], list[tuple[tuple[int, float], ...]]]:
    """Log-probability of each target, argmax, its log-probability, top k. Overwrites the logits."""
    lib, width = model.lib, model.vocab_tokens
    # each thread of a softmax or a sort works on a row of its own inside the arena: 1 MiB with a vocabulary of 262,144
    work_bytes = 2 * width * 4 * threads
    results_bytes = rows * (width if top_k else 1) * 4
    arena = lib.ggml_init(capi.InitParams(_GRAPH_BYTES + work_bytes + results_bytes, None, False))
    try:
        matrix = _borrowed_matrix(lib, arena, logits, width, rows)
        best = lib.ggml_argmax(arena, matrix)
        ranked = lib.ggml_argsort_top_k(arena, matrix, top_k) if top_k else None
        _compute(lib, arena, [best, ranked] if ranked else [best], threads)
        greedy = list(ct.cast(best.contents.data, ct.POINTER(ct.c_int32))[:rows])
        best_logits = [logits[row * width + token] for row, token in enumerate(greedy)]
        target_logits = [logits[row * width + token] for row, token in enumerate(targets)]
        top_ids = [_row_of_ids(ranked, row, top_k) for row in range(rows)] if ranked else []
        top_logits = [[logits[row * width + token] for token in ids] for row, ids in enumerate(top_ids)]
        _compute(lib, arena, [lib.ggml_soft_max_inplace(arena, matrix)], threads)
        # log-sum-exp of a row, from the probability of its best token
        norms = [
            value - math.log(logits[row * width + token])
            for row, (token, value) in enumerate(zip(greedy, best_logits, strict=True))
        ]
    finally:
        lib.ggml_free(arena)
    return (
        [value - norm for value, norm in zip(target_logits, norms, strict=True)],
        greedy,
        [value - norm for value, norm in zip(best_logits, norms, strict=True)],
        [
            tuple((token, value - norm) for token, value in zip(ids, values, strict=True))
            for ids, values, norm in zip(top_ids, top_logits, norms, strict=False)
        ],
    )


def _borrowed_matrix(
    lib: ct.CDLL, arena: int, logits: ct._Pointer[ct.c_float], width: int, rows: int
) -> ct._Pointer[capi.Tensor]:
    """A (rows, width) tensor over memory that is not the arena's."""
    lib.ggml_set_no_alloc(arena, True)
    matrix: ct._Pointer[capi.Tensor] = lib.ggml_new_tensor_2d(arena, _F32, width, rows)
    lib.ggml_set_no_alloc(arena, False)
    matrix.contents.data = ct.cast(logits, ct.c_void_p).value
    return matrix


def _compute(lib: ct.CDLL, arena: int, outputs: Sequence[ct._Pointer[capi.Tensor]], threads: int) -> None:
    graph = lib.ggml_new_graph(arena)
    for output in outputs:
        lib.ggml_build_forward_expand(graph, output)
    lib.ggml_graph_compute_with_ctx(arena, graph, threads)


def _row_of_ids(ranked: ct._Pointer[capi.Tensor], row: int, count: int) -> list[int]:
    tensor = ranked.contents
    address = tensor.data + row * tensor.nb[1]
    return list((ct.c_int32 * count).from_address(address))
