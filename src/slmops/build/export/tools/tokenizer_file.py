"""``tokenizer.json`` by the library that slmops' token loop serves with."""

from __future__ import annotations

from pathlib import Path


class TokenizerFile:
    """The tokenizer of an exported folder."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without BOS; texts of control tokens are these tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def own_tokenize(self, text: str) -> list[int]:
        """There is no other."""
        raise NotImplementedError("the engine has no tokenizer of its own")
