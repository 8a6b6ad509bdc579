"""The child process: two sockets over one model. An adapter's engine module calls `serve` and nothing else.

HTTP threads read requests and write answers; the thread that loaded the model makes every forward pass
(`scheduler`). The log never holds prompts or answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmops.core.errors import SlmopsError, UsageError
from slmops.runtimes.child import EXIT_LOAD_FAILED, begin
from slmops.runtimes.llama_cpp.native import check_token_ids
from slmops.runtimes.token_loop.answers import AnswerWriter, ClientGone, RuntimeFailure
from slmops.runtimes.token_loop.grammar import GrammarCompiler
from slmops.runtimes.token_loop.model import TEMPLATE_NAME, TOKENIZER_NAME, ModelCard, TokenModel, read_card
from slmops.runtimes.token_loop.requests import RequestReader
from slmops.runtimes.token_loop.scheduler import Failure, Scheduler
from slmops.runtimes.token_loop.template import ChatTemplate
from slmops.runtimes.token_loop.text import Text
from slmops.runtimes.unix_http import Request, Response, UnixHttpServer, error_response

#: One forward pass that takes longer is a hang: `/health` then says so. A piece of a prompt takes a second on
#: a slow device.
STUCK_S = 120.0
_MAX_TOP_K = 100

OpenModel = Callable[[dict[str, Any], ModelCard], TokenModel]
ReadCard = Callable[[Path], ModelCard]


def serve(open_model: OpenModel, read: ReadCard = read_card) -> int:
    """Load a model and serve it until killed.

    Args:
        open_model: given the spec's fields and the card, loads the model; any exception is a refusal.
        read: gives the card of a model's folder.

    Returns: the exit status when the model was refused.
    """
    config = begin()
    service = Service(config.spec, config.extra["runtime_version"])
    front = UnixHttpServer(config.engine_socket, service.answer)
    threading.Thread(target=front.serve_forever, daemon=True, name="engine").start()
    try:
        scheduler = service.load(open_model, read)
    except SlmopsError as error:
        print(f"error: {error.message}", flush=True)
        return EXIT_LOAD_FAILED
    except Exception as error:  # whatever a binding throws is its reason to refuse the file
        print(f"error: {type(error).__name__}: {error}", flush=True)
        return EXIT_LOAD_FAILED
    back = UnixHttpServer(config.score_socket, service.answer_inner)
    threading.Thread(target=back.serve_forever, daemon=True, name="score").start()
    service.ready = True
    scheduler.run()
    return 0


class Service:
    """Answers requests on both sockets.

    Args:
        spec: fields of `EngineSpec`.
        runtime_version: of the binding.
    """

    def __init__(self, spec: dict[str, Any], runtime_version: str) -> None:
        self.ready = False
        self._spec = spec
        self._runtime_version = runtime_version
        path = Path(spec["model_path"])
        self._name = spec["model_alias"] or path.stem
        self._folder = path.parent

    def load(self, open_model: OpenModel, read: ReadCard) -> Scheduler:
        """Load everything that the model's folder holds.

        Raises:
            SlmopsError, or what the binding throws: the model is refused.
        """
        spec, folder = self._spec, self._folder
        card = self._card = read(folder)
        if spec["context_tokens"] > card.context_tokens:
            raise UsageError(
                f"context_tokens: {spec['context_tokens']} asked, this file was exported for {card.context_tokens}",
                hint="ask for less, or export it with a longer context",
            )
        bos, eos = card.bos_token, card.eos_tokens
        self._text = text = Text(folder / TOKENIZER_NAME, bos_token=bos, add_bos=card.add_bos)
        source = spec["chat_template"] or _read(folder / TEMPLATE_NAME)
        self._template = source and ChatTemplate(
            source,
            bos_text="" if bos is None else text.text_of(bos),
            eos_text=text.text_of(eos[0]) if eos else "",
        )
        model = open_model(spec, card)
        slots = spec["slots"] if model.max_sequences is None else min(spec["slots"], model.max_sequences)
        self._vocab_tokens = model.vocab_tokens
        compiler = GrammarCompiler(folder / TOKENIZER_NAME, model.vocab_tokens, eos)
        self._reader = RequestReader(
            text, self._template or None, compiler, eos_tokens=eos, vocab_tokens=model.vocab_tokens
        )
        self._scheduler = Scheduler(
            model,
            text,
            eos_tokens=eos,
            context_tokens=spec["context_tokens"],
            slots=slots,
            chunk_tokens=spec["batch_tokens"],
        )
        return self._scheduler

    # --- the OpenAI surface

    def answer(self, request: Request) -> Response:
        """One request on the engine's socket."""
        if not self.ready:
            return error_response(503, "unavailable_error", "Loading model")
        routes: dict[tuple[str, str], Callable[[Request], Response]] = {
            ("GET", "/health"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/apply-template"): self._apply_template,
        }
        return self._routed(routes, request)

    def _routed(
        self, routes: dict[tuple[str, str], Callable[[Request], Response]], request: Request
    ) -> Response:
        act = routes.get((request.method, request.path))
        if act is None:
            return error_response(404, "not_found_error", f"no {request.method} {request.path}")
        try:
            return act(request)
        except UsageError as error:
            return error_response(400, "invalid_request_error", error.message)
        except (KeyError, TypeError, AttributeError) as error:
            return error_response(400, "invalid_request_error", f"missing or wrong field: {error}")
        except ClientGone:
            return error_response(499, "client_gone", "the client hung up")
        except (RuntimeFailure, SlmopsError) as error:
            return error_response(500, "server_error", str(error))

    def _health(self, _request: Request) -> Response:
        began_s = self._scheduler.step_began_s
        if began_s is not None and time.monotonic() - began_s > STUCK_S:
            return error_response(503, "stuck_error", f"a forward pass takes longer than {STUCK_S:g} s")
        return Response(value={"status": "ok"})

    def _models(self, _request: Request) -> Response:
        return Response(
            value={"object": "list", "data": [{"id": self._name, "object": "model", "owned_by": "slmops"}]}
        )

    def _metrics(self, _request: Request) -> Response:
        return Response(value={"predicted_tokens": self._scheduler.predicted_tokens})

    def _generate(self, request: Request) -> Response:
        body = request.json()
        read = self._reader.chat if request.path == "/v1/chat/completions" else self._reader.completion
        wanted = read(body)
        context = self._scheduler.context_tokens
        if len(wanted.prompt) >= context:
            return error_response(
                400,
                "exceed_context_size_error",
                f"request ({len(wanted.prompt)} tokens) exceeds the available context size ({context} tokens)",
                n_prompt_tokens=len(wanted.prompt),
                n_ctx=context,
            )
        writer = AnswerWriter(self._name, self._text, wanted)
        ticket = self._scheduler.submit(wanted)
        if wanted.stream:
            return Response(events=writer.stream(ticket, request.gone))
        return Response(value=writer.whole(ticket, request.gone))

    def _embeddings(self, _request: Request) -> Response:
        return error_response(501, "not_supported_error", "This runtime does not support embeddings")

    def _tokenize(self, request: Request) -> Response:
        body = request.json()
        ids = self._text.tokenize(
            str(body["content"]),
            add_special=bool(body.get("add_special", False)),
            parse_special=bool(body.get("parse_special", True)),
        )
        return Response(value={"tokens": ids})

    def _detokenize(self, request: Request) -> Response:
        return Response(
            value={"content": self._text.detokenize([int(token) for token in request.json()["tokens"]])}
        )

    def _apply_template(self, request: Request) -> Response:
        return Response(value={"prompt": self._reader.render(request.json())})

    # --- the inner surface

    def answer_inner(self, request: Request) -> Response:
        """One request on the scoring socket."""
        return self._routed(
            {("POST", "/score"): self._score, ("GET", "/properties"): self._properties}, request
        )

    def _score(self, request: Request) -> Response:
        body = request.json()
        ids, start, top_k = (
            [int(token) for token in body["token_ids"]],
            int(body["start"]),
            int(body.get("top_k", 0)),
        )
        if not 0 <= top_k <= _MAX_TOP_K:
            raise UsageError(
                f"top_k: expected 0..{_MAX_TOP_K}, got {top_k}", hint="ask for fewer alternatives"
            )
        check_token_ids(
            ids, vocab_tokens=self._vocab_tokens, context_tokens=self._scheduler.context_tokens, start=start
        )
        event = self._scheduler.score(ids, start, top_k).events.get()
        if isinstance(event, Failure):
            raise RuntimeFailure(event.message)
        return Response(value=event)

    def _properties(self, _request: Request) -> Response:
        card, shape = self._card, self._card.shape
        names = (
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "n_embd",
            "head_dim",
            "train_context_tokens",
            "parameters",
        )
        return Response(
            value={
                **{name: shape.get(name, 0) for name in names},
                "context_tokens": self._scheduler.context_tokens,
                "slots": self._scheduler.slots,
                "vocab_tokens": self._vocab_tokens,
                "model_bytes": sum(path.stat().st_size for path in self._folder.iterdir() if path.is_file()),
                "description": f"{self._folder.name} {card.precision}".strip(),
                "runtime_version": self._runtime_version,
                "bos_token": -1 if card.bos_token is None else card.bos_token,
                "eos_token": card.eos_tokens[0] if card.eos_tokens else -1,
                "chat_template": self._template.source if self._template else None,
            }
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
