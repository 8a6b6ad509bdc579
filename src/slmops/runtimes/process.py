"""One engine child: spawn, watch, ask, stop. Shared by every runtime whose child keeps our two-socket form.

The child's sockets: `engine.sock` (OpenAI surface, plus `/tokenize`, `/detokenize`, `/apply-template`) and
`score.sock` (`POST /score`, `GET /properties`). Configuration goes to the child as one JSON line on its
stdin, which then stays open for as long as the parent lives (see `child.settle`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx

from slmops.core.errors import HealthCheckError, NoMemoryError, RuntimeLoadError, UsageError
from slmops.runtimes.child import EXIT_LOAD_FAILED
from slmops.runtimes.connect import engine_client
from slmops.runtimes.limits import AppliedLimits
from slmops.runtimes.ports import AppliedLimit, EngineProperties, EngineSpec, Message, Score

_LOG_LINES = 60
_POLL_S = 0.02
_CONNECT_S = 1.0
_DEATH_S = 0.5
_SOCKET_PATH_BYTES = 107  # sun_path, less its NUL
_MEMORY_WORDS = (
    "bad_alloc",
    "cannot allocate memory",
    "failed to allocate",
    "out of memory",
    "resource temporarily unavailable",  # a thread's stack did not fit
    "unable to allocate",
)
#: Variables that would change an engine behind the assignment's back.
_REFUSED_ENVIRONMENT = ("LLAMA_", "GGML_", "AIP_", "OMP_", "GOMP_", "KMP_", "MTMD_", "HF_")


@dataclass(frozen=True)
class Sockets:
    """Where a child listens; `made` is a folder to remove, when the workdir's path is too long."""

    engine: Path
    score: Path
    made: Path | None

    @classmethod
    def within(cls, workdir: Path) -> Sockets:
        """Choose paths that fit in `sun_path`, and clear what an earlier engine left there."""
        made = None
        if len(os.fsencode(workdir / "engine.sock")) > _SOCKET_PATH_BYTES:
            made = workdir = Path(tempfile.mkdtemp(prefix="slmops-"))
        sockets = cls(workdir / "engine.sock", workdir / "score.sock", made)
        sockets.unlink()
        return sockets

    def unlink(self) -> None:
        """Remove the sockets' files."""
        for path in (self.engine, self.score):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def remove(self) -> None:
        """Remove everything that was made."""
        self.unlink()
        if self.made:
            shutil.rmtree(self.made, ignore_errors=True)


_Process = TypeVar("_Process", bound="EngineProcess")


class EngineProcess:
    """The `Engine` over a child process. Make it with `spawn`."""

    def __init__(
        self, spec: EngineSpec, process: subprocess.Popen[bytes], sockets: Sockets, limits: AppliedLimits
    ) -> None:
        self._spec = spec
        self._process = process
        self._sockets = sockets
        self._limits = limits
        self._lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._clients: dict[Path, httpx.AsyncClient] = {}
        self._peak_rss_bytes = 0
        self._properties: EngineProperties | None = None
        assert process.stdout is not None
        self._drain = threading.Thread(
            target=self._read_log, args=(process.stdout,), daemon=True, name="engine-log"
        )
        self._drain.start()

    @classmethod
    def spawn(  # noqa: PLR0913 - what a child is made of
        cls: type[_Process],
        module: str,
        spec: EngineSpec,
        workdir: Path,
        limits: AppliedLimits,
        *,
        environment: Mapping[str, str],
        extra: Mapping[str, object] | None = None,
        sockets: Sockets | None = None,
        python: str = sys.executable,
    ) -> _Process:
        """Start `python -m module` and hand it its configuration.

        Args:
            module: the child's module; reads `ChildConfig` by `read_config`.
            spec: what to load.
            workdir: existing folder.
            limits: made by `limits.prepare`.
            environment: variables to set besides the inherited ones.
            extra: more configuration for this runtime's child.
            sockets: where to listen, when the caller had to know before.
            python: interpreter; another environment's where the binding is installed there.

        Raises:
            RuntimeLoadError: `workdir` or the model file does not exist.
        """
        if not workdir.is_dir() or not spec.model_path.is_file():
            limits.remove()
            missing = spec.model_path if workdir.is_dir() else workdir
            raise RuntimeLoadError(
                f"{str(missing)!r} does not exist", hint="check the path", path=str(missing)
            )
        sockets = sockets or Sockets.within(workdir)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_REFUSED_ENVIRONMENT)}
        process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=kept | dict(environment),
            start_new_session=True,
        )
        config = {
            "parent_pid": os.getpid(),
            "die_with_thread": threading.current_thread() is threading.main_thread(),
            "limits": asdict(limits.child),
            "sockets": {"engine": str(sockets.engine), "score": str(sockets.score)},
            "spec": asdict(spec) | {"max_requests": spec.max_requests},
            **(extra or {}),
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait_ready says why
            process.stdin.write(json.dumps(config, default=str).encode() + b"\n")
            process.stdin.flush()
        return cls(spec, process, sockets, limits)

    # --- facts about the process

    @property
    def spec(self) -> EngineSpec:
        """See `Engine`."""
        return self._spec

    @property
    def socket_path(self) -> Path:
        """See `Engine`."""
        return self._sockets.engine

    @property
    def pid(self) -> int:
        """See `Engine`."""
        return self._process.pid

    @property
    def limits_applied(self) -> tuple[AppliedLimit, ...]:
        """See `Engine`."""
        return self._limits.reports

    def alive(self) -> bool:
        """See `Engine`."""
        return self._process.poll() is None

    def exit_code(self) -> int | None:
        """See `Engine`."""
        return self._process.poll()

    def log_tail(self) -> str:
        """See `Engine`."""
        if not self.alive():
            self._drain.join(timeout=1.0)
        return "\n".join(self._lines)

    def rss_bytes(self) -> int:
        """See `Engine`."""
        return status_bytes(self.pid, "VmRSS")

    def peak_rss_bytes(self) -> int:
        """See `Engine`."""
        self._peak_rss_bytes = max(self._peak_rss_bytes, status_bytes(self.pid, "VmHWM"))
        return self._peak_rss_bytes

    def private_bytes(self) -> int:
        """See `Engine`."""
        return status_bytes(self.pid, "RssAnon")

    def cpu_s(self) -> float:
        """See `Engine`."""
        return cpu_s(self.pid)

    def _read_log(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.append(line.decode("utf-8", "replace").rstrip())

    # --- life

    async def wait_ready(self, timeout_s: float) -> None:
        """See `Engine`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            if not self.alive():
                raise self._death("while loading")
            with contextlib.suppress(httpx.HTTPError):
                response = await self._client(self._sockets.engine).get("/health", timeout=5.0)
                if response.status_code == httpx.codes.OK and self._scores_open():
                    self.peak_rss_bytes()
                    return
            if loop.time() >= deadline:
                raise HealthCheckError(
                    f"engine for {self._spec.model_path.name!r} not ready within {timeout_s:g} s",
                    hint="raise the timeout, or see the engine's log",
                    log_tail=self.log_tail(),
                )
            await asyncio.sleep(_POLL_S)

    async def healthy(self, timeout_s: float) -> bool:
        """See `Engine`."""
        try:
            response = await self._client(self._sockets.engine).get("/health", timeout=timeout_s)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    def _scores_open(self) -> bool:
        """Whether the second socket listens: a child may open it after the first is healthy, and be asked there next."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)
            try:
                probe.connect(str(self._sockets.score))
            except OSError:
                return False
        return True

    async def stop(self, grace_s: float = 5.0) -> None:
        """See `Engine`."""
        self.peak_rss_bytes()
        for client in self._clients.values():
            with contextlib.suppress(RuntimeError):  # its event loop is gone already
                await client.aclose()
        self._clients.clear()
        if self.alive():
            self._process.terminate()
            loop = asyncio.get_running_loop()
            deadline = loop.time() + grace_s
            while self.alive() and loop.time() < deadline:
                await asyncio.sleep(_POLL_S / 4)
            if self.alive():
                self._process.kill()
        await asyncio.to_thread(self._process.wait)
        await asyncio.to_thread(self._drain.join)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._limits.remove()
        self._sockets.remove()

    async def _died_within(self, timeout_s: float) -> bool:
        """A broken connection is seen a little before the death that broke it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.alive() and loop.time() < deadline:
            await asyncio.sleep(_POLL_S / 4)
        return not self.alive()

    def _death(self, when: str) -> RuntimeLoadError | NoMemoryError:
        code = self._process.poll()
        tail = self.log_tail()
        name = self._spec.model_path.name
        facts = {"exit_code": code, "log_tail": tail, "path": str(self._spec.model_path)}
        killed = self._limits.oom_kills() > 0
        reason = "the kernel killed it at its memory limit" if killed else _reason(tail)
        if killed or any(word in tail.lower() for word in _MEMORY_WORDS):
            return NoMemoryError(
                f"engine for {name!r} ran out of memory {when}: {reason}",
                hint="use fewer context tokens or slots, a smaller kv_cache type, or raise the memory limit",
                **facts,
            )
        how = "refused the model" if code == EXIT_LOAD_FAILED else f"died {when} with exit status {code}"
        return RuntimeLoadError(
            f"engine for {name!r} {how}: {reason}",
            hint="check the file's digest, format and architecture; log_tail has the engine's last lines",
            **facts,
        )

    # --- questions

    def _client(self, path: Path) -> httpx.AsyncClient:
        if path not in self._clients:
            self._clients[path] = engine_client(path)
        return self._clients[path]

    async def _ask(self, where: Path, path: str, body: object = None) -> Any:
        try:
            client = self._client(where)
            response = await (client.get(path) if body is None else client.post(path, json=body))
        except httpx.HTTPError as error:
            if await self._died_within(_DEATH_S):
                raise self._death(f"in {path}") from error
            raise HealthCheckError(
                f"engine did not answer {path}: {type(error).__name__}", hint="restart the engine"
            ) from error
        if response.is_success:
            return response.json()
        problem = _problem(response)
        if response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
            raise UsageError(f"engine: {problem}", hint="see the message", status=response.status_code)
        raise HealthCheckError(f"engine: {problem}", hint="restart the engine", status=response.status_code)

    async def properties(self) -> EngineProperties:
        """See `Engine`."""
        if self._properties is None:
            facts = await self._ask(self._sockets.score, "/properties")
            self._properties = EngineProperties(**facts)
        return self._properties

    async def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """See `Engine`."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = (await self._ask(self._sockets.engine, "/tokenize", body))["tokens"]
        return tokens

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """See `Engine`."""
        answer = await self._ask(self._sockets.engine, "/detokenize", {"tokens": list(token_ids)})
        return str(answer["content"])

    async def apply_template(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """See `Engine`."""
        body: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        prompt = (await self._ask(self._sockets.engine, "/apply-template", body))["prompt"]
        return await self.tokenize(prompt, add_special=True)

    async def score(self, token_ids: Sequence[int], *, start: int = 1, top_k: int = 0) -> Score:
        """See `Engine`."""
        body = {"token_ids": list(token_ids), "start": start, "top_k": top_k}
        answer = await self._ask(self._sockets.score, "/score", body)
        return Score(
            answer["start"],
            tuple(answer["logprobs"]),
            tuple(answer["greedy_ids"]),
            tuple(answer["greedy_logprobs"]),
            tuple(tuple((int(token), float(value)) for token, value in row) for row in answer["top"]),
        )

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """See `Engine`."""
        if not self._spec.embeddings:
            raise UsageError("this engine serves no embeddings", hint="start it with embeddings=True")
        answer = await self._ask(self._sockets.engine, "/v1/embeddings", {"input": list(texts)})
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return [row["embedding"] for row in rows]


def cpu_s(pid: int) -> float:
    """CPU time of a process, user and system; 0.0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_bytes(pid: int, name: str) -> int:
    """A memory line of /proc/PID/status, such as VmRSS; 0 when the process is gone."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _problem(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{response.status_code} {error['type']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:200]}"


def _reason(tail: str) -> str:
    """The log line that most likely says why: the last that names an error, else the last."""
    lines = [line for line in tail.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (named or lines or ["it wrote nothing"])[0 if named else -1].strip()
