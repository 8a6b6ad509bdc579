"""A small OpenAI-compatible server as a program of its own: what an owner's server of the runtime `external` may be like.

`python -m slmops.testing.openai_server --model FILE --name NAME (--port N | --socket PATH) [--behave HOW]`: chat,
completions and models over a fake model file (`slmops.testing.engine`), no tokens, no scores. It can misbehave:

- ``exit``: ends at once; ``late``: listens after a second; ``deaf``: never listens; ``hang``: answers nothing at all
  from the first question after its trial on; ``other``: serves another model; ``cut``: cuts overlong prompts without a word;
  ``wordy``: ignores max_tokens; ``child``: goes on in a child process, as wrapper scripts do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

_CONTEXT_WORDS = 500


class _UnixServer(ThreadingHTTPServer):
    """The same over a Unix socket."""

    address_family = UnixStreamServer.address_family

    def server_bind(self) -> None:
        """Without the host's name, which a socket has not."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0


class _Handler(BaseHTTPRequestHandler):
    options: argparse.Namespace
    answers: dict[str, str]
    default_answer: str
    tried = threading.Event()
    silent = threading.Event()

    def log_message(self, format: str, *args: object) -> None:
        """Writes what it was asked, as careless servers do: nothing of it may be kept."""

    def do_GET(self) -> None:
        """Models and health."""
        self._hang()
        name = "another-model" if self.options.behave == "other" else self.options.name
        if self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
        else:
            self._answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        """Generation."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._answer(404, {"error": {"type": "not_found_error", "message": f"no {self.path}"}})
            return
        if self.headers.get("Authorization") != f"Bearer {os.environ.get('OPENAI_SERVER_KEY', '')}":
            self._answer(401, {"error": {"type": "authentication_error", "message": "wrong key"}})
            return
        if self.options.behave == "hang" and self.tried.is_set():
            self.silent.set()
        self._hang()
        question = str(body["messages"][-1]["content"])
        print(f"asked: {question[:200]}", flush=True)
        words = len(question.split())
        if words > _CONTEXT_WORDS and self.options.behave != "cut":
            message = f"request ({words} tokens) exceeds the available context size ({_CONTEXT_WORDS} tokens)"
            error = {"code": 400, "type": "exceed_context_size_error", "message": message}
            self._answer(400, {"error": error})
            self.tried.set()  # it is the last thing that a trial asks
            return
        found = [key for key in self.answers if key in question]
        words_said = (self.answers[max(found, key=len)] if found else self.default_answer).split(" ")
        limit = len(words_said) if self.options.behave == "wordy" else int(body.get("max_tokens", 100))
        said = " ".join(words_said[:limit])
        finish = "stop" if limit >= len(words_said) else "length"
        self._say(body, said, finish, words)

    def _say(self, body: dict[str, Any], said: str, finish: str, prompt_tokens: int) -> None:
        head = {"id": "chatcmpl-1", "created": 0, "model": self.options.name}
        made = len(said.split(" "))
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
        }
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish}
            self._answer(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for delta, reason in (({"content": said}, None), ({}, finish)):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            part = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(b"data: " + json.dumps(part).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _hang(self) -> None:
        if self.silent.is_set():
            threading.Event().wait()

    def _answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--name", "--port", "--socket", "--answers"):
        parser.add_argument(name, default="")
    parser.add_argument("--behave", default="")
    options = parser.parse_args()
    if options.behave == "exit":
        print("error: no such device: gpu0", flush=True)
        return 7
    if options.behave == "child":
        command = [one for one in sys.argv[1:] if one not in ("--behave", "child")]
        return subprocess.call([sys.executable, "-m", "slmops.testing.openai_server", *command])
    if options.behave == "late":
        time.sleep(1.0)
    if options.behave == "deaf":
        threading.Event().wait()
    script = json.loads(Path(options.answers).read_text(encoding="utf-8")) if options.answers else {}
    _Handler.options = options
    _Handler.answers = dict(script.get("answers", {}))
    _Handler.default_answer = str(script.get("default_answer", "I do not know."))
    if options.socket:
        server: ThreadingHTTPServer = _UnixServer(options.socket, _Handler)
    else:
        server = ThreadingHTTPServer(("127.0.0.1", int(options.port)), _Handler)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
