"""The runtime `external`: GGUF models by the device owner's own server."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path

from slmops.core.errors import NoMemoryError, RuntimeLoadError, UsageError
from slmops.runtimes import limits as engine_limits
from slmops.runtimes.child import EXIT_LOAD_FAILED
from slmops.runtimes.external.config import ExternalConfig, configured
from slmops.runtimes.external.upstream import descendants, free_port
from slmops.runtimes.llama_cpp.native import check_gguf
from slmops.runtimes.ports import Capabilities, EngineLimits, EngineSpec
from slmops.runtimes.process import EngineProcess, Sockets, cpu_s, status_bytes

CHILD_MODULE = "slmops.runtimes.external.supervisor"
_SERVER_SOCKET = "server.sock"  # llama-server takes a host for a socket when it ends like this
_TEMPLATE_FILE = "chat_template.jinja"
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "MALLOC_ARENA_MAX": "2"}


class ExternalEngine(EngineProcess):
    """One server with its supervisor: memory and CPU time are those of both and of all that they started."""

    config: ExternalConfig
    made: tuple[Path, ...] = ()
    _peak_tree_bytes = 0

    def rss_bytes(self) -> int:
        """See `Engine`; memory that the processes share is counted more than once."""
        return self._sum("VmRSS")

    def peak_rss_bytes(self) -> int:
        """See `Engine`."""
        self._peak_tree_bytes = max(self._peak_tree_bytes, self._sum("VmHWM"))
        return self._peak_tree_bytes

    def private_bytes(self) -> int:
        """See `Engine`. Memory of an accelerator is not in it."""
        return self._sum("RssAnon")

    def cpu_s(self) -> float:
        """See `Engine`."""
        return sum(cpu_s(pid) for pid in self._pids())

    def _sum(self, name: str) -> int:
        return sum(status_bytes(pid, name) for pid in self._pids())

    def _pids(self) -> list[int]:
        return descendants(self.pid) if self.alive() else []

    async def wait_ready(self, timeout_s: float) -> None:
        """See `Engine`. The owner's `start_timeout_s` holds where it is longer."""
        await super().wait_ready(max(timeout_s, self.config.start_timeout_s + 10.0))

    async def stop(self, grace_s: float = 5.0) -> None:
        """See `Engine`."""
        await super().stop(grace_s)
        for path in self.made:
            with contextlib.suppress(OSError):
                path.unlink()

    def _death(self, when: str) -> RuntimeLoadError | NoMemoryError:
        death = super()._death(when)
        if isinstance(death, NoMemoryError) or self.exit_code() != EXIT_LOAD_FAILED:
            return death
        lines = [line for line in self.log_tail().splitlines() if line.startswith("error: ")]
        why = lines[-1].removeprefix("error: ") if lines else death.message
        return RuntimeLoadError(
            f"external server for {self.spec.model_path.name!r}: {why}",
            hint="see external.json of this device, and docs/howto/bring-your-own-server.md; log_tail has its last lines",
            **death.fields,
        )


class ExternalRuntime:
    """See the module and `slmops.runtimes.ports.Runtime`."""

    name = "external"
    formats = frozenset({"gguf"})

    @cached_property
    def config(self) -> ExternalConfig:
        """The device's configuration, read when it is first needed.

        Raises:
            RuntimeLoadError, UsageError: see `configured`.
        """
        return configured()

    @property
    def capabilities(self) -> Capabilities:
        """What the configuration declares."""
        return self.config.capabilities()

    def version(self) -> str:
        """Name and digest of the server's program."""
        return self.config.version()

    async def start(
        self, spec: EngineSpec, workdir: Path, limits: EngineLimits | None = None
    ) -> ExternalEngine:
        """Spawn the supervisor; see `Runtime.start`."""
        config = self.config
        self._check(spec)
        check_gguf(spec.model_path)
        sockets = Sockets.within(workdir)
        folder = sockets.engine.parent
        server_socket = folder / _SERVER_SOCKET if config.uses_socket else None
        template = folder / _TEMPLATE_FILE if spec.chat_template is not None else None
        port = 0 if config.uses_socket else free_port()
        values = {
            "model": str(spec.model_path.absolute()),
            "model_name": spec.model_alias or spec.model_path.stem,
            "context_tokens": str(spec.context_tokens),
            "total_context_tokens": str(spec.context_tokens * spec.slots),
            "slots": str(spec.slots),
            "max_requests": str(spec.max_requests + 4),
            "threads": str(spec.threads),
            "kv_cache": spec.kv_cache,
            "batch_tokens": str(spec.batch_tokens),
            "ubatch_tokens": str(min(spec.ubatch_tokens, spec.batch_tokens)),
            "port": str(port),
            "socket": str(server_socket or ""),
            "chat_template_file": str(template or ""),
        }
        try:
            arguments = config.arguments(spec, values)
        except UsageError:
            sockets.remove()
            raise
        made = tuple(path for path in (server_socket, template) if path is not None)
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        if template is not None:
            template.write_text(spec.chat_template or "", encoding="utf-8")
        engine = ExternalEngine.spawn(
            CHILD_MODULE,
            spec,
            workdir,
            engine_limits.prepare(limits),
            environment=_ENVIRONMENT,
            extra={
                "arguments": arguments,
                "env": config.env,
                "like": config.like,
                "port": port,
                "server_socket": str(server_socket or ""),
                "health_path": config.health_path,
                "start_timeout_s": config.start_timeout_s,
                "hang_timeout_s": config.hang_timeout_s,
                "keep_log": config.keep_log,
                "runtime_version": self.version(),
            },
            sockets=sockets,
        )
        engine.config, engine.made = config, made
        return engine

    def _check(self, spec: EngineSpec) -> None:
        declared = self.capabilities
        if spec.kv_cache not in declared.kv_cache_types:
            raise UsageError(
                f"kv_cache: expected one of {', '.join(sorted(declared.kv_cache_types))}, got {spec.kv_cache!r}",
                hint="put {kv_cache} into `command` of external.json, and kv_cache_types if it is no llama-server",
            )
        if spec.adapters:
            raise UsageError("an external server takes no adapters", hint="merge the adapter into the model")
        if spec.embeddings and not declared.embeddings:
            raise UsageError(
                "this external server declares no embeddings",
                hint='add {"when": {"embeddings": [...]}} to external.json',
            )
        if spec.chat_template is not None and not self.config.when.chat_template:
            raise UsageError(
                "the release brings a chat template, which this external server cannot be given",
                hint='add {"when": {"chat_template": ["--chat-template-file", "{chat_template_file}"]}} to external.json',
            )
        for name in ("context_tokens", "slots", "threads", "batch_tokens", "ubatch_tokens"):
            if (value := getattr(spec, name)) < 1:
                raise UsageError(f"{name}: expected at least 1, got {value}", hint=f"set {name} to 1 or more")
