"""The runtimes `litert` (``.tflite``) and `litert-lm` (``.litertlm``): LiteRT's kernels in the common child. Imports no binding.

Both formats hold the same program, made by litert-torch: a signature for a piece of a prompt, one for a token. Google's
own engine for ``.litertlm`` (``litert-lm-api`` 0.18.1) is not used: by its Python interface it generates from text to text,
without the logits that golden packs, sampling and grammars here rest on, and is reported to put a BOS of its own before
prompts whose template has one already (its ``run_text_scoring`` was not tried). The program inside the file is run
directly; what an answer is made of is ours.
"""

from __future__ import annotations

from slmops.runtimes.token_loop.adapter import TokenLoopRuntime
from slmops.runtimes.token_loop.capabilities import token_loop_capabilities


class LitertRuntime(TokenLoopRuntime):
    """Programs exported by ``litert-torch export_hf`` with a KV cache; sequences share the weights."""

    name = "litert"
    formats = frozenset({"tflite"})
    distribution = "ai-edge-litert"
    child_module = "slmops.runtimes.litert.engine"
    model_suffix = ".tflite"
    # the export decides; litert-torch 0.10 writes float32 caches
    capabilities = token_loop_capabilities(kv_cache_types={"f32"})


class LitertLmRuntime(LitertRuntime):
    """The same program inside LiteRT-LM's container."""

    name = "litert-lm"
    formats = frozenset({"litertlm"})
    model_suffix = ".litertlm"
