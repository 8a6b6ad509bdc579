"""Our side of the toolchain protocol: one subprocess, limits on its memory and time, its log kept.

What it says on stdout is JSON lines (``tools/tool_protocol.py``); everything else that it and its libraries write is the
log, whose end is shown when it fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.core.errors import BuildError, DeadlineError, NoMemoryError, UsageError
from slmops.runtimes.limits import prepare
from slmops.runtimes.ports import EngineLimits

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOOLS = Path(__file__).parent / "tools"
#: what the scripts import; each is part of every script's digest
SHARED = ("error_feedback", "stepwise", "tokenizer_file", "tool_protocol")
_TAIL_BYTES = 4000
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # nothing is fetched while exporting: what is not in the request does not count
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Unable(Exception):
    """The engine's binding cannot do this; the caller decides what that means."""


class ToolProcess:
    """One running tool. A context manager; leaving it kills what still runs.

    Args:
        interpreter: of the toolchain.
        tool: script's name under ``tools/``.
        request: JSON; ``op`` is ``export`` or ``session``.
        log: file that the log is written to.
        memory_bytes: most that it may use; None for no limit.
        limit_s: seconds after which it is killed.
    """

    def __init__(
        self,
        interpreter: Path,
        tool: str,
        request: Mapping[str, Any],
        log: Path,
        *,
        memory_bytes: int | None,
        limit_s: float,
    ) -> None:
        self.tool, self.log, self.limit_s, self.memory_bytes = tool, log, limit_s, memory_bytes
        self._scratch = tempfile.TemporaryDirectory(prefix="slmops-tool-")
        self._limits = prepare(EngineLimits(memory_bytes=memory_bytes))
        child = self._limits.child
        told = {
            **request,
            "limits": {"cgroup_procs": child.cgroup_procs, "private_bytes": child.private_bytes},
        }
        path = Path(self._scratch.name) / "request.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in _OURS} | _ENVIRONMENT
        self._began_s = time.monotonic()
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(interpreter), str(TOOLS / f"{tool}.py"), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                cwd=self._scratch.name,
                env=environment,
            )
        self._events: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name=f"tool {tool}").start()

    def result(self, progress: Callable[[float | None, str], None] = lambda ratio, note: None) -> Any:
        """Wait for the next result, passing progress on.

        Raises:
            Unable: the binding cannot do what was asked.
            DeadlineError: the time limit; NoMemoryError: the memory limit; BuildError: it failed or died.
        """
        while True:
            left_s = self.limit_s - (time.monotonic() - self._began_s)
            try:
                line = self._events.get(timeout=max(left_s, 0.0))
            except queue.Empty:
                self.close()
                raise DeadlineError(
                    f"{self.tool}: not done after {self.limit_s:.0f} s",
                    hint="build again on a faster or idler machine; finished steps are cached",
                    log=self.tail(),
                ) from None
            if line is None:
                raise self._died()
            event: dict[str, Any] = json.loads(line)
            if "error" in event:
                raise self._error(event["error"])
            if "value" in event:
                return event["value"]
            progress(event.get("ratio"), event.get("note", ""))

    def ask(self, **asked: Any) -> Any:
        """Ask a session one thing.

        Raises:
            as :meth:`result`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self.result()

    def logits(self, token_ids: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Logits at every position from ``first`` on, shape (n - first, vocabulary)."""
        path = Path(self._scratch.name) / "logits.bin"
        shape = self.ask(op="logits", token_ids=list(token_ids), first=first, file=str(path))
        rows: NDArray[np.float32] = np.fromfile(path, dtype=np.float32).reshape(shape)
        return rows

    def tail(self) -> str:
        """The end of the log."""
        with self.log.open("rb") as source:
            source.seek(max(source.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return source.read().decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Kill what still runs; safe to repeat."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._limits.remove()
        self._scratch.cleanup()

    def __enter__(self) -> ToolProcess:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed while reading
            for line in self._process.stdout:
                self._events.put(line)
        self._events.put(None)

    def _error(self, told: Mapping[str, Any]) -> Exception:
        kind, message = str(told["kind"]), str(told["message"])
        if kind == "unable":
            return Unable(message)
        if kind == "refused":
            return UsageError(f"{self.tool}: {message}", hint="see the message")
        if kind == "MemoryError" or "DefaultCPUAllocator" in message:
            return self._no_memory()
        return BuildError(
            f"{self.tool}: {kind}: {message}", hint="the log's end follows", log=self.tail(), tool=self.tool
        )

    def _died(self) -> Exception:
        code = self._process.wait()
        if self._limits.oom_kills():
            return self._no_memory()
        tail = self.tail()
        return BuildError(
            f"{self.tool}: ended with exit status {code} and no result: {tail[-800:] or 'it wrote nothing'}",
            hint="if it was killed for memory, free some or build elsewhere; finished steps are cached",
            log=tail,
            exit_code=code,
        )

    def _no_memory(self) -> NoMemoryError:
        limit = f"{(self.memory_bytes or 0) >> 20} MB" if self.memory_bytes else "what the machine has"
        return NoMemoryError(
            f"{self.tool}: needs more memory than {limit}",
            hint="build on a machine with more memory; an exporter holds the model in float32 some six times",
        )


def digest_of_tool(tool: str) -> str:
    """Digest of a script and of what the scripts share: a step that runs it depends on these and on no other script."""
    digest = hashlib.sha256()
    for name in (tool, *SHARED):
        digest.update(name.encode() + b"\0" + (TOOLS / f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()


def memory_limit() -> int | None:
    """Bytes that a tool may use here: nine tenths of the machine's memory, so that a runaway export kills itself only."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10
    except (OSError, ValueError):
        return None
