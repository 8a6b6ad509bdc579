"""The onnxruntime-genai runtime: a folder with ``genai_config.json`` in the common child. Imports no binding."""

from __future__ import annotations

from slmops.runtimes.token_loop.adapter import TokenLoopRuntime
from slmops.runtimes.token_loop.capabilities import token_loop_capabilities


class OnnxRuntimeGenaiRuntime(TokenLoopRuntime):
    """Models exported by onnxruntime-genai's builder; sequences share the weights, so slots are as many as memory holds."""

    name = "onnxruntime-genai"
    formats = frozenset({"onnx"})
    distribution = "onnxruntime-genai"
    child_module = "slmops.runtimes.onnxruntime_genai.engine"
    model_suffix = "genai_config.json"
    # the CPU export keeps keys and values in the type of its activations
    capabilities = token_loop_capabilities(kv_cache_types={"f32"})
