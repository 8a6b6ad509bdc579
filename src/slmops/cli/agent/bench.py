"""``slmops agent bench``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from slmops.agent.bench import run_bench, run_depth_bench
from slmops.agent.facts import use_external_server
from slmops.agent.identity import load_config
from slmops.agent.store.layout import Layout
from slmops.cli.agent.folder import in_folder
from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table


@click.command("bench")
@in_folder
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--decode-tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--depths", default="", help="tokens before the prompt, such as 0,512,2048: print a profile instead"
)
@json_option
def bench(
    directory: Path, prompt_tokens: int, decode_tokens: int, repeats: int, depths: str, as_json: bool
) -> None:
    """Measure prefill, decode, time to first token and memory; the agent reports the result at its next check-in.

    With --depths: speeds in the middle of long conversations, first token cold and warm, anonymous and file-backed memory, energy
    where the machine counts it. That profile is printed and not reported.

    \b
    Examples:
      slmops agent bench --dir /var/lib/slmops-device
      slmops agent bench --depths 0,512,2048 --json
    """
    layout = Layout(directory)
    use_external_server(layout)
    if depths:
        _profile(layout, depths, prompt_tokens, decode_tokens, repeats, as_json)
        return
    result = asyncio.run(run_bench(layout, load_config(layout), prompt_tokens, decode_tokens, repeats))
    if as_json:
        print_json(result)
        return
    click.echo(
        f"prefill {result.prefill_tps:.1f} tokens/s, decode {result.decode_tps:.1f} tokens/s, "
        f"first token {result.ttft_s * 1000:.0f} ms, "
        f"load {result.load_s:.2f} s, peak RSS {megabytes(result.rss_bytes)}"
    )


def _profile(
    layout: Layout, depths: str, prompt_tokens: int, decode_tokens: int, repeats: int, as_json: bool
) -> None:
    try:
        wanted = [int(depth) for depth in depths.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 0,512,2048, got {depths!r}") from error
    config = load_config(layout)
    found = asyncio.run(run_depth_bench(layout, config, wanted, prompt_tokens, decode_tokens, repeats))
    if as_json:
        click.echo(found.to_json())
        return
    rows = [
        (
            one.depth_tokens,
            one.reason or f"{one.prefill_tps:.1f}",
            "" if one.reason else f"{one.decode_tps:.1f}",
            "" if one.reason else f"{one.ttft_s * 1000:.0f}",
            "" if one.reason else f"{one.busy_ratio:.2f}",
        )
        for one in found.depths
    ]
    print_table(("depth", "prefill tokens/s", "decode tokens/s", "first token ms", "busy"), rows)
    energy = f"{found.energy_j / found.tokens_measured:.3f} J a token" if found.energy_j else found.energy
    click.echo(
        f"first token cold {found.ttft_cold_s * 1000:.0f} ms, warm {found.ttft_warm_s * 1000:.0f} ms; "
        f"memory {megabytes(found.anonymous_bytes)} anonymous and {megabytes(found.file_backed_bytes)} of files, "
        f"peak {megabytes(found.peak_rss_bytes)}; energy {energy}; "
        f"load average {found.load_before:.2f} before, {found.load_after:.2f} after"
    )
