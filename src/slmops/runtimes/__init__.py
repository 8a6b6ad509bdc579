"""Inference engines behind one port.

Owns: the port (`ports.py`), the registry (`load`), one folder per runtime. Does not own: the gateway, slots,
golden packs (agent), or what to build (build). Importing this module needs the standard library only.

For the agent (asynchronous, light)::

    from slmops.runtimes import EngineLimits, EngineSpec, load, open_engine

    runtime = load("llama.cpp")                    # or an entry point's name, or "module:attribute"
    engine = await runtime.start(EngineSpec(runtime="llama.cpp", model_path=path), workdir, EngineLimits())
    await engine.wait_ready(timeout_s=60)
    from slmops.runtimes.connect import engine_client
    engine_client(engine.socket_path)              # httpx.AsyncClient; does NOT reuse connections
    await engine.apply_template(messages)          # -> list[int]
    await engine.score(token_ids, start=1, top_k=0)  # -> Score(logprobs, greedy_ids, ...)
    await engine.stop()

    async with open_engine(spec, timeout_s=60) as engine: ...   # temporary workdir, ready, stopped afterwards

    from slmops.runtimes.bench import BenchResult, bench_engine, bench_model
    await bench_engine(engine, prompt_tokens=256, decode_tokens=64, repeats=3)   # -> BenchResult
    await bench_model(spec, prompt_tokens=256, decode_tokens=64, repeats=3)      # loads and stops it too

For build (synchronous, numpy, in this process; needs the `llama-cpp` extra)::

    from slmops.runtimes.llama_cpp.quantise import QuantType, dequantise_rows, quant_types, quantise_rows
    quant_types() -> dict[str, QuantType]          # by name, such as "Q4_K"
        # QuantType(name, ggml_id, block_weights, block_bytes, needs_imatrix, .bits_per_weight, .row_bytes(n))
    quantise_rows(type_name: str, rows: NDArray[float32], imatrix: NDArray[float32] | None = None) -> bytes
                                                   # rows (n_rows, n_per_row); imatrix (n_per_row,)
    dequantise_rows(type_name: str, blob: bytes, n_per_row: int) -> NDArray[float32]   # (n_rows, n_per_row)

    from slmops.runtimes.llama_cpp.logits import LogitModel, iter_logits
    with LogitModel(path, context_tokens=512, threads=1, kv_cache="f16", adapters=()) as model:
        model.vocab_tokens, model.n_layers, ...
        model.tokenize(text, add_special=False, parse_special=False) -> list[int]
        model.logits(token_ids) -> NDArray[float32]            # (len(token_ids), vocab_tokens), a copy
        model.greedy(token_ids, max_tokens, stop_ids) -> list[int]
    iter_logits(model: Path | LogitModel, token_ids, window_tokens=256) -> Iterator[LogitWindow]
        # LogitWindow(start, token_ids (n,), logits (n, vocab) float32): windows are independent, no overlap;
        # logits[i] predicts token_ids[i + 1]

    from slmops.runtimes.llama_cpp.imatrix import collect_imatrix
    collect_imatrix(path, token_ids, window_tokens=256, threads=1) -> Imatrix
        # .sums: dict[tensor name, NDArray[float32] (n_per_row,)] mean squared activations, .tokens: int

Runtimes:

- "llama.cpp": GGUF, by `xllamacpp` (extra `llama-cpp`).
- "slmops.testing.engine:FakeRuntime": a real child process with a scripted model, for tests.
- others: entry-point group `slmops.runtimes`, whose values are classes without arguments that are a
  `Runtime`.
"""

from slmops.runtimes.ports import (
    AdapterSpec,
    AppliedLimit,
    Capabilities,
    Engine,
    EngineLimits,
    EngineProperties,
    EngineSpec,
    Message,
    Runtime,
    Score,
)
from slmops.runtimes.registry import load, names, open_engine

__all__ = [
    "AdapterSpec",
    "AppliedLimit",
    "Capabilities",
    "Engine",
    "EngineLimits",
    "EngineProperties",
    "EngineSpec",
    "Message",
    "Runtime",
    "Score",
    "load",
    "names",
    "open_engine",
]
