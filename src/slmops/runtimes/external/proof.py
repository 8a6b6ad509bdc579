"""Is the server what its owner declared? Asked once, when it has come up, before anybody is served.

A server that ignores what it was asked, or that is another one, would pass for the release. So each declared fact
that an answer depends on is tried: who listens, which model, which context, how an overlong prompt ends, that it
generates, and (where declared) that it gives tokens, log-probabilities and embeddings.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.artifact.gguf_layout import GgufLayout, parse_gguf
from slmops.core.errors import SlmopsError
from slmops.runtimes.external.scoring import Scorer
from slmops.runtimes.external.upstream import Upstream, owns_port

#: a server may round its context up to a whole block of its cache
_CONTEXT_PADDING_TOKENS = 256
#: names of other models in an error, at most
_NAMED = 4


class NotAsDeclared(Exception):
    """What is wrong, in words for the device's owner."""


def read_layout(path: Path) -> GgufLayout:
    """Header of the model file.

    Raises:
        SlmopsError: it is not a whole GGUF.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return parse_gguf(content, path.name)


class Proof:
    """The trial of one server.

    Args:
        upstream: how to reach it.
        spec: fields of `EngineSpec`.
        like: `ExternalConfig.like`.
        layout: header of the model that it must serve.
    """

    def __init__(self, upstream: Upstream, spec: dict[str, Any], like: str, layout: GgufLayout) -> None:
        self._upstream = upstream
        self._spec = spec
        self._llama = like == "llama-server"
        self._layout = layout
        self.name = str(spec["model_alias"] or Path(spec["model_path"]).stem)

    def run(self, pids: Sequence[int]) -> Scorer | None:
        """Try everything; gives what scores, or None when nothing does.

        Args:
            pids: processes of the server: one of them must be the one that listens.

        Raises:
            NotAsDeclared: the first thing that is not as declared.
        """
        port = self._upstream.address.port
        if port and not owns_port(pids, port):
            raise NotAsDeclared(f"another process answers on port {port}: the server did not get it")
        try:
            card = self._model_card()
            scorer = self._llama_server(card) if self._llama else None
            self._generates()
            self._refuses_overlong()
            if self._spec["embeddings"]:
                self._embeds()
        except OSError as error:
            raise NotAsDeclared(f"it stopped answering while it was tried: {error}") from error
        return scorer

    def _model_card(self) -> dict[str, Any]:
        status, listed = self._upstream.get("/v1/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if status != 200 or not isinstance(cards, list):
            raise NotAsDeclared(f"GET /v1/models answers {status}, not a list of models")
        names = [str(card.get("id")) for card in cards if isinstance(card, dict)]
        for card in cards:
            if isinstance(card, dict) and card.get("id") == self.name:
                return card
        raise NotAsDeclared(
            f"it serves another model: {', '.join(names[:_NAMED]) or 'none'}, not {self.name!r} "
            "(give it that name by {model_name} in the command, such as -a {model_name})"
        )

    def _llama_server(self, card: dict[str, Any]) -> Scorer:
        """Facts that only a llama-server states, and its scores."""
        meta = card.get("meta") or {}
        shape = self._layout.shape()
        if (vocabulary := int(meta.get("n_vocab", -1))) != shape.vocabulary:
            raise NotAsDeclared(
                f"it serves another model: {vocabulary} tokens in its vocabulary, not {shape.vocabulary}"
            )
        if (parameters := int(meta.get("n_params", -1))) != shape.parameters:
            raise NotAsDeclared(f"it serves another model: {parameters} parameters, not {shape.parameters}")
        status, props = self._upstream.get("/props")
        if status != 200 or not isinstance(props, dict):
            raise NotAsDeclared(f"GET /props answers {status}: it is not a llama-server")
        self._sizes(props)
        status, answer = self._upstream.post("/tokenize", {"content": "a lamp, and another lamp"})
        tokens = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
        if not isinstance(tokens, list) or len(tokens) < 2:
            raise NotAsDeclared("POST /tokenize gives no token ids: it is not a llama-server")
        scorer = Scorer(
            self._upstream, vocab_tokens=shape.vocabulary, context_tokens=int(self._spec["context_tokens"])
        )
        try:
            score = scorer.score([int(token) for token in tokens], start=1, top_k=1)
        except SlmopsError as error:
            raise NotAsDeclared(f"it cannot score: {error.message}") from error
        if not all(math.isfinite(value) and value <= 1e-3 for value in score.logprobs):
            raise NotAsDeclared("its log-probabilities are none")
        return scorer

    def _sizes(self, props: dict[str, Any]) -> None:
        slots, wanted_slots = int(props.get("total_slots", 0)), int(self._spec["slots"])
        if slots < wanted_slots:
            raise NotAsDeclared(
                f"it serves {slots} requests at the same time, {wanted_slots} are assigned (put {{slots}} into the command)"
            )
        has = int((props.get("default_generation_settings") or {}).get("n_ctx", 0))
        wanted = min(int(self._spec["context_tokens"]), self._layout.number("context_length"))
        if not wanted <= has < wanted + _CONTEXT_PADDING_TOKENS:
            raise NotAsDeclared(
                f"each of its slots has a context of {has} tokens, {wanted} are assigned "
                "(put {total_context_tokens}, which is all slots', into the command)"
            )

    def _generates(self) -> None:
        body = {**self._question("hello"), "max_tokens": 1}
        status, answer = self._upstream.post("/v1/chat/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if status != 200 or not choices:
            raise NotAsDeclared(f"POST /v1/chat/completions answers {status}: it does not generate")
        used = (answer.get("usage") or {}).get("completion_tokens")
        if isinstance(used, int) and used > 1:
            raise NotAsDeclared(f"asked for 1 token it made {used}: it ignores max_tokens")

    def _refuses_overlong(self) -> None:
        words = int(self._spec["context_tokens"]) + 64  # a word is at least a token
        body = {**self._question("hello " * words), "max_tokens": 1}
        status, _ = self._upstream.post("/v1/chat/completions", body)
        if not 400 <= status < 500:
            raise NotAsDeclared(
                f"a prompt of more than {self._spec['context_tokens']} tokens is answered with {status}, not refused: "
                "it was cut, or the context is not the assigned one"
            )

    def _embeds(self) -> None:
        status, answer = self._upstream.post("/v1/embeddings", {"input": ["hello"], "model": self.name})
        try:
            row = [float(value) for value in answer["data"][0]["embedding"]]
        except (KeyError, IndexError, TypeError, ValueError):
            row = []
        if status != 200 or abs(sum(value * value for value in row) - 1.0) > 1e-2:
            raise NotAsDeclared(f"POST /v1/embeddings answers {status} without a unit vector")

    def _question(self, text: str) -> dict[str, Any]:
        return {"model": self.name, "messages": [{"role": "user", "content": text}], "temperature": 0}
