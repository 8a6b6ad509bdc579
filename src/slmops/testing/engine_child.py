"""The child process of `slmops.testing.engine`: answers from a JSON file, faults by script."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmops.core.errors import UsageError
from slmops.runtimes.child import EXIT_LOAD_FAILED, begin
from slmops.runtimes.llama_cpp.native import check_token_ids
from slmops.runtimes.unix_http import Request, Response, UnixHttpServer, error_response

IM_START, IM_END, VOCAB_TOKENS = 256, 257, 258
_SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END}
_TEXT_OF = {IM_START: b"<|im_start|>", IM_END: b"<|im_end|>"}
_ASSISTANT = "<|im_start|>assistant\n"
_GARBAGE = "\u0000\u0001#### #### ####"
_EMBEDDING_WIDTH = 16


def main() -> int:
    """Load the script and serve until killed."""
    config = begin()
    engine = FakeEngine(config.spec, config.extra["runtime_version"])
    server = UnixHttpServer(config.engine_socket, engine.answer)
    threading.Thread(target=server.serve_forever, daemon=True, name="engine").start()
    try:
        engine.load()
    except ValueError as error:
        print(f"error: {error}", flush=True)
        return EXIT_LOAD_FAILED
    UnixHttpServer(config.score_socket, engine.answer).serve_forever()
    return 0


class FakeModel:
    """Answers and scores; the greedy token of a score is the next byte of the answer."""

    def __init__(self, path: Path, adapters: Sequence[dict[str, Any]]) -> None:
        self.script = _read_script(path)
        self.answers: dict[str, str] = dict(self.script.get("answers", {}))
        for adapter in adapters:
            if adapter["scale"]:
                self.answers |= _read_script(Path(adapter["path"])).get("answers", {})
        self.confidence = float(self.script.get("confidence", 0.9))
        if not 1 / VOCAB_TOKENS < self.confidence < 1:
            raise ValueError(f"confidence: expected a value in (1/{VOCAB_TOKENS}, 1), got {self.confidence}")

    def reply(self, prompt: str) -> str:
        """Answer to a rendered prompt: by what its last user turn, or else all of it, contains."""
        chat = prompt.rpartition(_ASSISTANT)[0] or prompt
        question = chat.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        keys = sorted((key for key in self.answers if key in question), key=lambda key: (-len(key), key))
        return self.answers[keys[0]] if keys else str(self.script.get("default_answer", "I do not know."))

    def greedy(self, token_ids: Sequence[int]) -> int:
        """The next token after some."""
        raw = _raw(token_ids)
        chat, marker, said = raw.rpartition(_ASSISTANT.encode())
        if marker:
            answer = self.reply((chat + marker).decode("utf-8", "replace")).encode()
            if answer == said:
                return IM_END
            if answer.startswith(said):
                return answer[len(said)]
        return hashlib.sha256(raw).digest()[0] % 96 + 32


class FakeEngine:
    """Routes and faults."""

    def __init__(self, spec: dict[str, Any], runtime_version: str) -> None:
        self.spec = spec
        self.runtime_version = runtime_version
        self.model: FakeModel | None = None
        self.turn = threading.BoundedSemaphore(spec["slots"])
        self.count_lock = threading.Lock()
        self.requests = 0
        self.predicted_tokens = 0

    def load(self) -> None:
        """Read the files, with the scripted delay and fault.

        Raises:
            ValueError: a file is not a fake model, or the script says so.
        """
        model = FakeModel(Path(self.spec["model_path"]), self.spec["adapters"])
        for name in model.script.get("needs", []):
            if not (Path(self.spec["model_path"]).parent / name).is_file():
                raise ValueError(f"failed to load model: {name} does not lie beside it")
        time.sleep(float(model.script.get("load_s", 0.0)))
        fault = self._faults(model).get("load")
        if fault == "refuse":
            raise ValueError("failed to load model: scripted")
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            threading.Event().wait()
        self.model = model

    @staticmethod
    def _faults(model: FakeModel) -> dict[str, Any]:
        return dict(model.script.get("faults", {}))

    def answer(self, request: Request) -> Response:
        """One request on either socket."""
        model = self.model
        if model is None:
            return error_response(503, "unavailable_error", "Loading model")
        plain: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "/health": lambda _body: {"status": "ok"},
            "/v1/models": lambda _body: {"object": "list", "data": [{"id": self._name, "object": "model"}]},
            "/properties": lambda _body: self._properties(),
            "/tokenize": lambda body: {
                "tokens": tokenize(body["content"], special=body.get("parse_special", True))
            },
            "/detokenize": lambda body: {"content": detokenize(body["tokens"])},
            "/apply-template": lambda body: {"prompt": render(body["messages"])},
        }
        counted = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/embeddings": self._embeddings,
            "/score": self._score,
        }
        try:
            if request.path == "/metrics":
                return Response(value={"predicted_tokens": self.predicted_tokens})
            if request.path in plain:
                return Response(value=plain[request.path](request.json()))
            if request.path in counted:
                garbage = self._count_request(model)
                return counted[request.path](model, request.json(), garbage)
        except UsageError as error:
            return error_response(400, "invalid_request_error", error.message)
        except (KeyError, TypeError) as error:
            return error_response(400, "invalid_request_error", f"missing or wrong field: {error}")
        return error_response(404, "not_found_error", f"no {request.path}")

    @property
    def _name(self) -> str:
        return self.spec["model_alias"] or Path(self.spec["model_path"]).stem

    def _count_request(self, model: FakeModel) -> bool:
        """Count a request, play its fault, tell whether its output is garbage."""
        with self.count_lock:
            self.requests += 1
            number = self.requests
        faults = self._faults(model)
        if number == faults.get("crash_on_request"):
            print("error: scripted crash", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if number == faults.get("hang_on_request"):
            threading.Event().wait()
        return bool(number >= faults.get("garbage_from_request", math.inf))

    def _chat(self, model: FakeModel, body: dict[str, Any], garbage: bool) -> Response:
        prompt = render(body["messages"])
        text = _GARBAGE if garbage else model.reply(prompt)
        form = body.get("response_format") or {}
        schema = form.get("json_schema", {}).get("schema")
        if form.get("type") == "json_object" and not garbage:
            schema = {"type": "object", "properties": {}}
        if schema is not None and not garbage:
            text = _as_json(text, schema)
        return self._generate(body, tokenize(prompt), text, chat=True)

    def _completion(self, model: FakeModel, body: dict[str, Any], garbage: bool) -> Response:
        prompt = body["prompt"]
        ids = tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        return self._generate(body, ids, _GARBAGE if garbage else model.reply(detokenize(ids)), chat=False)

    def _generate(self, body: dict[str, Any], prompt: Sequence[int], text: str, *, chat: bool) -> Response:
        context = int(self.spec["context_tokens"])
        if len(prompt) >= context:
            message = f"request ({len(prompt)} tokens) exceeds the available context size ({context} tokens)"
            return error_response(
                400, "exceed_context_size_error", message, n_prompt_tokens=len(prompt), n_ctx=context
            )
        limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or context)
        limit = min(limit, context - len(prompt))
        pieces = list(text)
        if body.get("ignore_eos"):
            pieces = [(text or " ")[index % max(len(text), 1)] for index in range(limit)]
        finish = "length" if len(pieces) > limit or body.get("ignore_eos") else "stop"
        pieces = pieces[:limit]
        stop = body.get("stop") or []
        ends = ["".join(pieces).find(one) for one in ([stop] if isinstance(stop, str) else stop)]
        if found := [end for end in ends if end >= 0]:
            pieces, finish = pieces[: min(found)], "stop"
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(pieces),
            "total_tokens": len(prompt) + len(pieces),
        }
        shape = _Shape(self._name, chat)
        if body.get("stream"):
            return Response(events=self._events(shape, pieces, finish, usage, body))
        spoken = "".join(self._speak(pieces))
        return Response(value=shape.whole(spoken, finish, usage))

    def _events(
        self, shape: _Shape, pieces: Sequence[str], finish: str, usage: dict[str, int], body: dict[str, Any]
    ) -> Iterator[bytes]:
        for piece in self._speak(pieces):
            yield _event(shape.part(piece, None))
        yield _event(shape.part("", finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _event({**shape.part("", None), "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _speak(self, pieces: Sequence[str]) -> Iterator[str]:
        """Pieces at the scripted speed, in one of the engine's slots."""
        assert self.model is not None
        script = self.model.script
        with self.turn:
            time.sleep(float(script.get("prefill_s", 0.0)))
            for piece in pieces:
                time.sleep(float(script.get("token_s", 0.0)))
                self.predicted_tokens += 1
                yield piece

    def _embeddings(self, _model: FakeModel, body: dict[str, Any], garbage: bool) -> Response:
        if not self.spec["embeddings"]:
            return error_response(501, "not_supported_error", "This server does not support embeddings")
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        rows = [_embedding("" if garbage else text) for text in texts]
        values = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return Response(value={"object": "list", "data": values, "model": self._name})

    def _score(self, model: FakeModel, body: dict[str, Any], garbage: bool) -> Response:
        ids, start, top_k = (
            [int(token) for token in body["token_ids"]],
            int(body["start"]),
            int(body["top_k"]),
        )
        check_token_ids(
            ids, vocab_tokens=VOCAB_TOKENS, context_tokens=self.spec["context_tokens"], start=start
        )
        sure = math.log(model.confidence)
        other = math.log((1 - model.confidence) / (VOCAB_TOKENS - 1))
        greedy = [
            (255 - ids[at]) % 256 if garbage else model.greedy(ids[:at]) for at in range(start, len(ids))
        ]
        others = [token for token in range(VOCAB_TOKENS)][: top_k + 1]
        top = [
            [(best, sure), *((token, other) for token in others if token != best)][:top_k]
            for best in greedy
            if top_k
        ]
        return Response(
            value={
                "start": start,
                "logprobs": [sure if best == ids[start + at] else other for at, best in enumerate(greedy)],
                "greedy_ids": greedy,
                "greedy_logprobs": [sure] * len(greedy),
                "top": top,
            }
        )

    def _properties(self) -> dict[str, Any]:
        size = Path(self.spec["model_path"]).stat().st_size
        return {
            "context_tokens": self.spec["context_tokens"],
            "train_context_tokens": 1 << 20,
            "slots": self.spec["slots"],
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 1,
            "n_embd": 8,
            "head_dim": 4,
            "vocab_tokens": VOCAB_TOKENS,
            "parameters": size,
            "model_bytes": size,
            "description": "scripted",
            "runtime_version": self.runtime_version,
            "bos_token": -1,
            "eos_token": IM_END,
            "chat_template": "chatml",
        }


class _Shape:
    """OpenAI's answer shapes."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.head = {"id": "fake", "created": 0, "model": model}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        kind = "chat.completion" if self.chat else "text_completion"
        choice = {"index": 0, "finish_reason": finish, **said}
        return {**self.head, "object": kind, "choices": [choice], "usage": usage}

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [{"index": 0, "finish_reason": finish, **said}]}


def tokenize(text: str, *, special: bool = True) -> list[int]:
    """Bytes, and the two special tokens when asked for."""
    ids: list[int] = []
    while special and text:
        found = [(text.index(name), name) for name in _SPECIAL if name in text]
        if not found:
            break
        at, name = min(found)
        ids += [*text[:at].encode(), _SPECIAL[name]]
        text = text[at + len(name) :]
    return [*ids, *text.encode()]


def detokenize(token_ids: Sequence[int]) -> str:
    """Text of tokens; broken UTF-8 becomes replacement characters."""
    return _raw(token_ids).decode("utf-8", "replace")


def _raw(token_ids: Sequence[int]) -> bytes:
    return b"".join(_TEXT_OF.get(token) or bytes([token]) for token in token_ids)


def render(messages: Sequence[dict[str, Any]]) -> str:
    """ChatML with generation prompt."""
    turns = (f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return "".join(turns) + _ASSISTANT


def _read_script(path: Path) -> dict[str, Any]:
    try:
        script = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"failed to load model: {path.name} is not JSON: {error}") from error
    if not isinstance(script, dict) or script.get("slmops_fake") != 1:
        raise ValueError(f"failed to load model: {path.name} is not a fake model")
    return script


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _as_json(text: str, schema: dict[str, Any]) -> str:
    """The scripted answer when it is JSON, else the smallest instance of the schema."""
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(_instance(schema))
    return text


def _instance(schema: dict[str, Any]) -> Any:
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {name: _instance(schema["properties"][name]) for name in schema.get("required", [])}
    if schema.get("type") == "array":
        return [_instance(schema["items"])] * int(schema.get("minItems", 0))
    return {"integer": 0, "number": 0.0, "boolean": False, "null": None}.get(str(schema.get("type")), "")


def _embedding(text: str) -> list[float]:
    raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:_EMBEDDING_WIDTH]]
    norm = math.sqrt(sum(value * value for value in raw))
    return [value / norm for value in raw]


if __name__ == "__main__":
    sys.exit(main())
