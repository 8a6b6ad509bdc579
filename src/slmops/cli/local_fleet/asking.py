"""One question to a device's API, as an application asks it."""

from __future__ import annotations

import json

import httpx


def ask(client: httpx.Client, model: str, command: str, *, stream: bool) -> tuple[str, str]:
    """One question; returns the answer and the release that gave it.

    Raises:
        ValueError: the stream did not end as it must.
        httpx.HTTPError: anything that a client would call a failed request.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": command}],
        "max_tokens": 48,
        "temperature": 0,
        "stream": stream,
    }
    if not stream:
        response = client.post("/chat/completions", json=body)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"]), response.headers.get(
            "X-Slmops-Release", ""
        )
    pieces: list[str] = []
    with client.stream("POST", "/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        done = False
        for line in response.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(f"the stream broke off: {chunk['error']}")
                pieces += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        if not done:
            raise ValueError("the stream ended without [DONE]")
        return "".join(pieces), response.headers.get("X-Slmops-Release", "")
