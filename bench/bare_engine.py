"""An engine driven bare, as a peer for bench/runtimes.py: the binding's own greedy loop in the binding's environment.

    python bench/bare_engine.py '{"runtime": "onnxruntime-genai", "model_path": ".../genai_config.json", ...}'

No server and no text. Loads the model, then makes one measured answer for each line on stdin (``{"prompt": [ids], "tokens":
n}``) and prints one line for it: ``{"cpu_s", "wall_s", "prefill_s"}``, the first two of the n - 1 tokens after the first.
onnxruntime-genai has a loop of its own (``generate_next_token``) and llama.cpp's is three calls; LiteRT and ExecuTorch have
only a forward pass, so there the loop is an argmax around our adapter's model object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: the first value of it comes with the end of the prefill, then one for each token
Loop = Callable[[Sequence[int]], Iterator[int]]


def genai(spec: dict[str, Any]) -> Loop:
    """The binding's generator, with the session options that the engine child uses."""
    from slmops.runtimes.onnxruntime_genai.engine import GenaiModel, read_genai_card  # noqa: PLC0415

    model = GenaiModel(spec, read_genai_card(Path(spec["model_path"]).parent))
    binding, loaded = model._og, model._model

    def loop(prompt: Sequence[int]) -> Iterator[int]:
        params = binding.GeneratorParams(loaded)
        params.set_search_options(
            max_length=spec["context_tokens"], do_sample=False, batch_size=1, num_beams=1
        )
        generator = binding.Generator(loaded, params)
        for start in range(0, len(prompt), spec["batch_tokens"]):
            generator.append_tokens(np.asarray(prompt[start : start + spec["batch_tokens"]], dtype=np.int32))
        while True:
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return loop


def llama_cpp(spec: dict[str, Any]) -> Loop:
    """``llama_decode`` and an argmax."""
    from slmops.runtimes.llama_cpp.native import NativeContext, NativeModel  # noqa: PLC0415

    model = NativeModel(Path(spec["model_path"]), repack=spec["repack"])
    context = NativeContext(
        model,
        context_tokens=spec["context_tokens"],
        batch_tokens=spec["batch_tokens"],
        output_tokens=1,
        threads=spec["threads"],
        kv_cache=spec["kv_cache"],
    )

    def loop(prompt: Sequence[int]) -> Iterator[int]:
        count = len(prompt)
        ((_, _, row),) = list(context.chunks(prompt, count - 1, count))
        while True:
            best = int(np.ctypeslib.as_array(row, (model.vocab_tokens,)).argmax())
            yield best
            row = context.decode([best], count, 1)
            count += 1

    return loop


def forward_only(model: Any, batch_tokens: int) -> Loop:
    """An argmax around a `TokenModel`."""
    sequence = model.open_sequence()
    batch_tokens = min(batch_tokens, model.max_chunk_tokens)

    def loop(prompt: Sequence[int]) -> Iterator[int]:
        sequence.rewind(0)
        for start in range(0, len(prompt), batch_tokens):
            logits = sequence.append(prompt[start : start + batch_tokens])
        while True:
            best = int(logits.argmax())
            yield best
            logits = sequence.append([best])

    return loop


def open_bare(spec: dict[str, Any]) -> Loop:
    """The loop of a runtime.

    Raises:
        ValueError: the runtime has no bare form here.
    """
    if spec["runtime"] == "onnxruntime-genai":
        return genai(spec)
    if spec["runtime"] == "llama.cpp":
        return llama_cpp(spec)
    from slmops.runtimes.token_loop.model import read_card  # noqa: PLC0415

    if spec["runtime"] in ("litert", "litert-lm"):
        from slmops.runtimes.litert.engine import LitertModel as Model  # noqa: PLC0415
    elif spec["runtime"] == "executorch":
        from slmops.runtimes.executorch.engine import ExecutorchModel as Model  # type: ignore[assignment] # noqa: PLC0415
    else:
        raise ValueError(f"no bare form of {spec['runtime']!r}")
    return forward_only(Model(spec, read_card(Path(spec["model_path"]).parent)), spec["batch_tokens"])


def main() -> None:
    loop = open_bare(json.loads(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began_s = time.perf_counter()
        tokens = loop(asked["prompt"])
        next(tokens)
        cpu_s, first_s = time.process_time(), time.perf_counter()
        for _ in range(asked["tokens"] - 1):
            next(tokens)
        took = {
            "cpu_s": time.process_time() - cpu_s,
            "wall_s": time.perf_counter() - first_s,
            "prefill_s": first_s - began_s,
        }
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
