"""What steps keep beside their results: pieces of work that another step, or the same with other parameters, does again.

A quantised tensor depends on the tensor, its type and its inputs' statistics, not on the budget that chose the type; so
another byte budget is mostly an assembly of tensors that are known. Keys are digests of everything that a piece depends on,
code included; a piece carries its own digest and is made again when it does not match. Losing the folder loses time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from slmops.artifact.digest import digest_of
from slmops.build.graph import code_digest, tool_versions

_DIGEST_BYTES = 32


class Memo:
    """A folder of pieces, safe to share between processes.

    Args:
        folder: None keeps nothing.
        run: step function, ``module:function``, whose code decides the pieces.
    """

    def __init__(self, folder: Path | None, run: str) -> None:
        self._folder = folder
        self._run = run
        self.made = 0
        self.found = 0

    def piece(self, make: Callable[[], bytes], **parts: str) -> bytes:
        """A piece: found, or made and kept.

        Args:
            make: gives it.
            parts: everything besides code and tools that it depends on, as digests or names.
        """
        if self._folder is None:
            self.made += 1
            return make()
        key = digest_of({"parts": parts, "code": code_digest(self._run), "tools": tool_versions()})
        path = self._folder / key[:2] / key
        with contextlib.suppress(FileNotFoundError):
            stored = path.read_bytes()
            if hashlib.sha256(stored[_DIGEST_BYTES:]).digest() == stored[:_DIGEST_BYTES]:
                self.found += 1
                return stored[_DIGEST_BYTES:]
        self.made += 1
        piece = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as sink:
                sink.write(hashlib.sha256(piece).digest() + piece)
            os.replace(staging, path)
        except OSError:
            Path(staging).unlink(missing_ok=True)
            raise
        return piece
