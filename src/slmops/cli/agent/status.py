"""``slmops agent status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import httpx
import msgspec

from slmops.agent.identity import DeviceConfig, load_config
from slmops.agent.main import running_pid
from slmops.agent.store.journal import read_journal
from slmops.agent.store.layout import Layout
from slmops.agent.store.slots import read_slot
from slmops.artifact.digest import UNREADABLE_JSON
from slmops.cli.agent.folder import in_folder
from slmops.cli.connection import json_option
from slmops.cli.output import print_json
from slmops.core.device.machine import SlotName


@click.command("status")
@in_folder
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Say what this device runs and where it stands; works without the control plane.

    \b
    Example:
      slmops agent status --dir /var/lib/slmops-device --json
    """
    layout = Layout(directory)
    config = load_config(layout)
    journal = read_journal(layout.journal)
    state = journal.state
    running = _running(layout, config)
    committed = _slot_summary(layout, state.committed_slot)
    described = {
        "device": config.device_id,
        "profile": config.profile,
        "phase": state.phase.value,
        "slot": state.committed_slot,
        "committed": committed,
        "serves": _serves(running)[0],
        "previous_kept": state.previous is not None,
        "outcome": msgspec.to_builtins(state.outcome),
        "agent": running,
    }
    if as_json:
        print_json(described)
        return
    serves, why = _serves(running)
    click.echo(f"{config.device_id} ({config.profile}): {state.phase.value}")
    click.echo(f"  serves: {serves or 'nothing'}{f' ({why})' if why else ''}")
    click.echo(f"  proved: {committed or 'nothing yet'}")
    click.echo(f"  agent:  {'running, ' + str(running.get('url', '')) if running else 'not running'}")
    if state.outcome is not None and state.outcome.failure is not None:
        click.echo(
            f"  last:   {state.outcome.status}: {state.outcome.failure.code}: {state.outcome.failure.detail}"
        )


def _serves(running: dict[str, Any]) -> tuple[str, str]:
    """The release that answers now, and what there is to say about it: by the running agent's word, not by the journal's."""
    if not running:
        return "", "the agent does not run"
    health: dict[str, Any] = running.get("health", {})
    if not health:
        return "", "the agent does not answer"
    if health.get("status") != "ok":
        return "", str(health.get("why") or f"it is {health.get('phase')}: {health.get('status')}")
    return str(health.get("release", "")), str(health.get("stands_in", ""))


def _slot_summary(layout: Layout, name: SlotName | None) -> str:
    slot = read_slot(layout, name) if name is not None else None
    return (
        f"{slot.model_name}@{slot.assignment.version} ({slot.assignment.release_sha256[:12]})"
        if slot is not None
        else ""
    )


def _running(layout: Layout, config: DeviceConfig) -> dict[str, Any]:
    """Process and health of the running agent; empty when none runs."""
    pid = running_pid(layout)
    if pid is None:
        return {}
    found: dict[str, Any] = {"pid": pid}
    try:
        found |= msgspec.json.decode((layout.root / "run.json").read_bytes(), type=dict[str, Any])
    except (OSError, *UNREADABLE_JSON):  # a full disk, perhaps: the settings name the port as well
        if config.gateway_port:
            found["url"] = f"http://{config.gateway_host}:{config.gateway_port}/v1"
    try:
        base = str(found["url"]).removesuffix("/v1")
        health = httpx.get(f"{base}/health", timeout=5.0, trust_env=False).json()
    except (httpx.HTTPError, KeyError, ValueError):
        return found
    return {**found, "health": health}
