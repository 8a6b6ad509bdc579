"""The child process around the user's server: start it, prove it, relay to it, watch it, end it.

`python -m slmops.runtimes.external.supervisor`, started by `adapter` with its configuration on stdin. The server runs
in a process group of its own below it, within the same limits. What it writes is kept until it is ready (for errors)
and thrown away afterwards, unless its owner declares that it writes no prompts.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from slmops.core.errors import SlmopsError, UsageError
from slmops.runtimes.child import EXIT_LOAD_FAILED, ChildConfig, begin
from slmops.runtimes.external.guard import Guard
from slmops.runtimes.external.proof import NotAsDeclared, Proof, read_layout
from slmops.runtimes.external.relay import Relay
from slmops.runtimes.external.scoring import Scorer
from slmops.runtimes.external.upstream import Address, Upstream, descendants
from slmops.runtimes.unix_http import Request, Response, UnixHttpServer, error_response

#: Exit status when the server died or hung after it had been ready.
EXIT_SERVER_LOST = 5
_POLL_S = 0.05
_STOP_GRACE_S = 3.0
_LINES = 40
_LINE_CHARACTERS = 400
_OPENAI_ROUTES = frozenset(
    {
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("GET", "/metrics"),
    }
)
_LLAMA_ROUTES = frozenset({("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/apply-template")})


def main() -> int:
    """Serve until killed, or until the server is lost."""
    config = begin()
    guard = Guard()
    return asyncio.run(Supervisor(config, guard).run())


class Supervisor:
    """One server's life."""

    def __init__(self, config: ChildConfig, guard: Guard) -> None:
        self._spec = config.spec
        self._extra: dict[str, Any] = config.extra
        self._sockets = (config.engine_socket, config.score_socket)
        self._guard = guard
        path = self._extra["server_socket"]
        address = Address(int(self._extra["port"]), Path(path) if path else None)
        self._api_key = secrets.token_hex(24)
        self._upstream = Upstream(address, self._api_key)
        self._relay = Relay(address, self._api_key, self._refusal)
        self._relay.health_path = self._extra["health_path"]
        self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._service: Service | None = None

    @property
    def _program(self) -> str:
        return repr(Path(self._extra["arguments"][0]).name)

    async def run(self) -> int:
        """Everything, in order; gives the exit status."""
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        ended = asyncio.ensure_future(stop.wait())
        work = asyncio.ensure_future(self._live())
        try:
            await asyncio.wait({ended, work}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else 0
        finally:
            for one in (ended, work):
                one.cancel()
            await asyncio.to_thread(self._end)

    async def _live(self) -> int:
        server = await self._relay.serve(self._sockets[0])
        async with server:
            try:
                layout = read_layout(Path(self._spec["model_path"]))
                self._start()
                await self._until_healthy()
                proof = Proof(self._upstream, self._spec, self._extra["like"], layout)
                pids = descendants(self._require().pid)
                scorer = await asyncio.to_thread(proof.run, pids)
            except (NotAsDeclared, SlmopsError, OSError) as error:
                why = error.message if isinstance(error, SlmopsError) else str(error)
                print(f"error: {self._program}: {why}", flush=True)
                return EXIT_LOAD_FAILED
            facts = _facts(layout, self._spec, self._extra["runtime_version"])
            service = Service(scorer, facts)
            questions = UnixHttpServer(self._sockets[1], service.answer)
            threading.Thread(target=questions.serve_forever, daemon=True, name="questions").start()
            self._relay.ready = True
            return await self._watch()

    def _start(self) -> None:
        """Start the server in a process group of its own.

        Raises:
            OSError: it cannot be started.
        """
        given = {key: value.replace("{api_key}", self._api_key) for key, value in self._extra["env"].items()}
        self._process = subprocess.Popen(
            self._extra["arguments"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=dict(os.environ) | given,
            start_new_session=True,
        )
        self._guard.watch(self._process.pid)
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True, name="log").start()

    def _require(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _read(self, stream: IO[bytes]) -> None:
        """Keep or drop what the server writes; always read it, or it would block."""
        for line in stream:
            if not self._relay.ready or self._extra["keep_log"]:
                text = line.decode("utf-8", "replace").rstrip()[:_LINE_CHARACTERS]
                self._lines.append(text)
                print(text, flush=True)

    async def _until_healthy(self) -> None:
        """Wait until the health path answers.

        Raises:
            NotAsDeclared: it ended, or did not answer in time.
        """
        limit_s = float(self._extra["start_timeout_s"])
        began_s = time.monotonic()
        heard = "nobody listened there"
        while (waited_s := time.monotonic() - began_s) < limit_s:
            if (code := self._require().poll()) is not None:
                await asyncio.sleep(_POLL_S)  # its last words
                raise NotAsDeclared(
                    f"ended {_with_status(code)} after {waited_s:.1f} s, before it answered: {self._last_words()}"
                )
            try:
                status, _ = await asyncio.to_thread(
                    self._upstream.get, self._extra["health_path"], max(min(limit_s - waited_s, 30.0), 0.1)
                )
                if status == 200:
                    return
                heard = f"{self._extra['health_path']} answered {status}"
            except TimeoutError:
                heard = f"it listened, but {self._extra['health_path']} did not answer"
            except OSError:
                pass
            await asyncio.sleep(_POLL_S)
        where = self._extra["server_socket"] or f"port {self._extra['port']}"
        raise NotAsDeclared(f"was not ready on {where} within {limit_s:g} s ({heard}): killed")

    def _last_words(self) -> str:
        lines = [line for line in self._lines if line.strip()]
        named = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return (named or lines or ["it wrote nothing"])[-1].strip()

    async def _watch(self) -> int:
        """Until the server is lost: dead, or silent for too long."""
        hang_s = float(self._extra["hang_timeout_s"])
        asked_s = time.monotonic()
        while True:
            if (code := self._require().poll()) is not None:
                print(f"error: {self._program} ended {_with_status(code)}", flush=True)
                return EXIT_SERVER_LOST
            if hang_s and time.monotonic() - asked_s >= hang_s / 4:
                if not await self._relay.healthy(hang_s) and self._require().poll() is None:
                    print(
                        f"error: {self._program} did not answer {self._extra['health_path']} "
                        f"within {hang_s:g} s: it hangs, killed",
                        flush=True,
                    )
                    return EXIT_SERVER_LOST
                asked_s = time.monotonic()
            await asyncio.sleep(_POLL_S)

    def _refusal(self, method: str, path: str) -> tuple[int, str, str] | None:
        """Routes that are not the engine's surface, or not declared."""
        if path == "/v1/embeddings" and not self._spec["embeddings"]:
            return 501, "not_supported_error", "This engine was started without embeddings"
        routes = _OPENAI_ROUTES | (_LLAMA_ROUTES if self._extra["like"] == "llama-server" else frozenset())
        if (method, path) in routes:
            return None
        if (method, path) in _LLAMA_ROUTES:
            return 404, "not_found_error", 'an external server that is like "openai" gives no token ids'
        return 404, "not_found_error", f"no {method} {path}"

    def _end(self) -> None:
        """End the server's whole process group: asked first, then killed; remove the sockets."""
        process = self._process
        if process is not None:
            _signal(process.pid, signal.SIGTERM)
            deadline_s = time.monotonic() + _STOP_GRACE_S
            while process.poll() is None and time.monotonic() < deadline_s:
                time.sleep(0.01)
            _signal(process.pid, signal.SIGKILL)  # also what a wrapper script left behind
            process.wait()
        for path in (*self._sockets, Path(self._extra["server_socket"] or "/nonexistent")):
            with contextlib.suppress(OSError):
                path.unlink()


class Service:
    """Answers on the scoring socket."""

    def __init__(self, scorer: Scorer | None, facts: dict[str, Any]) -> None:
        self._scorer = scorer
        self._facts = facts

    def answer(self, request: Request) -> Response:
        """One request."""
        try:
            if (request.method, request.path) == ("GET", "/properties"):
                return Response(value=self._facts)
            if (request.method, request.path) == ("POST", "/score"):
                return Response(value=self._score(request.json()))
        except UsageError as error:
            return error_response(400, "invalid_request_error", error.message)
        except SlmopsError as error:
            return error_response(500, "server_error", error.message)
        return error_response(404, "not_found_error", f"no {request.method} {request.path}")

    def _score(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._scorer is None:
            raise UsageError(
                'an external server that is like "openai" gives no log-probabilities',
                hint="its golden pack is judged by its greedy answers",
            )
        score = self._scorer.score(
            [int(token) for token in body["token_ids"]],
            start=int(body["start"]),
            top_k=int(body.get("top_k", 0)),
        )
        return {
            "start": score.start,
            "logprobs": score.logprobs,
            "greedy_ids": score.greedy_ids,
            "greedy_logprobs": score.greedy_logprobs,
            "top": score.top,
        }


def _facts(layout: Any, spec: dict[str, Any], runtime_version: str) -> dict[str, Any]:
    """`EngineProperties`: the model's from its file (the server was proved to serve it), the rest from the spec."""
    shape = layout.shape()
    metadata = layout.metadata
    heads = layout.number("attention.head_count")
    template = spec["chat_template"] or metadata.get("tokenizer.chat_template")
    return {
        "context_tokens": min(int(spec["context_tokens"]), shape.context_max_tokens),
        "train_context_tokens": shape.context_max_tokens,
        "slots": int(spec["slots"]),
        "n_layers": shape.layers,
        "n_heads": heads,
        "n_kv_heads": layout.number("attention.head_count_kv", heads),
        "n_embd": shape.hidden,
        "head_dim": layout.number("attention.key_length", shape.hidden // heads),
        "vocab_tokens": shape.vocabulary,
        "parameters": shape.parameters,
        "model_bytes": shape.weights_bytes,
        "description": f"{layout.architecture} {shape.parameters / 1e6:.0f}M by {runtime_version.partition('+')[0]}",
        "runtime_version": runtime_version,
        "bos_token": int(metadata.get("tokenizer.ggml.bos_token_id", -1)),
        "eos_token": int(metadata.get("tokenizer.ggml.eos_token_id", -1)),
        "chat_template": template,
    }


def _with_status(code: int) -> str:
    if code < 0:
        try:
            return f"by signal {signal.Signals(-code).name}"
        except ValueError:
            return f"by signal {-code}"
    return f"with status {code}"


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
