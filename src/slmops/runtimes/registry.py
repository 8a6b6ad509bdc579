"""Runtimes by name, imported when they are asked for.

A name is one of three things, tried in this order:

1. a built-in name (`BUILT_IN`),
2. `module:attribute`, such as ``slmops.testing.engine:FakeRuntime``,
3. the name of an entry point in the group ``slmops.runtimes``.

Each leads to a class without arguments that keeps the port `slmops.runtimes.ports.Runtime`.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

from slmops.core.errors import NotFoundError, RuntimeLoadError
from slmops.runtimes.ports import Engine, EngineLimits, EngineSpec, Runtime

ENTRY_POINT_GROUP = "slmops.runtimes"

BUILT_IN: dict[str, str] = {
    "executorch": "slmops.runtimes.executorch.adapter:ExecutorchRuntime",
    "external": "slmops.runtimes.external.adapter:ExternalRuntime",
    "litert": "slmops.runtimes.litert.adapter:LitertRuntime",
    "litert-lm": "slmops.runtimes.litert.adapter:LitertLmRuntime",
    "llama.cpp": "slmops.runtimes.llama_cpp.adapter:LlamaCppRuntime",
    "onnxruntime-genai": "slmops.runtimes.onnxruntime_genai.adapter:OnnxRuntimeGenaiRuntime",
}

#: Runtimes whose capabilities each device's owner declares; those of all others are known without a device.
DECLARED_BY_OWNER = frozenset({"external"})

#: Built-in name to the extra that installs its binding.
EXTRAS: dict[str, str] = {
    "executorch": "executorch",
    "litert": "litert",
    "litert-lm": "litert-lm",
    "llama.cpp": "llama-cpp",
    "onnxruntime-genai": "onnxruntime-genai",
}

#: What people ask for and slmops does not serve, and why.
NOT_SERVED: dict[str, str] = {
    "pytorch-mobile": "it is exported and proved for applications that have it, and not served: its lite interpreter keeps no "
    "KV cache, and its successor is executorch",
    "openvino": "it is not built here: see docs/adr/0016-exports-and-parity.md; onnxruntime-genai serves x86",
}


def names() -> list[str]:
    """Names that `load` knows without a colon: built-in ones and those of entry points."""
    return sorted({*BUILT_IN, *(point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))})


def load(name: str) -> Runtime:
    """Load a runtime by name. Imports its adapter, never its binding.

    Raises:
        NotFoundError: no such runtime, or `module:attribute` does not lead to one.
        RuntimeLoadError: the runtime is known but its binding is not installed.
    """
    runtime = load_unchecked(name)
    try:
        runtime.version()
    except metadata.PackageNotFoundError as error:
        extra = EXTRAS.get(name)
        hint = f'pip install "slmops[{extra}]"' if extra else f"install what {name!r} needs"
        raise RuntimeLoadError(
            f"runtime {name!r} needs {error.name!r}, which is not installed", hint=hint, runtime=name
        ) from error
    return runtime


def load_unchecked(name: str) -> Runtime:
    """As `load`, whether its binding is installed or not: for what it declares.

    Raises:
        NotFoundError: no such runtime, or `module:attribute` does not lead to one.
    """
    target = BUILT_IN.get(name) or (name if ":" in name else _entry_point(name))
    module_name, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise NotFoundError(
            f"runtime {name!r} could not be imported from {target!r}: {error}",
            hint="use module:attribute of a class that is a slmops.runtimes.Runtime",
            runtime=name,
        ) from error
    runtime = factory()
    if not isinstance(runtime, Runtime):
        raise NotFoundError(
            f"runtime {name!r}: expected a slmops.runtimes.Runtime, got {type(runtime).__name__}",
            hint="use module:attribute of a class that is a slmops.runtimes.Runtime",
            runtime=name,
        )
    return runtime


def _entry_point(name: str) -> str:
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.value
    if name in NOT_SERVED:
        raise NotFoundError(
            f"no engine serves runtime {name!r}: {NOT_SERVED[name]}",
            hint=f"served are {', '.join(names())}",
            runtime=name,
        )
    raise NotFoundError(
        f"unknown runtime {name!r}: known are {', '.join(names())}",
        hint="check the spelling, or give module:attribute",
        runtime=name,
    )


@asynccontextmanager
async def open_engine(
    spec: EngineSpec,
    *,
    workdir: Path | None = None,
    limits: EngineLimits | None = None,
    timeout_s: float = 120.0,
) -> AsyncIterator[Engine]:
    """Start an engine, wait until it is ready, stop it at the end, whatever happens in between.

    Args:
        spec: what to load.
        workdir: existing folder for sockets and log; a temporary one that is removed afterwards when None.
        limits: what the child may use.
        timeout_s: for loading.
    """
    made = None if workdir else Path(tempfile.mkdtemp(prefix="slmops-engine-"))
    folder = workdir or made
    assert folder is not None
    try:
        engine = await load(spec.runtime).start(spec, folder, limits)
        try:
            await engine.wait_ready(timeout_s)
            yield engine
        finally:
            await engine.stop()
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)
