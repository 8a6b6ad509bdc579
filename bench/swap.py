"""Promise: 0 failed requests across 20 swaps under load. Peer: the same engine stopped and started in place."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from device_world import MODEL, add_release, print_results, result, roll_out, small_model, world

from slmops.cli.demo.load import LoadClient
from slmops.runtimes import EngineSpec, load
from slmops.runtimes.connect import engine_client

SWAPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
CLIENTS = 2


def ours() -> tuple[int, int, float]:
    """(served, failed, seconds) while two releases take turns on a device."""
    with world() as (releases, plane, agent):
        first = add_release(releases, "1.0.0", "You are brief.")
        agent.start()
        roll_out(plane, first, 1)
        load_client = LoadClient(
            {f"client-{i}": agent.url for i in range(CLIENTS)}, MODEL, ["Name a colour.", "Name an animal."]
        )
        load_client.start()
        began = time.monotonic()
        # release_seq must not fall without a grant, so each swap is a release of its own; the weights are the same file.
        for swap in range(SWAPS):
            following = add_release(releases, f"2.0.{swap}", f"You are brief, edition {swap}.")
            roll_out(plane, following, swap + 2)
            print(
                f"swap {swap + 1}/{SWAPS}: {load_client.tally.served} served, {load_client.tally.failed} failed",
                flush=True,
            )
        seconds = time.monotonic() - began
        tally = load_client.stop()
        for problem in tally.problems:
            print(problem)
        return tally.served, tally.failed, seconds


async def stop_and_start() -> tuple[int, int]:
    """(served, failed) of the peer: one engine, stopped and started for each swap, the client on its socket."""
    runtime = load("llama.cpp")
    spec = EngineSpec(
        runtime="llama.cpp", model_path=small_model(), context_tokens=1024, kv_cache="q8_0", ubatch_tokens=64
    )
    served = failed = 0
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="slmops-bench-") as folder:
        engine = await runtime.start(spec, Path(folder))
        await engine.wait_ready(60)

        async def ask_for_ever() -> None:
            nonlocal served, failed
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "Name a colour."}],
                "max_tokens": 48,
            }
            while not stop.is_set():
                try:
                    async with engine_client(engine.socket_path) as client:
                        response = await client.post("/v1/chat/completions", json=body, timeout=60)
                        response.raise_for_status()
                    served += 1
                except httpx.HTTPError:
                    failed += 1
                await asyncio.sleep(0.25)

        askers = [asyncio.create_task(ask_for_ever()) for _ in range(CLIENTS)]
        for _ in range(SWAPS):
            await asyncio.sleep(1.0)
            await engine.stop()
            engine = await runtime.start(spec, Path(folder))
            await engine.wait_ready(60)
        stop.set()
        await asyncio.gather(*askers)
        await engine.stop()
    return served, failed


def main() -> None:
    served, failed, seconds = ours()
    peer_served, peer_failed = asyncio.run(stop_and_start())
    print(f"ours: {served} served in {seconds:.0f} s; peer: {peer_served} served")
    ratio = failed / max(peer_failed, 1)
    print_results(
        "swap",
        [
            result(
                f"failed requests across {SWAPS} swaps",
                failed,
                peer_failed,
                "stop and start in place",
                "requests",
                ratio,
                "0 failed",
                failed == 0 and served > 0,
            )
        ],
    )


if __name__ == "__main__":
    main()
