"""What a request means: OpenAI's JSON to one `Generation`, or a refusal that names the field.

A field that is not known here is refused and not ignored: the gateway forwards what `Capabilities` declares
and nothing else, so an unknown field comes from somebody who talks to the engine directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slmops.core.errors import UsageError
from slmops.runtimes.token_loop.capabilities import CHAT_FIELDS, COMPLETION_FIELDS, OWN_FIELDS
from slmops.runtimes.token_loop.grammar import GrammarCompiler, GrammarMatcher
from slmops.runtimes.token_loop.sampler import Sampling
from slmops.runtimes.token_loop.template import ChatTemplate
from slmops.runtimes.token_loop.text import Text

_MAX_STOPS = 64


@dataclass(frozen=True)
class Generation:
    """One answer to make.

    Attributes:
        chat: OpenAI's chat shapes, else those of plain completions.
        prompt: token ids.
        max_tokens: longest answer; None for as much as the context holds.
        sampling: how tokens are chosen.
        stops: strings that end the answer.
        logprobs: alternatives per token to report, None for no log-probabilities.
        grammar: what holds the answer to a form, or None.
        stream, include_usage: how it is answered.
        reuse: the KV cache of an earlier request may be continued.
    """

    chat: bool
    prompt: list[int]
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    logprobs: int | None
    grammar: GrammarMatcher | None
    stream: bool
    include_usage: bool
    reuse: bool


class RequestReader:
    """Reads requests for one model.

    Args:
        text: its tokenizer.
        template: its chat template, or None.
        compiler: for grammars.
        eos_tokens: banned by ``ignore_eos``.
        vocab_tokens: ids end there.
    """

    def __init__(
        self,
        text: Text,
        template: ChatTemplate | None,
        compiler: GrammarCompiler,
        *,
        eos_tokens: tuple[int, ...],
        vocab_tokens: int,
    ) -> None:
        self._text = text
        self._template = template
        self._compiler = compiler
        self._eos_tokens = eos_tokens
        self._vocab_tokens = vocab_tokens

    def render(self, body: Mapping[str, Any]) -> str:
        """Prompt text of a chat.

        Raises:
            UsageError: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise UsageError(
                "this model has no chat template", hint="use /v1/completions, or export it with a template"
            )
        extra = _object(body, "chat_template_kwargs") or {}
        return self._template.render(body["messages"], {**extra, "tools": body.get("tools") or None})

    def chat(self, body: Mapping[str, Any]) -> Generation:
        """Read a request of ``/v1/chat/completions``."""
        _refuse_unknown(body, CHAT_FIELDS | OWN_FIELDS)
        prompt = self._text.tokenize(self.render(body), add_special=True)
        wanted = _integer(body, "top_logprobs", 0, 20) or 0 if body.get("logprobs") else None
        limit = _integer(body, "max_completion_tokens", -1)
        return self._read(body, prompt, chat=True, logprobs=wanted, limit=limit)

    def completion(self, body: Mapping[str, Any]) -> Generation:
        """Read a request of ``/v1/completions``."""
        _refuse_unknown(body, COMPLETION_FIELDS | OWN_FIELDS)
        prompt = body["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            ids = self._text.tokenize(prompt, add_special=True)
        elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
            ids = [int(token) for token in prompt]
        else:
            raise UsageError(
                "prompt: this runtime answers one prompt a request", hint="send one request for each prompt"
            )
        if any(not 0 <= token < self._vocab_tokens for token in ids):
            raise UsageError(
                f"prompt: expected token ids below {self._vocab_tokens}", hint="tokenise with this model"
            )
        return self._read(body, ids, chat=False, logprobs=_integer(body, "logprobs", 0, 20), limit=None)

    def _read(
        self,
        body: Mapping[str, Any],
        prompt: list[int],
        *,
        chat: bool,
        logprobs: int | None,
        limit: int | None,
    ) -> Generation:
        if body.get("n") not in (None, 1):
            raise UsageError("n: this runtime gives one answer a request", hint="send several requests")
        limit = limit if limit is not None else _integer(body, "max_tokens", -1)
        stop = body.get("stop")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if len(stops) > _MAX_STOPS or not all(isinstance(one, str) for one in stops):
            raise UsageError(f"stop: expected up to {_MAX_STOPS} strings", hint="send fewer")
        if not prompt:
            raise UsageError("the prompt has no tokens", hint="send some text")
        return Generation(
            chat=chat,
            prompt=prompt,
            max_tokens=None if limit is None or limit < 0 else limit,
            sampling=self._sampling(body),
            stops=stops,
            logprobs=logprobs,
            grammar=self._grammar(body),
            stream=bool(body.get("stream")),
            include_usage=bool((_object(body, "stream_options") or {}).get("include_usage")),
            reuse=bool(body.get("cache_prompt", True)),
        )

    def _sampling(self, body: Mapping[str, Any]) -> Sampling:
        base = Sampling()
        bias = _bias(body.get("logit_bias"))
        if body.get("ignore_eos"):
            bias |= dict.fromkeys(self._eos_tokens, float("-inf"))
        seed = _integer(body, "seed", -(1 << 63))

        def number(name: str) -> float:
            value = body.get(name)
            return float(getattr(base, name) if value is None else value)

        top_k = _integer(body, "top_k", -1)
        return Sampling(
            temperature=number("temperature"),
            top_k=base.top_k if top_k is None else top_k,
            top_p=number("top_p"),
            min_p=number("min_p"),
            presence_penalty=number("presence_penalty"),
            frequency_penalty=number("frequency_penalty"),
            repeat_penalty=number("repeat_penalty"),
            seed=None if seed == -1 else seed,
            bias=bias,
        )

    def _grammar(self, body: Mapping[str, Any]) -> GrammarMatcher | None:
        form = _object(body, "response_format") or {}
        makers: dict[str, Callable[[], GrammarMatcher]] = {}
        if form.get("type") == "json_object":
            makers["response_format"] = lambda: self._compiler.for_schema(
                form.get("schema") or {"type": "object"}
            )
        elif form.get("type") == "json_schema":
            schema = (form.get("json_schema") or {}).get("schema") or form.get("schema")
            if not isinstance(schema, dict):
                raise UsageError("response_format: expected json_schema.schema", hint="give a JSON schema")
            makers["response_format"] = lambda: self._compiler.for_schema(schema)
        elif form.get("type") not in (None, "text"):
            raise UsageError(
                f"response_format: unknown type {form['type']!r}", hint="use text, json_object or json_schema"
            )
        if body.get("json_schema") is not None:
            makers["json_schema"] = lambda: self._compiler.for_schema(body["json_schema"])
        if body.get("grammar"):
            makers["grammar"] = lambda: self._compiler.for_gbnf(str(body["grammar"]))
        if len(makers) > 1:
            raise UsageError(
                f"{' and '.join(makers)}: only one can hold the answer to a form", hint="send one of them"
            )
        return next(iter(makers.values()))() if makers else None


def _refuse_unknown(body: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(name for name, value in body.items() if name not in known and value is not None)
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: not supported by this runtime", hint="leave it out")


def _integer(body: Mapping[str, Any], name: str, lowest: int, highest: int = (1 << 64) - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise UsageError(
            f"{name}: expected a whole number from {lowest}, got {value!r}", hint="see the API's reference"
        )
    return value


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{name}: expected an object", hint="see the API's reference")
    return value


def _bias(value: Any) -> dict[int, float]:
    """OpenAI's object, or llama.cpp's list of [token, bias] with false for a ban."""
    pairs = value.items() if isinstance(value, dict) else (value or ())
    try:
        return {int(token): float("-inf") if bias is False else float(bias) for token, bias in pairs}
    except (TypeError, ValueError) as error:
        raise UsageError(
            "logit_bias: expected token ids with numbers", hint='such as {"1234": -100}'
        ) from error
