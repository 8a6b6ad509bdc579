"""The ExecuTorch runtime: a ``.pte`` with its KV cache inside, in the common child. Imports neither binding nor torch."""

from __future__ import annotations

from typing import ClassVar

from slmops.runtimes.token_loop.adapter import TokenLoopRuntime
from slmops.runtimes.token_loop.capabilities import token_loop_capabilities


class ExecutorchRuntime(TokenLoopRuntime):
    """Programs exported with ``use_kv_cache``.

    The KV cache is part of the loaded program and the delegate's packed weights are too, so one program is one
    sequence: requests are served one at a time.
    """

    name = "executorch"
    formats = frozenset({"pte"})
    distribution = "executorch"
    child_module = "slmops.runtimes.executorch.engine"
    model_suffix = ".pte"
    capabilities = token_loop_capabilities(kv_cache_types={"f32"}, max_slots=1)
    # MKL's sums depend on where a buffer happens to lie, unless it is told not to: measured, 1e-6 between equal calls
    environment: ClassVar[dict[str, str]] = {"MKL_CBWR": "AUTO,STRICT"}
