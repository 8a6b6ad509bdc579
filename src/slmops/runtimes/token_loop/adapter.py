"""The parent's side of a runtime of the common child. Imports neither a binding nor numpy."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slmops.core.errors import UsageError
from slmops.runtimes import environments
from slmops.runtimes import limits as engine_limits
from slmops.runtimes.ports import Capabilities, EngineLimits, EngineSpec
from slmops.runtimes.process import EngineProcess

#: What the child needs besides the binding, whose absence is told by name before anything is spawned.
_COMMON = ("numpy", "tokenizers", "jinja2", "llguidance")

#: Threads that wait must sleep, not spin; the tokenizer library must not start threads of its own.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class TokenLoopRuntime:
    """Base of such a runtime: a subclass says what it is called; see `slmops.runtimes.ports.Runtime`.

    Attributes:
        name, formats, capabilities: see the port.
        distribution: package of the binding.
        child_module: its engine module.
        model_suffix: how the file that `EngineSpec.model_path` names must end.
        environment: variables for the child besides the common ones.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    capabilities: ClassVar[Capabilities]
    distribution: ClassVar[str]
    child_module: ClassVar[str]
    model_suffix: ClassVar[str]
    environment: ClassVar[dict[str, str]] = {}

    def version(self) -> str:
        """Version of the binding, wherever it is installed."""
        return self._place().version

    def _place(self) -> environments.Place:
        return environments.find(self.name, (self.distribution, *_COMMON))

    async def start(
        self, spec: EngineSpec, workdir: Path, limits: EngineLimits | None = None
    ) -> EngineProcess:
        """Spawn the child; see `Runtime.start`."""
        self._check(spec)
        applied = engine_limits.prepare(limits)
        environment = _ENVIRONMENT | self.environment | {"OMP_NUM_THREADS": str(spec.threads)}
        place = self._place()
        return EngineProcess.spawn(
            self.child_module,
            spec,
            workdir,
            applied,
            environment=environment,
            extra={"runtime_version": place.version},
            python=place.python,
        )

    def _check(self, spec: EngineSpec) -> None:
        can = self.capabilities
        if spec.kv_cache not in can.kv_cache_types:
            raise UsageError(
                f"{self.name}: kv_cache: expected one of {', '.join(sorted(can.kv_cache_types))}, got {spec.kv_cache!r}",
                hint="the exported file decides the type of its KV cache",
            )
        if spec.adapters:
            raise UsageError(
                f"{self.name}: adapters are not supported", hint="merge the adapter and export again"
            )
        if spec.embeddings:
            raise UsageError(
                f"{self.name}: embeddings are not supported", hint="start it with embeddings=False"
            )
        for name in ("context_tokens", "slots", "threads", "batch_tokens", "ubatch_tokens"):
            if (value := getattr(spec, name)) < 1:
                raise UsageError(f"{name}: expected at least 1, got {value}", hint=f"set {name} to 1 or more")
        if spec.model_path.is_file() and not spec.model_path.name.endswith(self.model_suffix):
            raise UsageError(
                f"{self.name}: expected a file that ends in {self.model_suffix!r}, got {spec.model_path.name!r}",
                hint="give the variant's artifact of role model",
            )
