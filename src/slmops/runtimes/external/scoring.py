"""Teacher-forced log-probabilities from a server that only generates, one token a question.

llama-server cannot score a text. It does report, for a token that it generated, that token's log-probability and
those of the likeliest ones under the unbiased distribution. So each position is asked for one token, with a bias that
leaves no choice but the token that is really there: what is reported of it is what we want to know. The prompt stays
in one slot's cache, so that a position costs one token's work.

A token that is no whole character is held back by the server or refused, and with it what is known of it. There another
token is forced, and the wanted one is looked up among the likeliest, or among all of them when it has to be.

Source: llama.cpp, tools/server/server-context.cpp (`populate_token_probs` reads the logits before any sampler).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from slmops.core.errors import HealthCheckError, UsageError
from slmops.runtimes.external.upstream import Upstream
from slmops.runtimes.llama_cpp.native import check_token_ids
from slmops.runtimes.ports import Score

_BIAS = 1e9
_SLOT = 0
_MAX_TOP_K = 100
#: tokens among which a held-back one is looked for first
_LOOKED_AT = 1000
#: what it answers when what was forced is the middle of a character
_NO_TEXT = 500


class Scorer:
    """Scores through one slot of a llama-server; one score at a time."""

    def __init__(self, upstream: Upstream, *, vocab_tokens: int, context_tokens: int) -> None:
        self._upstream = upstream
        self._vocab_tokens = vocab_tokens
        self._context_tokens = context_tokens
        self._lock = threading.Lock()
        self._plain: int | None = None

    def score(self, token_ids: Sequence[int], *, start: int, top_k: int) -> Score:
        """See `Engine.score`.

        Raises:
            UsageError: what is asked cannot be scored.
            HealthCheckError: the server does not answer as a llama-server does.
        """
        if not 0 <= top_k <= _MAX_TOP_K:
            raise UsageError(
                f"top_k: expected 0..{_MAX_TOP_K}, got {top_k}", hint="ask for fewer alternatives"
            )
        check_token_ids(
            token_ids, vocab_tokens=self._vocab_tokens, context_tokens=self._context_tokens, start=start
        )
        logprobs: list[float] = []
        ranked: list[tuple[tuple[int, float], ...]] = []
        with self._lock:
            for position in range(start, len(token_ids)):
                # The first position computes the whole prompt anew: what a cache held before cannot change the result.
                value, row = self._position(token_ids, position, max(top_k, 1), cached=position > start)
                logprobs.append(value)
                ranked.append(row)
        return Score(
            start,
            tuple(logprobs),
            tuple(row[0][0] for row in ranked),
            tuple(row[0][1] for row in ranked),
            tuple(row[:top_k] for row in ranked) if top_k else (),
        )

    def _position(
        self, token_ids: Sequence[int], position: int, top_k: int, *, cached: bool
    ) -> tuple[float, tuple[tuple[int, float], ...]]:
        wanted = token_ids[position]
        forced = self._forced(token_ids, position, wanted, top_k, cached=cached)
        if forced is not None and len(forced[1]) == top_k:
            return forced
        for looked_at in (_LOOKED_AT, self._vocab_tokens):
            forced = self._forced(token_ids, position, self._plain_token(), looked_at, cached=True)
            row = forced[1] if forced is not None else ()
            for token, logprob in row:
                if token == wanted:
                    return logprob, row[:top_k]
        raise HealthCheckError(
            f"the external server tells nothing of the token at position {position}",
            hint='its API is not llama-server\'s: declare "like": "openai"',
        )

    def _plain_token(self) -> int:
        """A token that is a whole character."""
        if self._plain is None:
            _, answer = self._upstream.post("/tokenize", {"content": "a", "add_special": False})
            self._plain = int(answer["tokens"][0])
        return self._plain

    def _forced(
        self, token_ids: Sequence[int], position: int, wanted: int, top_k: int, *, cached: bool
    ) -> tuple[float, tuple[tuple[int, float], ...]] | None:
        """Log-probability of ``wanted``, forced, and the likeliest tokens there; None when it is no text by itself."""
        body = {
            "prompt": list(token_ids[:position]),
            "n_predict": 1,
            "n_probs": top_k,
            "temperature": 0,
            "logit_bias": [[wanted, _BIAS]],
            "cache_prompt": cached,
            "id_slot": _SLOT,
        }
        try:
            status, answer = self._upstream.post("/completion", body)
            if status == _NO_TEXT or (status == 200 and not answer.get("completion_probabilities")):
                return None
            (said,) = answer["completion_probabilities"]
            row = tuple((int(one["id"]), float(one["logprob"])) for one in said["top_logprobs"])
            if status == 200 and int(said["id"]) == wanted:
                return float(said["logprob"]), row
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HealthCheckError(
                f"the external server could not score position {position}: {type(error).__name__}",
                hint="is it a llama-server? declare like: openai when it is not",
            ) from error
        raise HealthCheckError(
            f"the external server did not report the token that it was made to say at position {position}",
            hint='its API is not llama-server\'s: declare "like": "openai"',
        )
