"""Promise: decode through the gateway runs at >= 0.98 x the bare engine; time to first token grows by <= 3 ms.

Both sides talk to the same engine process, in turns, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import httpx
from device_world import MODEL, add_release, print_results, result, roll_out, world

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
DECODE_TOKENS = 96


def stream(client: httpx.Client, path: str, turn: int) -> tuple[float, float]:
    """One streamed answer: (seconds to the first token, tokens per second after it)."""
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": f"Count upwards from {turn}."},
        ],
        "max_tokens": DECODE_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began = time.perf_counter()
    first = last = 0.0
    pieces = 0
    with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                last = time.perf_counter()
                first = first or last
                pieces += 1
    return first - began, (pieces - 1) / (last - first)


def engine_socket(folder: Path) -> Path:
    """The engine's own socket, straight from the device's folder."""
    found = [path for path in folder.rglob("*") if path.is_socket() and "score" not in path.name]
    if len(found) != 1:
        raise SystemExit(f"expected one engine socket below {folder}, found {found}")
    return found[0]


def main() -> None:
    with world() as (releases, plane, agent):
        made = add_release(releases, "1.0.0", "You are brief.")
        agent.start()
        roll_out(plane, made, 1)
        plane.poll_s = 30.0  # a device's usual pace
        bare = httpx.Client(
            # no kept connections, as in runtimes/connect.py: the engine closes them after every stream
            transport=httpx.HTTPTransport(
                uds=str(engine_socket(agent.layout.engines)), limits=httpx.Limits(max_keepalive_connections=0)
            ),
            base_url="http://engine",
            timeout=120,
        )
        ours = httpx.Client(base_url=agent.url.removesuffix("/v1"), timeout=120, trust_env=False)
        samples: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
        path = "/v1/chat/completions"
        stream(bare, path, 100), stream(ours, path, 101)
        for turn in range(1, ROUNDS + 1):
            order = [("bare", bare), ("ours", ours)] if turn % 2 else [("ours", ours), ("bare", bare)]
            for offset, (name, client) in enumerate(order):
                samples[name].append(stream(client, path, 100 + 2 * turn + offset))
                print(
                    f"round {turn} {name}: first token {samples[name][-1][0] * 1000:.1f} ms, {samples[name][-1][1]:.1f} tokens/s",
                    flush=True,
                )
        bare.close(), ours.close()
    tps = {name: statistics.median(t for _, t in values) for name, values in samples.items()}
    ratio = statistics.median(o / b for (_, o), (_, b) in zip(samples["ours"], samples["bare"], strict=True))
    added = (
        statistics.median(o - b for (o, _), (b, _) in zip(samples["ours"], samples["bare"], strict=True))
        * 1000
    )
    ttft = {name: statistics.median(t for t, _ in values) * 1000 for name, values in samples.items()}
    print_results(
        "gateway",
        [
            result(
                "decode",
                tps["ours"],
                tps["bare"],
                "the same engine without the gateway",
                "tokens/s",
                ratio,
                ">= 0.98",
                ratio >= 0.98,
            ),
            result(
                "added time to first token",
                ttft["ours"],
                ttft["bare"],
                "the same engine without the gateway",
                "ms",
                ttft["ours"] / ttft["bare"],
                f"<= 3 ms added (median of pairs: {added:.2f} ms)",
                added <= 3,
            ),
        ],
    )


if __name__ == "__main__":
    main()
