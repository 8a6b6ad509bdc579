"""``slmops device``: the fleet's devices, as the control plane knows them."""

from __future__ import annotations

from pathlib import Path

import click

from slmops.cli.connection import connect, json_option, with_server
from slmops.cli.output import megabytes, print_json, print_table
from slmops.core.errors import UsageError


@click.group()
def device() -> None:
    """Devices: list, show, label, retire, enrolment tokens."""


@device.command("list")
@click.option("--selector", default="", help="For example: profile = pi5-8gb and site != lab.")
@with_server
@json_option
def list_command(selector: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """List devices."""
    with connect(server, token_file) as plane:
        found = plane.devices(selector)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            d.id,
            d.profile,
            d.release or "-",
            d.phase or "never seen",
            d.last_seen_at or "-",
            d.requests,
            d.failed_requests,
        )
        for d in found
    ]
    print_table(
        ("device", "profile", "release", "phase", "last seen", "requests", "failed"),
        rows,
        empty="no devices: slmops device token create",
    )


@device.command("show")
@click.argument("device_id")
@with_server
@json_option
def show(device_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Show one device with its facts and its history."""
    with connect(server, token_file) as plane:
        found = plane.device(device_id)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"{found.id} ({found.profile}, {found.state}): {found.phase or 'never seen'}, release {found.release or '-'}"
    )
    click.echo(f"labels: {', '.join(f'{k}={v}' for k, v in sorted(found.labels.items())) or '-'}")
    facts = found.facts
    click.echo(
        f"facts: {facts.arch}, {facts.cores} cores, {megabytes(facts.ram_limit_bytes)} RAM allowed, "
        f"{megabytes(facts.disk_free_bytes)} disk free"
    )
    if facts.bench is not None:
        click.echo(
            f"bench: {facts.bench.decode_tps:.1f} decode tokens/s, {facts.bench.prefill_tps:.1f} prefill, "
            f"RSS {megabytes(facts.bench.rss_bytes)}"
        )
    rows = [(o.received_at, o.status, o.code or "-", o.detail) for o in found.outcomes]
    print_table(("when", "outcome", "code", "detail"), rows, empty="no outcomes yet")


@device.command("label")
@click.argument("device_id")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE...")
@with_server
@json_option
def label(
    device_id: str, labels: tuple[str, ...], server: str, token_file: Path | None, as_json: bool
) -> None:
    r"""Set labels (KEY=VALUE) or remove them (KEY-).

    \b
    Example:
      slmops device label kitchen-1 canary=always site=hki old-
    """
    changes: dict[str, str | None] = {}
    for item in labels:
        key, equals, value = item.partition("=")
        if equals and key and value:
            changes[key] = value
        elif item.endswith("-") and not equals:
            changes[item[:-1]] = None
        else:
            raise UsageError(
                f"label {item!r} is neither KEY=VALUE nor KEY-", hint="for example: canary=always"
            )
    with connect(server, token_file) as plane:
        found = plane.set_labels(device_id, changes)
    print_json(found) if as_json else click.echo(
        f"{found.id}: {', '.join(f'{k}={v}' for k, v in sorted(found.labels.items()))}"
    )


@device.command("retire")
@click.argument("device_id")
@with_server
@json_option
def retire(device_id: str, server: str, token_file: Path | None, as_json: bool) -> None:
    """Refuse a device from now on; its history stays."""
    with connect(server, token_file) as plane:
        found = plane.retire(device_id)
    print_json(found) if as_json else click.echo(f"{found.id} is retired")


@device.group("token")
def token() -> None:
    """Enrolment tokens."""


@token.command("create")
@click.option("--ttl-s", default=3600, show_default=True, help="Life, seconds.")
@click.option("--uses", default=1, show_default=True, help="How many devices may enrol with it.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Labels that the devices get.")
@with_server
@json_option
def create(
    ttl_s: int, uses: int, labels: tuple[str, ...], server: str, token_file: Path | None, as_json: bool
) -> None:
    """Make an enrolment token and print it once."""
    wanted = dict(item.partition("=")[::2] for item in labels)
    with connect(server, token_file) as plane:
        made = plane.create_device_token(ttl_s, uses, wanted)
    print_json(made) if as_json else click.echo(made.token)
