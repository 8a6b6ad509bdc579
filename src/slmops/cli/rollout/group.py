"""``slmops rollout``: watch waves, and act on them."""

from __future__ import annotations

import time
from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import print_json, print_table
from slmops.client.records import RolloutDetail
from slmops.core.errors import EXIT_GATE
from slmops.core.rollout.machine import ENDED, Phase

_GOOD_ENDS = frozenset({Phase.COMPLETED.value, Phase.COMPLETED_PARTIAL.value})
_ENDED = frozenset(phase.value for phase in ENDED)


@click.group()
def rollout() -> None:
    """Rollouts: list, show, watch, approve, pause, resume, abort, rollback."""


@rollout.command("list")
@with_server
@json_option
def list_command(server: str, token_file: Path | None, as_json: bool) -> None:
    """List rollouts, newest first."""
    with connect(server, token_file) as plane:
        found = plane.rollouts()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            r.id,
            r.blueprint,
            f"{r.model}@{r.version}",
            r.phase,
            f"{r.wave + 1}/{r.waves_total}",
            r.counts.committed,
            r.counts.reverted + r.counts.failed,
            r.counts.untouched,
            r.reason,
        )
        for r in found
    ]
    print_table(
        ("rollout", "blueprint", "release", "phase", "wave", "committed", "failed", "untouched", "why"),
        rows,
        empty="no rollouts yet",
    )


@rollout.command("show")
@click.argument("rollout_id")
@with_server
@json_option
def show(rollout_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show one rollout: waves, devices, findings."""
    with connect(server, token_file) as plane:
        found = plane.rollout(rollout_id)
    print_json(found) if as_json else print_rollout(found)


@rollout.command("watch")
@click.argument("rollout_id")
@click.option("--every-s", default=1.0, show_default=True, help="How often to look, seconds.")
@with_server
def watch(rollout_id: str, every_s: float, server: str, token_file: Path | None) -> None:
    """Follow a rollout until it ends; exit code 5 when it did not complete."""
    with connect(server, token_file) as plane:
        seen = ""
        while True:
            found = plane.rollout(rollout_id)
            line = progress_line(found)
            if line != seen:
                click.echo(line)
                seen = line
            if found.phase in _ENDED:
                print_rollout(found)
                raise SystemExit(0 if found.phase in _GOOD_ENDS else EXIT_GATE)
            time.sleep(every_s)


def _action(name: str, text: str) -> None:
    @rollout.command(name, help=text)
    @click.argument("rollout_id")
    @click.option("--reason", default="", help="Why; kept in the audit trail.")
    @with_server
    @json_option
    def act(rollout_id: str, reason: str, server: str, token_file: Path | None, as_json: bool) -> None:
        with connect(server, token_file) as plane:
            found = plane.rollout_action(rollout_id, name, reason)
        print_json(found) if as_json else click.echo(f"{found.id}: {found.phase} {found.reason}".rstrip())


for _name, _text in {
    "approve": "Approve a rollout that waits for it.",
    "reject": "Say no to a rollout that waits for approval.",
    "pause": "Stop offering; what devices have stays.",
    "resume": "Let a paused rollout go on.",
    "abort": "Stop; exposed devices are treated by the blueprint's on_abort.",
    "rollback": "Take every device that this rollout touched back.",
}.items():
    _action(_name, _text)


def progress_line(found: RolloutDetail) -> str:
    """One line that says where a rollout stands."""
    c = found.counts
    wave = f"wave {found.wave + 1}/{found.waves_total}" if found.wave >= 0 else "not begun"
    failed = c.reverted + c.failed
    counts = f"{c.committed} committed, {c.in_flight} in flight, {failed} failed, {c.untouched} untouched"
    return f"{found.id} {found.phase:<14} {wave}: {counts}"


def print_rollout(found: RolloutDetail) -> None:
    """A rollout for people."""
    click.echo(progress_line(found))
    if found.reason:
        click.echo(f"  why: {found.reason}")
    for finding in found.findings:
        click.echo(f"  {finding.verdict:<12} {finding.gate}: {finding.reason}")
    rows = [
        (
            m.wave + 1,
            m.device_id,
            m.profile,
            m.variant or "-",
            m.status,
            m.phase,
            f"{m.code} {m.detail}".strip() or "-",
        )
        for w in found.waves
        for m in w.devices
    ]
    print_table(
        ("wave", "device", "profile", "variant", "status", "phase", "detail"), rows, empty="  no devices"
    )
