"""The toolchain's side of the protocol: a JSON request file in, JSON lines out. Standard library, and numpy for logits.

Request: ``{"op": "export" | "session", "limits": {...}, ...}``. Events on stdout, one a line: ``{"ratio", "note"}`` progress,
``{"value"}`` the one result of an export, ``{"error": {"kind", "message"}}``. A session answers ``{"value"}`` or
``{"error"}`` to each line of stdin: ``{"op": "facts" | "tokenize" | "render" | "logits" | "generate" | "bench", ...}``.
Whatever a library prints goes to stderr, which our side keeps as the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1


class ExportedModel(Protocol):
    """A loaded export, as its own binding runs it. What a binding cannot do raises ``NotImplementedError``."""

    def facts(self) -> dict[str, Any]:
        """``{"bos", "eos", "runtime_version"}``; unknown ones left out."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids by the tokenizer that serves: slmops' reader of ``tokenizer.json``, or the engine's where that is built in."""
        ...

    def own_tokenize(self, text: str) -> list[int]:
        """Ids by the engine's own tokenizer, where it has one that slmops does not serve with."""
        ...

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation by the template that the binding reads from the export, the answer begun."""
        ...

    def logits(self, token_ids: Sequence[int], first: int) -> Any:
        """Logits at every position from ``first`` on, float32, shape (n - first, vocabulary)."""
        ...

    def generate(self, token_ids: Sequence[int], max_tokens: int, *, stop: bool) -> list[int]:
        """Greedy continuation, token by token through the KV cache; with ``stop`` up to a stop token (left out)."""
        ...


def serve(
    export: Callable[[dict[str, Any], Callable[[float | None, str], None]], dict[str, Any]],
    open_model: Callable[[dict[str, Any]], ExportedModel],
) -> int:
    """What every script's ``main`` is."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _limit(request.get("limits") or {})
    try:
        if request["op"] == "export":
            made = export(request, lambda ratio, note: send({"ratio": ratio, "note": note}))
            print(f"export: {_used()}", file=sys.stderr)  # into the log: it is no part of the result
            send({"value": made})
            return 0
        began_s = time.perf_counter()
        model = open_model(request)
        send({"value": {"load_s": time.perf_counter() - began_s, **model.facts()}})
    except Exception as error:
        traceback.print_exc()
        send({"error": {"kind": type(error).__name__, "message": str(error)[:2000]}})
        return 1
    for line in sys.stdin:
        try:
            send({"value": _answer(model, json.loads(line))})
        except NotImplementedError as error:
            send({"error": {"kind": "unable", "message": str(error)}})
        except Exception as error:
            traceback.print_exc()
            send({"error": {"kind": type(error).__name__, "message": str(error)[:2000]}})
    return 0


def _answer(model: ExportedModel, asked: dict[str, Any]) -> Any:
    op = asked["op"]
    if op == "tokenize":
        tokenize = model.own_tokenize if asked.get("own") else model.tokenize
        return [tokenize(text) for text in asked["texts"]]
    if op == "render":
        return [model.render(messages) for messages in asked["conversations"]]
    if op == "generate":
        return [model.generate(ids, asked["max_tokens"], stop=True) for ids in asked["prompts"]]
    if op == "logits":
        import numpy as np  # the binding has it; the protocol alone does not need it

        rows = np.ascontiguousarray(model.logits(asked["token_ids"], asked["first"]), dtype=np.float32)
        rows.tofile(asked["file"])
        return list(rows.shape)
    if op == "bench":
        return _bench(model, asked)
    raise ValueError(f"unknown op {op!r}")


def _bench(model: ExportedModel, asked: dict[str, Any]) -> dict[str, Any]:
    """Prefill and decode by the wall clock: a one-token answer costs the prompt, the rest is decoding."""
    repeats = []
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for number in range(asked["repeats"]):
        prompt = [(7 * i + 13 * number) % 200 + 3 for i in range(asked["prompt_tokens"])]
        began_s = time.perf_counter()
        model.generate(prompt, 1, stop=False)
        first_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        made = len(model.generate(prompt, asked["decode_tokens"], stop=False))
        rest_s = max(time.perf_counter() - began_s - first_s, 1e-9)
        repeats.append(
            {"ttft_s": first_s, "prefill_tps": len(prompt) / first_s, "decode_tps": max(made - 1, 0) / rest_s}
        )
    busy = (time.process_time() - cpu_s) / max(time.perf_counter() - wall_s, 1e-9)
    return {"repeats": repeats, "busy_ratio": busy, **_memory()}


def _used() -> str:
    """CPU time and highest resident memory of this process and of those that it ran."""
    own, ran = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_s = sum(one.ru_utime + one.ru_stime for one in (own, ran))
    return f"{cpu_s:.0f} s of CPU, {max(own.ru_maxrss, ran.ru_maxrss) >> 10} MB resident at most"


def _memory() -> dict[str, int]:
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if ":" in line
    )
    return {
        "rss_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "private_bytes": int(status.get("RssAnon", "0 kB").split()[0]) * 1024,
    }


def _limit(limits: dict[str, Any]) -> None:
    """Die with the parent; stay in the cgroup or under the limit that it chose."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for procs in limits.get("cgroup_procs") or ():
        with contextlib.suppress(OSError):
            Path(procs).write_text(str(os.getpid()), encoding="ascii")
    if limits.get("private_bytes"):
        resource.setrlimit(resource.RLIMIT_DATA, (limits["private_bytes"], limits["private_bytes"]))
