"""Promise: admission predicts an engine's highest resident memory, for each runtime: not less, and at most half more.

    make bench NAME=memory                                             # llama.cpp, the small model
    make bench NAME=memory ARGS="onnxruntime-genai=EXPORT/genai_config.json executorch=EXPORT/model.pte"

Each engine serves a prompt and an answer in every slot; what it took is compared with `slmops.core.device.fit`. The figures
in `RUNTIME_MEMORY` were fitted with this script. No peer: the engines do not predict what they need.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import sys
from pathlib import Path

from device_world import small_model

from slmops.artifact.gguf_layout import parse_gguf
from slmops.core.device.fit import ModelShape, Serving, memory_needed
from slmops.runtimes import EngineProperties, EngineSpec, load, open_engine
from slmops.runtimes.connect import engine_client

SETTINGS = ((512, 1), (1024, 1), (2048, 1), (2048, 2))
MOST_RATIO = 1.5
CARDS = (
    "slmops-model.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "genai_config.json",
)


def shape_of(path: Path, facts: EngineProperties) -> ModelShape:
    """From the GGUF header, or from what the engine read back; the widths that are not told there are rounded up."""
    if path.suffix == ".gguf":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return parse_gguf(content).shape()
    files = [one for one in path.parent.iterdir() if one.name not in CARDS and one.is_file()]
    width = facts.n_kv_heads * facts.head_dim
    return ModelShape(
        weights_bytes=sum(one.stat().st_size for one in files),
        parameters=facts.parameters,
        layers=facts.n_layers,
        k_width=width,
        v_width=width,
        hidden=facts.n_embd,
        ffn=4 * facts.n_embd,
        vocabulary=facts.vocab_tokens,
        context_max_tokens=facts.train_context_tokens,
    )


async def measure(runtime: str, path: Path, context: int, slots: int) -> tuple[int, int]:
    """(highest resident bytes, predicted bytes) of one engine."""
    kv_cache = load(runtime).capabilities.kv_cache_for("q8_0")
    spec = EngineSpec(
        runtime,
        path,
        context_tokens=context,
        slots=slots,
        kv_cache=kv_cache,
        batch_tokens=64,
        ubatch_tokens=64,
        repack=False,
    )
    async with open_engine(spec) as engine:
        facts = await engine.properties()
        prompts = [
            [
                100 + (7919 * (slot + 1) + 31 * i) % (facts.vocab_tokens // 2)
                for i in range(min(context - 40, 300))
            ]
            for slot in range(slots)
        ]
        async with engine_client(engine.socket_path) as client:
            await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions",
                        json={"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True},
                    )
                    for prompt in prompts
                )
            )
        shape = shape_of(path, facts)
        # llama.cpp's resident size counts pages that are mapped twice, twice
        mapped = runtime == "llama.cpp"
        taken = engine.private_bytes() + shape.weights_bytes if mapped else engine.peak_rss_bytes()
        serving = Serving(context, "q8_0", slots, 64)
        return taken, memory_needed(shape, serving, runtime).total_bytes


def main() -> None:
    asked = [one.partition("=") for one in sys.argv[1:]]
    models = [(runtime, Path(path)) for runtime, _, path in asked]
    if not models:
        models = [("llama.cpp", small_model())]
    results = []
    for runtime, path in models:
        for context, slots in SETTINGS:
            try:
                taken, predicted = asyncio.run(measure(runtime, path, context, slots))
            except Exception as error:
                print(f"{runtime} {context} x {slots}: {error}", file=sys.stderr)
                continue
            ratio = predicted / taken
            print(
                f"{runtime:20} {context:5} x {slots}: took {taken >> 20} MiB, predicted {predicted >> 20} ({ratio:.2f})"
            )
            results.append(
                {
                    "case": f"{runtime} {path.parent.name} {context} tokens x {slots}",
                    "ours": predicted,
                    "peer": taken,
                    "peer_name": "measured",
                    "unit": "bytes",
                    "ratio": round(ratio, 3),
                    "promise": f"0.98 to {MOST_RATIO}",
                    "holds": 0.98 <= ratio <= MOST_RATIO,
                }
            )
    print(json.dumps({"bench": "memory", "results": results}))


if __name__ == "__main__":
    main()
