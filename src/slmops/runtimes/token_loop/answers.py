"""OpenAI's answer shapes, whole and streamed, with llama.cpp's ``timings`` beside the last part."""

from __future__ import annotations

import json
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slmops.runtimes.token_loop.requests import Generation
from slmops.runtimes.token_loop.scheduler import End, Failure, Piece, Ticket, TokenLogprob
from slmops.runtimes.token_loop.text import Text

#: How often a thread that waits for a token looks whether its client is still there.
_LOOK_S = 0.1


class RuntimeFailure(Exception):
    """The runtime failed in the middle of an answer."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class AnswerWriter:
    """Shapes one answer.

    Args:
        model: name that it carries.
        text: tokenizer, for log-probabilities.
        wanted: the request.
    """

    def __init__(self, model: str, text: Text, wanted: Generation) -> None:
        self._text = text
        self._wanted = wanted
        prefix = "chatcmpl" if wanted.chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._offset = 0

    def whole(self, ticket: Ticket, gone: Callable[[], bool]) -> dict[str, Any]:
        """Wait for the whole answer.

        Raises:
            RuntimeFailure: the forward pass failed.
            ClientGone: the client hung up; the request was cancelled.
        """
        said: list[str] = []
        logprobs: list[TokenLogprob] = []
        for event in _events(ticket, gone):
            if isinstance(event, End):
                text = "".join(said)
                body: dict[str, Any] = (
                    {"message": {"role": "assistant", "content": text}}
                    if self._wanted.chat
                    else {"text": text}
                )
                choice = {
                    "index": 0,
                    "finish_reason": event.reason,
                    **body,
                    "logprobs": self._logprobs(logprobs),
                }
                kind = "chat.completion" if self._wanted.chat else "text_completion"
                tail = {"usage": _usage(event), "timings": _timings(event)}
                return {**self._head, "object": kind, "choices": [choice], **tail}
            said.append(event.text)
            logprobs += event.logprobs
        raise RuntimeFailure("the answer broke off")

    def stream(self, ticket: Ticket, gone: Callable[[], bool]) -> Iterator[bytes]:
        """Server-sent events; closing the iterator cancels the request."""
        try:
            if self._wanted.chat:
                yield _sse(self._part({"role": "assistant", "content": ""}, None, None))
            for event in _events(ticket, gone):
                if isinstance(event, Piece):
                    said = {"content": event.text} if self._wanted.chat else event.text
                    yield _sse(self._part(said, None, self._logprobs(event.logprobs)))
                    continue
                last = self._part({} if self._wanted.chat else "", event.reason, None)
                yield _sse({**last, "timings": _timings(event)})
                if self._wanted.include_usage:
                    yield _sse({**self._part({}, None, None), "choices": [], "usage": _usage(event)})
            yield b"data: [DONE]\n\n"
        except RuntimeFailure as error:
            problem = {"error": {"code": 500, "type": "server_error", "message": str(error)}}
            yield _sse(problem)
        except ClientGone:
            return
        finally:
            ticket.cancel()

    def _part(self, said: Any, finish: str | None, logprobs: Any) -> dict[str, Any]:
        body = {"delta": said} if self._wanted.chat else {"text": said}
        kind = "chat.completion.chunk" if self._wanted.chat else "text_completion"
        choice = {"index": 0, "finish_reason": finish, **body, "logprobs": logprobs}
        return {**self._head, "object": kind, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None
        if self._wanted.chat:
            return {
                "content": [
                    self._one(one.token, one.logprob)
                    | {"top_logprobs": [self._one(*other) for other in one.top]}
                    for one in tokens
                ]
            }
        texts = [self._text.text_of(one.token) for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        tops = [{self._text.text_of(token): value for token, value in one.top} for one in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._text.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _events(ticket: Ticket, gone: Callable[[], bool]) -> Iterator[Piece | End]:
    """Events up to the end; gives up when the client is gone.

    Raises:
        RuntimeFailure: the forward pass failed.
        ClientGone: the client hung up.
    """
    while True:
        try:
            event = ticket.events.get(timeout=_LOOK_S)
        except queue.Empty:
            if gone():
                ticket.cancel()
                raise ClientGone from None
            continue
        if isinstance(event, Failure):
            raise RuntimeFailure(event.message)
        assert isinstance(event, Piece | End)
        yield event
        ticket.delivered()
        if isinstance(event, End):
            return


def _usage(end: End) -> dict[str, Any]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.answer_tokens,
        "total_tokens": end.prompt_tokens + end.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def _timings(end: End) -> dict[str, float]:
    evaluated = end.prompt_tokens - end.cached_tokens
    later = max(end.answer_tokens - 1, 0)  # the first token comes out of the prefill
    return {
        "prompt_n": evaluated,
        "prompt_ms": 1000 * end.prefill_s,
        "prompt_per_second": evaluated / end.prefill_s if end.prefill_s > 0 else 0.0,
        "predicted_n": end.answer_tokens,
        "predicted_ms": 1000 * end.decode_s,
        "predicted_per_second": later / end.decode_s if end.decode_s > 0 else 0.0,
        "cache_n": end.cached_tokens,
    }


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
