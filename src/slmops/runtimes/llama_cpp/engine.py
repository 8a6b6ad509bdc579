"""The child process that holds one model: llama.cpp's own HTTP server on one Unix socket, scoring on another.

`python -m slmops.runtimes.llama_cpp.engine`, started by `adapter` with its configuration on stdin. This is
the only module that imports xllamacpp. It logs errors only: llama.cpp's lower levels would write prompts.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from slmops.core.errors import SlmopsError, UsageError
from slmops.runtimes.child import EXIT_LOAD_FAILED, begin
from slmops.runtimes.llama_cpp.scorer import Scorer
from slmops.runtimes.ports import AdapterSpec
from slmops.runtimes.unix_http import Request, Response, UnixHttpServer, error_response

#: A scoring instance that was not used for so long is freed.
SCORER_IDLE_S = 60.0
_LOG_ERRORS_ONLY = 1
_MAX_TOP_K = 100


def main() -> int:
    """Load the model and serve until killed."""
    config = begin()
    spec = config.spec
    try:
        server = start_server(spec, config.engine_socket)
    except (RuntimeError, MemoryError) as error:
        print(f"error: {error}", flush=True)
        return EXIT_LOAD_FAILED
    scorer = Scorer(
        Path(spec["model_path"]),
        context_tokens=spec["context_tokens"],
        kv_cache=spec["kv_cache"],
        threads=spec["threads"],
        adapters=[AdapterSpec(Path(adapter["path"]), adapter["scale"]) for adapter in spec["adapters"]],
        own_log=False,
    )
    threading.Thread(target=_release_when_idle, args=(scorer,), daemon=True, name="scorer-idle").start()
    service = Service(server, scorer, spec, config.extra["runtime_version"])
    UnixHttpServer(config.score_socket, service.answer).serve_forever()
    return 0


def start_server(spec: dict[str, Any], socket: Path) -> Any:
    """Start llama.cpp's server; returns when the model is loaded, and answers 503 on the socket before.

    Raises:
        RuntimeError: the model was refused; the reason is on stderr.
    """
    import xllamacpp as xl  # noqa: PLC0415 - after the limits are in force

    params = xl.CommonParams()
    params.model.path = spec["model_path"]
    params.model_alias = {spec["model_alias"] or Path(spec["model_path"]).stem}
    params.hostnames = [str(socket)]
    params.endpoint_slots = False  # would show prompts
    params.endpoint_metrics = True
    params.cors_origins = "localhost"
    params.load_mode = xl.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.ui = False
    params.verbosity = _LOG_ERRORS_ONLY
    params.warmup = True
    params.n_gpu_layers = 0
    params.fit_params = False  # would shrink the context to what it believes to fit
    # Each slot has room of its own: with one shared pool, two long requests together end both in an error.
    params.n_parallel = spec["slots"]
    params.n_ctx = spec["context_tokens"] * spec["slots"]
    params.kv_unified = False
    params.kv_unified_per_slot = spec["context_tokens"]  # caps each slot, which is padded to 256 otherwise
    params.n_threads_http = spec["max_requests"] + 4  # /health, /metrics and tokenising must find one
    params.n_batch = spec["batch_tokens"]
    params.n_ubatch = min(spec["ubatch_tokens"], spec["batch_tokens"])
    params.no_extra_bufts = not spec["repack"]
    params.cache_ram_mib = 0  # llama.cpp's default keeps up to 8 GiB of old prompts
    params.n_ctx_checkpoints = 4
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = spec["threads"]
        cpu.poll = 0
    kind = {"f32": "F32", "f16": "F16", "bf16": "BF16", "iq4_nl": "IQ4_NL"}
    name = "GGML_TYPE_" + kind.get(spec["kv_cache"], spec["kv_cache"].upper())
    params.cache_type_k = params.cache_type_v = getattr(xl.ggml_type, name)
    if spec["embeddings"]:
        params.embedding = True
        params.pooling_type = xl.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if spec["chat_template"]:
        params.chat_template = spec["chat_template"]
    params.lora_adapters = [xl.CommonAdapterLoraInfo(one["path"], one["scale"]) for one in spec["adapters"]]
    return xl.Server(params)


class Service:
    """Answers on the scoring socket."""

    def __init__(self, server: Any, scorer: Scorer, spec: dict[str, Any], runtime_version: str) -> None:
        self.server = server
        self.scorer = scorer
        self.spec = spec
        self.runtime_version = runtime_version

    def answer(self, request: Request) -> Response:
        """One request."""
        try:
            if (request.method, request.path) == ("POST", "/score"):
                return Response(value=self._score(request.json()))
            if (request.method, request.path) == ("GET", "/properties"):
                return Response(value=self._properties())
        except UsageError as error:
            return error_response(400, "invalid_request_error", error.message)
        except SlmopsError as error:
            return error_response(500, "server_error", error.message)
        return error_response(404, "not_found_error", f"no {request.method} {request.path}")

    def _score(self, body: dict[str, Any]) -> dict[str, Any]:
        top_k = int(body.get("top_k", 0))
        if not 0 <= top_k <= _MAX_TOP_K:
            raise UsageError(
                f"top_k: expected 0..{_MAX_TOP_K}, got {top_k}", hint="ask for fewer alternatives"
            )
        score = self.scorer.score(
            [int(token) for token in body["token_ids"]], start=int(body["start"]), top_k=top_k
        )
        return {
            "start": score.start,
            "logprobs": score.logprobs,
            "greedy_ids": score.greedy_ids,
            "greedy_logprobs": score.greedy_logprobs,
            "top": score.top,
        }

    def _properties(self) -> dict[str, Any]:
        facts = self.scorer.model_facts()
        return {
            **facts,
            "context_tokens": min(self.spec["context_tokens"], int(facts["train_context_tokens"] or 0)),
            "slots": self.spec["slots"],
            "runtime_version": self.runtime_version,
            "chat_template": self.spec["chat_template"] or facts["chat_template"],
        }


def _release_when_idle(scorer: Scorer) -> None:
    while True:
        time.sleep(SCORER_IDLE_S / 4)
        scorer.release_if_idle(SCORER_IDLE_S)


if __name__ == "__main__":
    sys.exit(main())
