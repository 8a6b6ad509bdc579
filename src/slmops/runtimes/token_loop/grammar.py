"""Answers held to a JSON Schema or a grammar, by `llguidance` (MIT): it says which tokens may come next.

Imported with the first request that needs it; its tables of a vocabulary of 49,152 take some 15 MB and are made once.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.core.errors import UsageError

#: Between JSON's tokens: nothing, a space, or a line break with some indent. With unlimited room a small model may
#: fill the answer with it.
_JSON = {"whitespace_pattern": r"( |\n[ \t]{0,8})?"}


class GrammarCompiler:
    """Makes matchers for one tokenizer.

    Args:
        tokenizer: ``tokenizer.json``.
        vocab_tokens: width of the logits.
        eos_tokens: ids that end an answer.
    """

    def __init__(self, tokenizer: Path, vocab_tokens: int, eos_tokens: tuple[int, ...]) -> None:
        self._path = tokenizer
        self._vocab_tokens = vocab_tokens
        self._eos_tokens = eos_tokens
        self._lock = threading.Lock()
        self._tables: Any = None

    def for_schema(self, schema: dict[str, Any]) -> GrammarMatcher:
        """Whatever fits a JSON Schema.

        Raises:
            UsageError: the schema cannot be held.
        """
        from llguidance import LLMatcher  # noqa: PLC0415 - only requests with a schema pay for it

        try:
            return self._matcher(
                LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON), "the JSON schema"
            )
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be held: {error}", hint="simplify it") from error

    def for_gbnf(self, text: str) -> GrammarMatcher:
        """Whatever fits a grammar in llama.cpp's notation.

        Raises:
            UsageError: it is no grammar.
        """
        from llguidance import LLMatcher  # noqa: PLC0415
        from llguidance.gbnf_to_lark import any_to_lark  # noqa: PLC0415

        try:
            lark = any_to_lark(text)
        except Exception as error:
            raise UsageError(
                f"the grammar cannot be read: {error}", hint="write it in GBNF or Lark"
            ) from error
        return self._matcher(LLMatcher.grammar_from_lark(lark), "the grammar")

    def _matcher(self, grammar: str, what: str) -> GrammarMatcher:
        from llguidance import LLMatcher, LLTokenizer  # noqa: PLC0415

        with self._lock:
            if self._tables is None:
                eos = list(self._eos_tokens)
                self._tables = LLTokenizer(str(self._path), n_vocab=self._vocab_tokens, eos_token=eos)
        problem = LLMatcher.validate_grammar(grammar, self._tables)
        if problem and not problem.startswith("WARNING"):
            raise UsageError(f"{what} cannot be held: {problem.splitlines()[0]}", hint="simplify it")
        return GrammarMatcher(LLMatcher(self._tables, grammar, log_level=0), self._vocab_tokens)


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_tokens: int) -> None:
        from llguidance.numpy import allocate_token_bitmask  # noqa: PLC0415

        self._matcher = matcher
        self._vocab_tokens = vocab_tokens
        self._bits = allocate_token_bitmask(1, vocab_tokens)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, shape (vocab,).

        Raises:
            RuntimeError: the grammar became too complex on the way.
        """
        from llguidance.numpy import fill_next_token_bitmask  # noqa: PLC0415

        fill_next_token_bitmask(self._matcher, self._bits, 0)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self._matcher.get_error()}")
        bits = np.unpackbits(
            self._bits.view(np.uint8).reshape(-1), bitorder="little", count=self._vocab_tokens
        )
        return bits.astype(np.bool_)

    def accept(self, token: int) -> bool:
        """Take a token that was allowed; tell whether the answer is complete and nothing may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
