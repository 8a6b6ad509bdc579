"""How a rollout is printed."""

from __future__ import annotations

import click

from slmops.cli.output import print_table
from slmops.client.records import RolloutDetail


def progress_line(found: RolloutDetail) -> str:
    """One line that says where a rollout stands."""
    c = found.counts
    wave = f"wave {found.wave + 1}/{found.waves_total}" if found.wave >= 0 else "not begun"
    failed = c.failed + c.presumed_failed
    counts = f"{c.committed} committed, {c.in_flight} in flight, {failed} failed, {c.untouched} untouched"
    rare = (
        ("reverted", c.reverted),
        ("refused", c.refused),
        ("withdrawn", c.withdrawn),
        ("not reached", c.not_reached),
    )
    counts += "".join(f", {number} {word}" for word, number in rare if number)
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
