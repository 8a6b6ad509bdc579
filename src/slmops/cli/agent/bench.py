"""``slmops agent bench``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from slmops.agent.bench import run_bench
from slmops.agent.facts import use_external_server
from slmops.agent.identity import load_config
from slmops.agent.store.layout import Layout
from slmops.cli.agent.folder import in_folder
from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json


@click.command("bench")
@in_folder
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--decode-tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@json_option
def bench(directory: Path, prompt_tokens: int, decode_tokens: int, repeats: int, as_json: bool) -> None:
    """Measure prefill, decode, time to first token and memory; the agent reports the result at its next check-in.

    \b
    Example:
      slmops agent bench --dir /var/lib/slmops-device
    """
    layout = Layout(directory)
    use_external_server(layout)
    result = asyncio.run(run_bench(layout, load_config(layout), prompt_tokens, decode_tokens, repeats))
    if as_json:
        print_json(result)
        return
    click.echo(
        f"prefill {result.prefill_tps:.1f} tokens/s, decode {result.decode_tps:.1f} tokens/s, "
        f"first token {result.ttft_s * 1000:.0f} ms, "
        f"load {result.load_s:.2f} s, peak RSS {megabytes(result.rss_bytes)}"
    )
