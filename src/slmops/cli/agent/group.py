"""``slmops agent``: the device side."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import click
import httpx
import msgspec

from slmops.agent.bench import run_bench
from slmops.agent.identity import load_config
from slmops.agent.main import EnrollOptions, enroll, order_revert_offline, run_agent, running_pid
from slmops.agent.store.artifacts import ArtifactStore
from slmops.agent.store.journal import read_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_slot
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.cli.connection import json_option
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.device.machine import SlotName
from slmops.core.device.profile import BUILTIN_PROFILES
from slmops.core.errors import UsageError

_DIR = click.option(
    "--dir",
    "directory",
    default=Path("slmops-device"),
    type=click.Path(file_okay=False, path_type=Path),
    envvar="SLMOPS_DEVICE_DIR",
    show_default=True,
    help="The device's folder.",
)


@click.group()
def agent() -> None:
    """One device: enrol it, run it, ask it, take it back."""


@agent.command("enroll")
@click.argument("url")
@click.argument("token", default="-")
@_DIR
@click.option("--profile", required=True, help="Device profile, for example pi5-8gb.")
@click.option("--name", default="", help="Wished name.  [default: host name]")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="For selectors, for example site=hki."
)
@click.option(
    "--listen",
    default="127.0.0.1:8421",
    show_default=True,
    help="Where applications find the model; port 0 picks a free one.",
)
@click.option("--ram-limit-bytes", type=int, help="Memory that slmops may use.  [default: the profile's]")
@click.option("--cpu-cores", type=float, help="CPU share of engines.")
@click.option("--threads", default=1, show_default=True, help="Compute threads of an engine.")
@json_option
def enroll_command(
    url: str,
    token: str,
    directory: Path,
    profile: str,
    name: str,
    labels: tuple[str, ...],
    listen: str,
    ram_limit_bytes: int | None,
    cpu_cores: float | None,
    threads: int,
    as_json: bool,
) -> None:
    r"""Enrol this device at the control plane URL. TOKEN "-" reads it from SLMOPS_ENROLL_TOKEN or standard input.

    \b
    Example:
      slmops device token create | slmops agent enroll http://127.0.0.1:8420 --profile pi5-8gb --dir /var/lib/slmops
    """
    if token == "-":
        token = os.environ.get("SLMOPS_ENROLL_TOKEN") or sys.stdin.readline().strip()
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--listen {listen!r} is not HOST:PORT", hint="write --listen 127.0.0.1:8421")
    known = BUILTIN_PROFILES.get(profile)
    config = enroll(
        EnrollOptions(
            directory=directory,
            server_url=url,
            token=token,
            name=name or os.uname().nodename.lower(),
            profile=profile,
            labels=dict(item.partition("=")[::2] for item in labels),
            gateway_host=host.strip("[]"),
            gateway_port=int(port),
            ram_limit_bytes=ram_limit_bytes or (known.ram_bytes if known is not None else None),
            cpu_cores=cpu_cores,
            threads=threads,
        )
    )
    if as_json:
        print_json(
            {
                "device_id": config.device_id,
                "server_url": config.server_url,
                "profile": config.profile,
                "directory": str(directory),
            }
        )
    else:
        click.echo(f"enrolled as {config.device_id}: slmops agent run --dir {directory}")


@agent.command("run")
@_DIR
def run(directory: Path) -> None:
    """Run the agent: serve what is proved, take what is assigned. Logs are JSON lines on stderr."""
    run_agent(directory)


@agent.command("status")
@_DIR
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Say what this device runs and where it stands; works without the control plane."""
    layout = Layout(directory)
    config = load_config(layout)
    journal = read_journal(layout.journal)
    state = journal.state
    running = _running(layout)
    described = {
        "device": config.device_id,
        "profile": config.profile,
        "phase": state.phase.value,
        "slot": state.committed_slot,
        "committed": _slot_summary(layout, state.committed_slot),
        "previous_kept": state.previous is not None,
        "outcome": msgspec.to_builtins(state.outcome),
        "agent": running,
    }
    if as_json:
        print_json(described)
        return
    committed = described["committed"]
    click.echo(f"{config.device_id} ({config.profile}): {state.phase.value}")
    click.echo(f"  serves: {committed or 'nothing yet'}")
    click.echo(f"  agent:  {'running, ' + str(running.get('url', '')) if running else 'not running'}")
    if state.outcome is not None and state.outcome.failure is not None:
        click.echo(
            f"  last:   {state.outcome.status}: {state.outcome.failure.code}: {state.outcome.failure.detail}"
        )


@agent.command("revert")
@_DIR
def revert(directory: Path) -> None:
    """Go back to the previous release, with no network needed."""
    layout = Layout(directory)
    load_config(layout)
    pid = running_pid(layout)
    if pid is not None:
        os.kill(pid, signal.SIGUSR1)
        click.echo("the running agent was told to go back: slmops agent status")
        return
    click.echo(order_revert_offline(layout))


@agent.command("bench")
@_DIR
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--decode-tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@json_option
def bench(directory: Path, prompt_tokens: int, decode_tokens: int, repeats: int, as_json: bool) -> None:
    """Measure prefill, decode, time to first token and memory; the agent reports the result at its next check-in."""
    layout = Layout(directory)
    result = asyncio.run(run_bench(layout, load_config(layout), prompt_tokens, decode_tokens, repeats))
    if as_json:
        print_json(result)
        return
    click.echo(
        f"prefill {result.prefill_tps:.1f} tokens/s, decode {result.decode_tps:.1f} tokens/s, "
        f"first token {result.ttft_s * 1000:.0f} ms, "
        f"load {result.load_s:.2f} s, peak RSS {megabytes(result.rss_bytes)}"
    )


@agent.command("cache")
@_DIR
@click.option("--prune", is_flag=True, help="Remove what no slot needs.")
@json_option
def cache(directory: Path, prune: bool, as_json: bool) -> None:
    """Show the files that this device keeps, and what needs them."""
    layout = Layout(directory)
    load_config(layout)
    wanted: dict[str, list[str]] = {}
    for name in _SLOTS:
        slot = read_slot(layout, name)
        for artifact in slot.artifacts if slot is not None else ():
            wanted.setdefault(artifact.sha256, []).append(f"{name}:{artifact.role}")
    if prune:
        if running_pid(layout) is not None:
            raise UsageError(
                "the agent is running and keeps this folder tidy by itself",
                hint="stop the agent first, or let it be",
            )
        freed = ArtifactStore(layout).collect_garbage(wanted)
        click.echo(f"{megabytes(freed)} removed")
        return
    files = sorted(((path.stat().st_size, path.name) for path in layout.artifacts.iterdir()), reverse=True)
    if as_json:
        print_json([{"file": name, "bytes": size, "needed_by": wanted.get(name, [])} for size, name in files])
        return
    rows = [(name[:20], megabytes(size), ", ".join(wanted.get(name, ["nothing"]))) for size, name in files]
    print_table(("file", "size", "needed by"), rows, empty="no files")


_SLOTS: tuple[SlotName, SlotName] = ("a", "b")


def _slot_summary(layout: Layout, name: SlotName | None) -> str:
    slot = read_slot(layout, name) if name is not None else None
    return (
        f"{slot.model_name}@{slot.assignment.version} ({slot.assignment.release_sha256[:12]})"
        if slot is not None
        else ""
    )


def _running(layout: Layout) -> dict[str, object]:
    """Process and health of the running agent; empty when none runs."""
    if running_pid(layout) is None:
        return {}
    try:
        found = msgspec.json.decode((layout.root / "run.json").read_bytes(), type=dict[str, object])
        health = httpx.get(
            f"{str(found['url']).removesuffix('/v1')}/health", timeout=5.0, trust_env=False
        ).json()
    except (OSError, *UNREADABLE_JSON, httpx.HTTPError, KeyError, ValueError):
        return {"pid": running_pid(layout)}
    return {**found, "health": health}
